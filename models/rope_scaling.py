"""How rotary frequencies are stretched for longer contexts, as configs say it. No JAX here."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

KNOWN_SCALINGS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    Attributes:
        kind: ``linear``, ``llama3``, ``yarn``, or ``factors`` (a table from a GGUF file).
        factor: how many times longer contexts become.
        original_max_position_embeddings: the length the model was first trained on.
        low_freq_factor: llama3 only; wavelengths longer than the original length over this are
            divided by the whole factor.
        high_freq_factor: llama3 only; wavelengths shorter than the original length over this stay.
        beta_fast: yarn only; rotations above which a frequency stays.
        beta_slow: yarn only; rotations below which a frequency is divided by the whole factor.
        truncate: yarn only; whether the two bounds are rounded outwards to whole dimensions.
        attention_factor: multiplies cosine and sine; None lets yarn compute it.
        factors: ``factors`` only; divisor of each frequency.
    """

    kind: str
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (*KNOWN_SCALINGS, "factors"):
            raise ValueError(
                f"rope_type must be one of default, {', '.join(KNOWN_SCALINGS)}, got {self.kind!r}"
            )
        if self.kind in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings must be at least 1 for rope_type {self.kind!r}, "
                f"got {self.original_max_position_embeddings}"
            )
        if not self.factor > 0:
            raise ValueError(f"rope scaling factor must be positive, got {self.factor}")

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], *, max_position_embeddings: int) -> Self | None:
        """Returns the scaling that rope parameters describe; None for plain rotary embedding."""
        if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(
                f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}"
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind not in KNOWN_SCALINGS:
            raise ValueError(
                f"rope_type must be one of default, {', '.join(KNOWN_SCALINGS)}, got {kind!r}"
            )
        if rope.get("factor") is None:
            raise ValueError(f"rope scaling factor must be given for rope_type {kind!r}, got none")
        factor = float(rope["factor"])
        attention_factor = rope.get("attention_factor")
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if attention_factor is None and mscale and mscale_all_dim:
            attention_factor = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
        original = rope.get("original_max_position_embeddings") or max_position_embeddings
        return cls(
            kind=kind,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
            high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            truncate=bool(rope.get("truncate", True)),
            attention_factor=None if attention_factor is None else float(attention_factor),
        )

    def stretch(self, max_position_embeddings: int) -> int:
        """Returns how long sequences may be, where a config names the length without scaling.

        Configs of llama3 name the stretched length itself; those of yarn may name either.
        """
        match self.kind:
            case "linear":
                return int(self.factor * max_position_embeddings)
            case "yarn":
                stretched = int(self.factor * self.original_max_position_embeddings)
                return max(stretched, max_position_embeddings)
            case _:
                return max_position_embeddings


def yarn_scale(factor: float, mscale: float) -> float:
    """Returns what yarn multiplies cosine and sine by."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
