"""Layouts: how the numbers of a matrix are arranged in an engine file.

A layout turns a (rows, cols) matrix of some `Format` into named arrays and back. Every stored
tensor names its layout in `config.json`; packing happens at build time, row tile by row tile, and
unpacking in the reference and in tests. Layouts say nothing of which tensor is stored where.

`rows`: row-major, as NumPy would keep it. Dense: `data` [N, K]. Quantised: `q` [N, K] one byte each
for 8 bits, or [N, ceil(K / 2)] with the even column in the low nibble for 4 bits (signed values
stored as q + 8); `scale` and, with a minimum, `min` [N, G].

Shape suffixes: N rows, K columns, G groups a row.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from puna.errors import EngineError
from puna.quant import DTYPES, Array, Format, QuantTensor, to_float32

LayoutName = Literal["rows"]
ArraySpec = tuple[np.dtype, tuple[int, ...]]


def check_layout(name: str) -> None:
    """Raise EngineError for a layout that this version does not know."""
    if name not in get_args(LayoutName):
        raise EngineError(
            f"layout {name!r} is unknown; this version of puna reads "
            f"{', '.join(get_args(LayoutName))}: rebuild the engine"
        )


def array_specs(fmt: Format, num_rows: int, num_cols: int) -> dict[str, ArraySpec]:
    """dtype and shape of each stored array of a matrix, by suffix, in file order."""
    if fmt.is_dense:
        return {"data": (DTYPES[fmt.dtype], (num_rows, num_cols))}
    q_dtype = np.dtype(np.uint8 if fmt.bits == 4 or fmt.has_min else np.int8)
    q_cols = -(-num_cols // 2) if fmt.bits == 4 else num_cols
    scale = (DTYPES[fmt.scale_dtype], (num_rows, fmt.num_groups(num_cols)))
    arrays = {"q": (q_dtype, (num_rows, q_cols)), "scale": scale}
    return {**arrays, "min": scale} if fmt.has_min else arrays


def pack_rows(tensor: QuantTensor) -> dict[str, Array]:
    """Arrays of `array_specs` for some rows of a quantised matrix."""
    fmt, q_NK = tensor.format, tensor.q_NK
    if fmt.bits == 4:
        unsigned_NK = q_NK if fmt.has_min else (q_NK + 8).astype(np.uint8)
        if unsigned_NK.shape[1] % 2:
            unsigned_NK = np.pad(unsigned_NK, ((0, 0), (0, 1)))
        q_NK = unsigned_NK[:, 0::2] | (unsigned_NK[:, 1::2] << 4)
    arrays = {"q": q_NK, "scale": tensor.scale_NG}
    return arrays if tensor.min_NG is None else {**arrays, "min": tensor.min_NG}


def unpack_rows(arrays: dict[str, Array], fmt: Format, num_cols: int) -> QuantTensor:
    """Inverse of `pack_rows`."""
    q_NK = arrays["q"]
    if fmt.bits == 4:
        wide_NK = np.empty((q_NK.shape[0], 2 * q_NK.shape[1]), np.uint8)
        wide_NK[:, 0::2] = q_NK & 15
        wide_NK[:, 1::2] = q_NK >> 4
        wide_NK = wide_NK[:, :num_cols]
        q_NK = wide_NK if fmt.has_min else wide_NK.astype(np.int8) - np.int8(8)
    return QuantTensor(fmt, q_NK, arrays["scale"], arrays.get("min"))


def to_dense(arrays: dict[str, Array], fmt: Format, num_cols: int) -> Array:
    """float32 [N, K]: the values that the stored arrays stand for."""
    if fmt.is_dense:
        return to_float32(arrays["data"])
    return unpack_rows(arrays, fmt, num_cols).dequantize()
