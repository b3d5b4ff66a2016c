"""PackedLinear: a linear layer that the checkpoint has quantised to packed integers.

Decides which puna `Format` holds it, and gives its integers and scales as they are. All methods
that puna reads mean w[n, k] = scale[n, g] * (q[n, k] - zero[n, g]) with unsigned q and zero; where
they differ, in how the numbers lie in tensors, is `hf_quant`'s business.

Shape suffixes: N output rows, K inputs, G groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.checkpoint.packed_ints import PackedInts
from puna.checkpoint.stored import span
from puna.quant import DTYPES, Array, Format, QuantTensor, to_float32

_CHUNK = 1 << 20  # numbers dequantised at a time
_FEWEST_ROWS = 64  # dequantised at a time: the words of few rows of a column-major file lie apart
# Every backend reads groups of a multiple of this (`BuildConfig` takes no others either).
_GROUP_MULTIPLE = 16


@dataclass(frozen=True)
class PackedLinear:
    """A matrix [N, K] of integers `q` with `scale_NG` (float16, bfloat16 or float32).

    `zeros` [N, G] is None where every zero is the middle, 2^(bits - 1). `group_size` 0 is one group
    a row. `groups_K` gives the group of each column where that is not k // group_size (act order).
    """

    shape: tuple[int, int]
    q: PackedInts
    zeros: PackedInts | None
    scale_NG: Array
    group_size: int
    groups_K: Array | None = None

    @property
    def format(self) -> Format:
        """What holds the layer exactly, or else a dense format of the scales' dtype.

        A minimum is -scale * zero, an exact product in float32 if the scale is float16 or bfloat16;
        scale * q + minimum is then exact as well. Float32 scales round, as they do anywhere.
        """
        if not self.is_exact:
            return Format.dense(self._scale_dtype)
        is_half = self._scale_dtype == "float16" and self.group_size and self.zeros is None
        return Format(
            bits=self.q.bits,
            group_size=self.group_size,
            has_min=self.zeros is not None,
            scale_dtype="float16" if is_half else "float32",
        )

    @property
    def is_exact(self) -> bool:
        return self.groups_K is None and self.group_size % _GROUP_MULTIPLE == 0

    @property
    def _scale_dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.scale_NG.dtype)

    def load(self, rows: slice, cols: slice) -> Array:
        """float32 scale * (q - zero): the difference is exact, the product rounded once."""
        start, stop = span(rows, self.shape[0])
        first, last = span(cols, self.shape[1])
        groups = self._groups(first, last)
        out = np.empty((stop - start, last - first), np.float32)
        step = max(_FEWEST_ROWS, _CHUNK // max(1, last - first))
        for at in range(start, stop, step):
            part = slice(at, min(at + step, stop))
            values = out[at - start : part.stop - start]
            values[:] = self.q.unpack(part, slice(first, last))
            values -= self._zeros(part)[:, groups] if self.zeros else self._middle
            with np.errstate(invalid="ignore"):  # whoever streams the values looks for NaN
                values *= to_float32(self.scale_NG[part])[:, groups]
        return out

    def load_quantized(self, rows: slice, cols: slice) -> QuantTensor:
        """As in `Checkpoint`. q is the checkpoint's, less the middle where that is every zero."""
        assert self.is_exact, "columns in act order have no exact format; use load"
        start, stop = span(rows, self.shape[0])
        first, last = span(cols, self.shape[1])
        rows = slice(start, stop)
        groups = slice(0, 1)
        if size := self.group_size:
            assert first % size == 0 or first == last, (cols, size)
            assert last % size == 0 or last == self.shape[1], (cols, size)
            groups = slice(-(-first // size), -(-last // size))
        q_NK = np.ascontiguousarray(self.q.unpack(rows, slice(first, last)))
        scale_NG = self.scale_NG[rows, groups]
        dtype = DTYPES[self.format.scale_dtype]
        exact_NG = np.ascontiguousarray(to_float32(scale_NG).astype(dtype))
        if self.zeros is None:
            signed_NK = (q_NK - np.uint8(self._middle)).view(np.int8)  # wraps to where it belongs
            return QuantTensor(self.format, signed_NK, exact_NG)
        with np.errstate(invalid="ignore"):
            min_NG = -(exact_NG * self._zeros(rows)[:, groups])
        return QuantTensor(self.format, q_NK, exact_NG, min_NG)

    @property
    def _middle(self) -> int:
        return 2 ** (self.q.bits - 1)

    def _zeros(self, rows: slice) -> Array:
        """float32 [N, G]."""
        assert self.zeros is not None
        return self.zeros.unpack(rows, slice(None)).astype(np.float32)

    def _groups(self, first: int, last: int) -> Array:
        """The group of each column first..last-1."""
        if self.groups_K is not None:
            return self.groups_K[first:last]
        return np.arange(first, last) // (self.group_size or max(1, self.shape[1]))
