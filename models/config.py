"""The shape of a model: what a checkpoint's config says, checked once, in one frozen dataclass.

Families read their own peculiarities (biases, windows, norms) in their own files; the fields they
share are read here. Nothing here touches JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jpaged.models.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only model of the Llama kind.

    Attributes:
        architecture: the class name that checkpoints use, such as ``LlamaForCausalLM``.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; a divisor of ``num_heads``.
        head_dim: width of a head; not always ``hidden_size / num_heads`` (Qwen3).
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are stretched for longer contexts, if they are.
        max_position_embeddings: longest sequence the model was made for, with its rope scaling.
        tie_word_embeddings: the output projection is the embedding itself.
        layer_windows: per layer, how many tokens back a query may see, itself included; None in a
            layer that sees all.
        qkv_bias: q, k and v projections have a bias (Qwen2).
        o_bias: the output projection of attention has a bias.
        mlp_bias: the three MLP projections have a bias.
        qk_norm: queries and keys pass an RMSNorm over the head before rotation (Qwen3).
        hidden_act: activation of the gate; only ``silu``.
        eos_token_ids: ids that end a text, as the checkpoint says.
        bos_token_id: id that begins a text, if there is one.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    layer_windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads=}, {self.num_kv_heads=}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {self.hidden_act!r}")
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(
                "layer_windows must have one entry a layer, "
                f"got {len(self.layer_windows)} for {self.num_layers=}"
            )
        for window in self.layer_windows:
            if window is not None and window < 1:
                raise ValueError(f"sliding_window must be at least 1, got {window}")

    @property
    def sliding_window(self) -> int | None:
        """The widest window if every layer has one, else None: how far back KV must be kept."""
        windows = [window for window in self.layer_windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    @property
    def qkv_size(self) -> int:
        """Width of the fused q, k and v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """Returns the config that a checkpoint's ``config.json`` describes.

        Raises:
            ValueError: an unknown architecture, activation or rope scaling, a missing or
                impossible field.
        """
        # Imported late: the families import this module for ModelConfig.
        from jpaged.models.registry import resolve_architecture

        architectures = raw.get("architectures") or ()
        family = resolve_architecture(architectures)
        rope = read_rope_parameters(raw)
        max_positions = raw.get("max_position_embeddings", 2048)
        scaling = RopeScaling.from_hf(rope, max_position_embeddings=max_positions)
        num_heads = _required(raw, "num_attention_heads")
        num_kv_heads = raw.get("num_key_value_heads")
        fields: dict[str, Any] = {
            "architecture": family.__name__,
            "vocab_size": _required(raw, "vocab_size"),
            "hidden_size": _required(raw, "hidden_size"),
            "intermediate_size": _required(raw, "intermediate_size"),
            "num_layers": _required(raw, "num_hidden_layers"),
            "num_heads": num_heads,
            "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
            "head_dim": raw.get("head_dim") or _required(raw, "hidden_size") // num_heads,
            "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
            "rope_theta": float(rope.get("rope_theta", 10_000.0)),
            "max_position_embeddings": scaling.stretch(max_positions) if scaling else max_positions,
            "rope_scaling": scaling,
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
            "hidden_act": raw.get("hidden_act", "silu"),
            "eos_token_ids": as_token_ids(raw.get("eos_token_id")),
            "bos_token_id": next(iter(as_token_ids(raw.get("bos_token_id"))), None),
        }
        return cls(**fields | family.read_config(raw))


def read_rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns theta and scaling in one dict, from the newer or the older spelling of a config."""
    merged = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    for name, value in merged.items():
        if isinstance(value, Mapping):  # rotary parameters of a kind of layer
            raise ValueError(f"rope_parameters must be the same for all layers, got {name!r}")
    if "rope_theta" not in merged and raw.get("rope_theta") is not None:
        merged["rope_theta"] = raw["rope_theta"]
    if "partial_rotary_factor" not in merged and raw.get("partial_rotary_factor") is not None:
        merged["partial_rotary_factor"] = raw["partial_rotary_factor"]
    return merged


def read_layer_windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Returns the windows of a family that mixes full and sliding layers (Qwen2, Qwen3)."""
    num_layers = _required(raw, "num_hidden_layers")
    # The families' defaults where a config is silent.
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    for kind in layer_types:
        if kind not in known:
            raise ValueError(f"layer_types must hold only {', '.join(known)}, got {kind!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def as_token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Returns the ids of a config field that may be one id, several or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _required(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config field {name} must be an integer of at least 1, got {value!r}")
    return value
