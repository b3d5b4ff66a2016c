"""RoPE angles for every scaling of the Llama family. The angle of a token depends on its position
alone.

Sources: RoFormer (arXiv:2104.09864), position interpolation ("linear", arXiv:2306.15595), dynamic
NTK (as in Hugging Face's configuration of that name), YaRN (arXiv:2309.00071), and Llama 3.1's
published frequency bands ("llama3").

"dynamic" stretches the base with the length seen so far. puna takes position + 1 for that length,
so that a token's angle does not depend on how its prompt was split into steps; libraries that take
the length of the whole prompt agree with it up to the original length and in decoding.
"""

from __future__ import annotations

import math

import numpy as np

from puna.quant import Array
from puna.spec import RopeSpec


def rope_tables(rope: RopeSpec, head_dim: int, num_positions: int) -> tuple[Array, Array]:
    """cos and sin, float32 [num_positions, head_dim / 2]; pair i rotates dimensions i and i +
    E/2."""
    inv_freq = inverse_frequencies(rope, head_dim).astype(np.float32)
    positions = np.arange(num_positions, dtype=np.float32)
    # The product is rounded to float32 as everyone's is; models were trained with that rounding.
    angles = positions[:, None] * inv_freq[None, :]
    original = rope.original_max_position_embeddings
    if rope.type == "dynamic" and num_positions > original:
        lengths = positions[original:].astype(np.float64) + 1
        angles[original:] = positions[original:, None] * _dynamic(rope, head_dim, lengths)
    scale = _attention_factor(rope)
    wide = angles.astype(np.float64)
    return (np.cos(wide) * scale).astype(np.float32), (np.sin(wide) * scale).astype(np.float32)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Array:
    """float64 [head_dim / 2]: radians a position, up to the original length for "dynamic"."""
    base = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        return base / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, base)
    if rope.type == "yarn":
        return _yarn(rope, base, head_dim)
    return base


def _dynamic(rope: RopeSpec, head_dim: int, lengths: Array) -> Array:
    """float32 [len(lengths), head_dim / 2]: frequencies at lengths beyond the original."""
    original = rope.original_max_position_embeddings
    stretch = rope.factor * lengths / original - (rope.factor - 1)
    base = rope.theta * stretch ** (head_dim / (head_dim - 2))
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return (base[:, None] ** -exponent).astype(np.float32)


def _llama3(rope: RopeSpec, inv_freq: Array) -> Array:
    """Long wavelengths are divided by factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn(rope: RopeSpec, inv_freq: Array, head_dim: int) -> Array:
    """Dimensions that turn more than beta_fast times over the original length are kept, those that
    turn less than beta_slow times are interpolated, with a linear ramp between."""

    def dimension_of(turns: float) -> float:
        original = rope.original_max_position_embeddings
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return ramp * inv_freq / rope.factor + (1 - ramp) * inv_freq


def _attention_factor(rope: RopeSpec) -> float:
    """YaRN's factor on cos and sin (so its square acts on the attention scores); 1 elsewhere."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
