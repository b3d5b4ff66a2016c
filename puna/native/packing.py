"""Packing and quantising at the speed of memory, where the native library is there.

Does what `puna.layout` and `puna.quant` do in NumPy, to the bit; they ask for it here and go on by
themselves where there is no library. Knows arrays and sizes, no formats and no files.

Shape suffixes: N rows, K columns, G groups a row.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import numpy as np

from puna.native.library import find_library

Array = np.ndarray[Any, np.dtype[Any]]


class Packer:
    """The library's packing functions. They let go of the interpreter while they work."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in (
            ("pack_words", [c_void_p, c_int64, c_int64, c_int64, c_void_p]),
            ("pack_integers", [c_void_p, c_int, c_int, c_int64, c_int64, c_void_p]),
            ("pack_halves", [c_void_p, c_int64, c_int64, c_void_p]),
            (
                "quantize",
                [c_void_p, c_int64, c_int, c_int, c_int, c_int, c_void_p, c_void_p],
            ),
        ):
            function = getattr(library, f"puna_{name}")
            function.restype, function.argtypes = None, arguments

    def pack(self, x_NK: Array, out: Array) -> None:
        """Numbers of two or four bytes into tiles of four-byte words; `out` as layout says."""
        x_NK = np.ascontiguousarray(x_NK)
        num_rows, num_cols = x_NK.shape
        row_bytes = num_cols * x_NK.dtype.itemsize
        self._library.puna_pack_words(
            x_NK.ctypes.data, num_rows, row_bytes, out.shape[1], out.ctypes.data
        )

    def pack_integers(self, q_NK: Array, bits: int, has_min: bool, out: Array) -> None:
        """Integers, a byte each, into tiles of 8 or 4 bits."""
        q_NK = np.ascontiguousarray(q_NK)
        num_rows, num_cols = q_NK.shape
        self._library.puna_pack_integers(
            q_NK.ctypes.data, bits, has_min, num_rows, num_cols, out.ctypes.data
        )

    def pack_scales(self, x_NG: Array, out: Array) -> None:
        """Scales or minima, float32 or float16, into tiles."""
        if x_NG.dtype.itemsize == 4:
            self.pack(x_NG, out)
            return
        x_NG = np.ascontiguousarray(x_NG)
        self._library.puna_pack_halves(x_NG.ctypes.data, *x_NG.shape, out.ctypes.data)

    def quantize(
        self, x_NK: Array, group_size: int, limit: int, num_groups: int, is_scale_f32: bool
    ) -> tuple[Array, Array]:
        """int8 [N, K] and float32 scales [N, G] (rounded to float16 unless `is_scale_f32`)."""
        x_NK = np.ascontiguousarray(x_NK, dtype=np.float32)
        num_rows, num_cols = x_NK.shape
        q_NK = np.empty((num_rows, num_cols), np.int8)
        scale_NG = np.empty((num_rows, num_groups), np.float32)
        self._library.puna_quantize(
            x_NK.ctypes.data,
            num_rows,
            num_cols,
            group_size,
            limit,
            is_scale_f32,
            q_NK.ctypes.data,
            scale_NG.ctypes.data,
        )
        return q_NK, scale_NG


@cache
def find_packer() -> Packer | None:
    """The packer, or None where there is no native library."""
    library = find_library()
    return None if library is None else Packer(library)
