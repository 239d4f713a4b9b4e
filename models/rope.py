"""Rotary position embedding: frequencies, their scalings, and the rotation itself.

Frequencies are computed on the host in float32, once a model; cosines and sines once a step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpaged import pallas_kernels
from jpaged.models.rope_scaling import RopeScaling, yarn_scale


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
        attention_factor = yarn_scale(scaling.factor, 1.0) if scaling.kind == "yarn" else 1.0
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
