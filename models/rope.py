"""Rotary position embedding: frequencies, their scalings, and the rotation itself.

Frequencies are computed on the host in float32, once a model; cosines and sines once a step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpaged import pallas_kernels

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
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
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


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """Returns the angular frequency of each pair f32[head_dim / 2] and the scale of cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if scaling is None:
        return frequencies, 1.0
    match scaling.kind:
        case "linear":
            scaled = frequencies / np.float32(scaling.factor)
        case "llama3":
            scaled = _scale_llama3(frequencies, scaling)
        case "yarn":
            scaled = _scale_yarn(frequencies, scaling, head_dim, theta)
        case _:
            scaled = frequencies / np.asarray(scaling.factors, np.float32)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = _yarn_scale(scaling.factor, 1.0) if scaling.kind == "yarn" else 1.0
    return scaled.astype(np.float32), attention_factor


def _scale_llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelengths = 2 * np.pi / frequencies
    ratio = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((ratio - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _scale_yarn(
    frequencies: np.ndarray, scaling: RopeScaling, head_dim: int, theta: float
) -> np.ndarray:
    def dim_of(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the reference does: no division by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Cosine and sine of every token's angles, shared by all layers of a step."""

    cos: jax.Array  # f32[num_tokens, head_dim / 2]
    sin: jax.Array  # f32[num_tokens, head_dim / 2]


def make_rope(
    positions: Int[Array, "num_tokens"], frequencies: np.ndarray, attention_factor: float
) -> Rope:
    """Returns the angles of tokens at the given positions."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return Rope(jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor)


def rotate(
    x: Float[Array, "num_tokens num_heads head_dim"], rope: Rope
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Returns x rotated; the two halves of a head are a pair, as Hugging Face lays them out."""
    return pallas_kernels.rotate(x, rope.cos, rope.sin)
