"""Weight formats: what a stored matrix may look like, and the exact arithmetic between the forms.

A `Format` names the numbers (dense floats, or integers with scales); `QuantTensor` holds the
integers unpacked, one a byte. How they are arranged in an engine file is a *layout*
(`puna.layout`), and which tensor gets which format is decided in `puna.plan`; neither is known
here.

Shape suffixes: N output rows, K inputs, G = ceil(K / group_size) groups a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from puna.errors import ConfigError
from puna.native.packing import find_packer

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: MappingProxyType[str, np.dtype[Any]] = MappingProxyType(
    {
        "float32": np.dtype(np.float32),
        "float16": np.dtype(np.float16),
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
    }
)
# What a KV cache may hold: floats, or integers with a float32 scale for each token and KV head.
KV_DTYPES: MappingProxyType[str, np.dtype[Any]] = MappingProxyType(
    {**DTYPES, "int8": np.dtype(np.int8)}
)


def to_float32(x: Array) -> Array:
    """float32 copy (or the array itself); bfloat16 by shifting bits, ten times faster than a
    cast."""
    if x.dtype == DTYPES["bfloat16"]:
        wide = x.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return x.astype(np.float32, copy=False)


def all_finite(x: Array) -> bool:
    """Whether no element is NaN or infinite, without a temporary as wide as float32."""
    if x.dtype == np.float32:
        bits, exponent = x.view(np.uint32), np.uint32(0x7F800000)
    elif x.dtype == np.float16:
        bits, exponent = x.view(np.uint16), np.uint16(0x7C00)
    else:
        assert x.dtype == DTYPES["bfloat16"], x.dtype
        bits, exponent = x.view(np.uint16), np.uint16(0x7F80)
    return not np.any((bits & exponent) == exponent)


@dataclass(frozen=True)
class Format:
    """How the numbers of one matrix are represented.

    Dense: `dtype` is set. Quantised: w[n, k] = scale[n, g] * q[n, k] (+ min[n, g] if has_min), with
    g = k // group_size, computed in float32; group_size 0 is one group a row (per output channel).
    q is signed (-8..7, -128..127) without min and unsigned (0..15, 0..255) with it.

    >>> Format.parse("int4-g32-min").name, Format.parse("bfloat16").is_dense
    ('int4-g32-min', True)
    """

    dtype: str = ""
    bits: int = 0
    group_size: int = 0
    has_min: bool = False
    scale_dtype: str = "float16"

    @property
    def is_dense(self) -> bool:
        return bool(self.dtype)

    @property
    def name(self) -> str:
        if self.is_dense:
            return self.dtype
        group = f"-g{self.group_size}" if self.group_size else ""
        exact = "" if self.scale_dtype == self._usual_scale_dtype(self.group_size) else "-f32"
        return f"int{self.bits}{group}{'-min' if self.has_min else ''}{exact}"

    @staticmethod
    def _usual_scale_dtype(group_size: int) -> str:
        # A row's scale costs nothing, so it keeps float32; a group's is float16, as GGUF's are.
        return "float16" if group_size else "float32"

    @classmethod
    def dense(cls, dtype: str) -> Format:
        assert dtype in DTYPES, dtype
        return cls(dtype=dtype)

    @classmethod
    def quantised(cls, bits: int, group_size: int = 0, has_min: bool = False) -> Format:
        """The usual form: float32 scales per output channel, float16 scales per group."""
        return cls("", bits, group_size, has_min, cls._usual_scale_dtype(group_size))

    @classmethod
    def parse(cls, name: str) -> Format:
        """Inverse of `name`; ConfigError when there is no such format."""
        if name in DTYPES:
            return cls.dense(name)
        match = re.fullmatch(r"int([48])(?:-g([1-9]\d*))?(-min)?(-f32)?", name)
        if not match:
            raise ConfigError(f"unknown weight format {name!r}")
        group_size = int(match[2] or 0)
        scale_dtype = "float32" if match[4] else cls._usual_scale_dtype(group_size)
        found = cls("", int(match[1]), group_size, bool(match[3]), scale_dtype)
        if found.name != name:
            raise ConfigError(f"unknown weight format {name!r}; did you mean {found.name!r}?")
        return found

    @property
    def q_range(self) -> tuple[int, int]:
        """Smallest and largest q."""
        return (
            (0, 2**self.bits - 1)
            if self.has_min
            else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        )

    def num_groups(self, num_cols: int) -> int:
        return -(-num_cols // self.group_size) if self.group_size else 1


@dataclass(frozen=True)
class QuantTensor:
    """A quantised matrix, unpacked: q_NK int8 (uint8 with min), scale_NG and min_NG in
    scale_dtype."""

    format: Format
    q_NK: Array
    scale_NG: Array
    min_NG: Array | None = None

    def __post_init__(self) -> None:
        num_rows, num_cols = self.q_NK.shape
        groups = (num_rows, self.format.num_groups(num_cols))
        assert self.q_NK.dtype == (np.uint8 if self.format.has_min else np.int8), self.q_NK.dtype
        assert self.scale_NG.shape == groups, (self.scale_NG.shape, groups)
        assert (self.min_NG is not None) == self.format.has_min
        assert self.min_NG is None or self.min_NG.shape == groups

    def dequantize(self) -> Array:
        """float32 [N, K]: scale * q, then + min, each rounded once, as GGUF's own formula does."""
        num_rows, num_cols = self.q_NK.shape
        num_groups = self.format.num_groups(num_cols)
        if self.format.group_size and num_cols % self.format.group_size:
            return self._dequantize_uneven()
        # Groups of one length: broadcasting is three times faster than spreading the scales out.
        groups = (num_rows, num_groups, num_cols // max(num_groups, 1))
        out_NGE = self.q_NK.astype(np.float32).reshape(groups)
        out_NGE *= self.scale_NG.astype(np.float32)[:, :, None]
        if self.min_NG is not None:
            out_NGE += self.min_NG.astype(np.float32)[:, :, None]
        return out_NGE.reshape(num_rows, num_cols)

    def _dequantize_uneven(self) -> Array:
        """The same where the last group is shorter than the others."""
        out_NK = self.q_NK.astype(np.float32)
        out_NK *= spread_groups(self.scale_NG, self.format, self.q_NK.shape[1])
        if self.min_NG is not None:
            out_NK += spread_groups(self.min_NG, self.format, self.q_NK.shape[1])
        return out_NK


def spread_groups(x_NG: Array, fmt: Format, num_cols: int) -> Array:
    """float32 [N, K] (or [N, 1] per channel): each group's value at each of its columns."""
    x_NG = x_NG.astype(np.float32)
    if not fmt.group_size:
        return x_NG
    return np.repeat(x_NG, fmt.group_size, axis=1)[:, :num_cols]


def quantize(x_NK: Array, fmt: Format) -> QuantTensor:
    """Round-to-nearest quantisation of float rows, symmetric: scale = max|w| / (2^(bits-1) - 1).

    A zero group gets scale 0. The scale is rounded to scale_dtype before the weights are divided by
    it, so that the rounding of the scale does not add to the error. Raises ConfigError when the
    format has a minimum (those come from checkpoints, never from floats).
    """
    if fmt.has_min:
        raise ConfigError(f"puna does not quantise floats to {fmt.name}; use int8 or int4")
    num_rows, num_cols = x_NK.shape
    if packer := find_packer():
        q_NK, scale_NG = packer.quantize(
            x_NK,
            fmt.group_size,
            2 ** (fmt.bits - 1) - 1,
            fmt.num_groups(num_cols),
            fmt.scale_dtype == "float32",
        )
        return QuantTensor(fmt, q_NK, scale_NG.astype(DTYPES[fmt.scale_dtype], copy=False))
    size = fmt.group_size or num_cols
    pad = fmt.num_groups(num_cols) * size - num_cols
    x_NK = np.ascontiguousarray(x_NK, dtype=np.float32)
    x_NGE = (np.pad(x_NK, ((0, 0), (0, pad))) if pad else x_NK).reshape(num_rows, -1, size)
    limit = 2 ** (fmt.bits - 1) - 1
    # + 0: the largest of zeros is 0, never -0.
    largest_NG = np.maximum(x_NGE.max(axis=2), -x_NGE.min(axis=2)) + np.float32(0)
    scale_NG = (largest_NG / np.float32(limit)).astype(DTYPES[fmt.scale_dtype])
    scale32_NG = scale_NG.astype(np.float32)
    inverse_NG = np.divide(1.0, scale32_NG, out=np.zeros_like(scale32_NG), where=scale32_NG > 0)
    scaled_NGE = x_NGE * inverse_NG[:, :, None]
    np.rint(scaled_NGE, out=scaled_NGE)
    np.clip(scaled_NGE, -limit, limit, out=scaled_NGE)
    q_NK = scaled_NGE.astype(np.int8).reshape(num_rows, -1)[:, :num_cols]
    return QuantTensor(fmt, np.ascontiguousarray(q_NK), scale_NG)
