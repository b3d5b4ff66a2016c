"""Layouts: how the numbers of a matrix are arranged in an engine file.

A layout turns a (rows, cols) matrix of some `Format` into named arrays and back. Every stored
tensor names its layout in `config.json`; packing happens at build time, some row tiles at a time,
and unpacking in the reference and in tests. Layouts say nothing of which tensor is stored where.

`tiles`: TILE output rows at a time, so that one vector load brings the same columns of 16 rows.
The numbers of a row are taken in words of four bytes; a tile is a matrix of words [J, 16], word j
of its 16 rows one after the other. What a word (tile, j, n) holds of row 16 * tile + n:

    float32             column j                           `data` [I, K, 16]
    float16, bfloat16   columns 2j, 2j + 1                 `data` [I, ceil(K / 2), 16, 2]
    8 bits              columns 4j to 4j + 3, a byte each  `q` [I, Kp / 4, 16, 4]
    4 bits              columns 8j to 8j + 7: byte c has column 8j + c in its low half and
                        8j + 4 + c in its high half        `q` [I, Kp / 8, 16, 4]

Bytes are unsigned: signed q are stored as q + 128 (8 bits) or q + 8 (4 bits). `scale` and, with a
minimum, `min` are [I, G, 16]. Padding stands for zeros: q is 0 in columns beyond K and in rows
beyond N, and scale and min are 0 in rows beyond N.

`rows`: one row after the other, as matrix products on a GPU read them. Dense formats of 16 bits
only: `data` [Np, Kp], with zeros beyond the matrix. Matrices that follow each other in a file then
are one matrix with the rows of all.

The first axis of every array counts tiles (`tiles`) or rows (`rows`), so that whole tiles of rows
can be packed, stored and read in any number; `axis_rows` says which.

Shape suffixes: N rows, K columns, G groups a row, I = ceil(N / 16) tiles, J words a row, U = 16
rows of a tile; Np = N rounded up to a multiple of 16, Kp = K rounded up to a multiple of 32
(`tiles`) or 64 (`rows`).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from puna.errors import EngineError
from puna.native.packing import Packer, find_packer
from puna.quant import DTYPES, Array, Format, QuantTensor, to_float32

LayoutName = Literal["tiles", "rows"]
ArraySpec = tuple[np.dtype, tuple[int, ...]]

# Rows of a tile: 16 words of four bytes are one AVX-512 register, or two of AVX2.
TILE = 16
# Columns of a quantised matrix are padded to a multiple of this.
COLS_MULTIPLE = 32
# Columns of a row of layout `rows` are padded to a multiple of this: 128 bytes, a GPU's cache line.
ROW_COLS_MULTIPLE = 64
_WORD_BYTES = 4


def check_layout(name: str) -> LayoutName:
    """The name, if this version knows the layout; else EngineError."""
    for known in get_args(LayoutName):
        if name == known:
            return known
    raise EngineError(
        f"layout {name!r} is unknown; this version of puna reads "
        f"{', '.join(get_args(LayoutName))}: rebuild the engine"
    )


def check_holds(layout: LayoutName, fmt: Format) -> None:
    """Raise EngineError for a format that the layout has no place for."""
    if layout == "rows" and not (fmt.is_dense and DTYPES[fmt.dtype].itemsize == 2):
        raise EngineError(f"layout rows holds float16 and bfloat16, not {fmt.name}: rebuild")


def axis_rows(layout: LayoutName) -> int:
    """How many rows of the matrix one index of a stored array's first axis stands for."""
    return TILE if layout == "tiles" else 1


def array_specs(
    layout: LayoutName, fmt: Format, num_rows: int, num_cols: int
) -> dict[str, ArraySpec]:
    """dtype and shape of each stored array of a matrix, by suffix, in file order."""
    check_holds(layout, fmt)
    num_tiles = -(-num_rows // TILE)
    if layout == "rows":
        return {"data": (DTYPES[fmt.dtype], _rows_shape(num_rows, num_cols))}
    if fmt.is_dense:
        dtype = DTYPES[fmt.dtype]
        a_word = _WORD_BYTES // dtype.itemsize
        words = (num_tiles, -(-num_cols // a_word), TILE)
        return {"data": (dtype, words if a_word == 1 else (*words, a_word))}
    num_words = _padded_cols(num_cols) * fmt.bits // (8 * _WORD_BYTES)
    scale = (DTYPES[fmt.scale_dtype], (num_tiles, fmt.num_groups(num_cols), TILE))
    q = (np.dtype(np.uint8), (num_tiles, num_words, TILE, _WORD_BYTES))
    arrays = {"q": q, "scale": scale}
    return {**arrays, "min": scale} if fmt.has_min else arrays


def pack_dense(layout: LayoutName, x_NK: Array) -> dict[str, Array]:
    """Arrays of `array_specs` for rows of a matrix in the dtype that they are stored in."""
    num_rows, num_cols = x_NK.shape
    if layout == "rows":
        return {"data": _padded(x_NK, _rows_shape(num_rows, num_cols))}
    a_word = _WORD_BYTES // x_NK.dtype.itemsize
    if packer := find_packer():
        shape = (-(-num_rows // TILE), -(-num_cols // a_word), TILE)
        out = np.empty(shape if a_word == 1 else (*shape, a_word), x_NK.dtype)
        packer.pack(x_NK, out)
        return {"data": out}
    x_NK = _padded(x_NK, (-(-num_rows // TILE) * TILE, -(-num_cols // a_word) * a_word))
    words_IJU = _tiles(x_NK.view(np.uint32))
    data = words_IJU.view(x_NK.dtype)
    return {"data": data if a_word == 1 else data.reshape(*words_IJU.shape, a_word)}


def pack_quantised(layout: LayoutName, tensor: QuantTensor) -> dict[str, Array]:
    """Arrays of `array_specs` for rows of a quantised matrix."""
    check_holds(layout, tensor.format)
    if packer := find_packer():
        return _pack_natively(tensor, packer)
    fmt = tensor.format
    num_rows, num_cols = tensor.q_NK.shape
    shape = (-(-num_rows // TILE) * TILE, _padded_cols(num_cols))
    zero = _zero_point(fmt)
    bytes_NK = np.full(shape, zero, np.uint8)
    # In uint8 arithmetic a negative q wraps to where it belongs.
    np.add(tensor.q_NK.view(np.uint8), zero, out=bytes_NK[:num_rows, :num_cols])
    if fmt.bits == 4:
        halves = bytes_NK.reshape(shape[0], -1, 2, _WORD_BYTES)
        bytes_NK = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(shape[0], -1)
    words_IJU = _tiles(bytes_NK.view(np.uint32))
    arrays = {
        "q": words_IJU.view(np.uint8).reshape(*words_IJU.shape, _WORD_BYTES),
        "scale": _tiles(_pad_rows(tensor.scale_NG)),
    }
    return arrays if tensor.min_NG is None else {**arrays, "min": _tiles(_pad_rows(tensor.min_NG))}


def _pack_natively(tensor: QuantTensor, packer: Packer) -> dict[str, Array]:
    fmt = tensor.format
    specs = array_specs("tiles", fmt, *tensor.q_NK.shape)
    arrays = {suffix: np.empty(shape, dtype) for suffix, (dtype, shape) in specs.items()}
    packer.pack_integers(tensor.q_NK, fmt.bits, fmt.has_min, arrays["q"])
    packer.pack_scales(tensor.scale_NG, arrays["scale"])
    if tensor.min_NG is not None:
        packer.pack_scales(tensor.min_NG, arrays["min"])
    return arrays


def unpack_dense(
    layout: LayoutName, arrays: dict[str, Array], num_rows: int, num_cols: int
) -> Array:
    """Inverse of `pack_dense`."""
    data = arrays["data"]
    if layout == "rows":
        return data[:num_rows, :num_cols]
    words_IJU = data.reshape(*data.shape[:2], -1).view(np.uint32)
    return _rows(words_IJU).view(data.dtype)[:num_rows, :num_cols]


def unpack_quantised(
    layout: LayoutName, arrays: dict[str, Array], fmt: Format, num_rows: int, num_cols: int
) -> QuantTensor:
    """Inverse of `pack_quantised`."""
    check_holds(layout, fmt)
    q = arrays["q"]
    bytes_NK = _rows(q.reshape(*q.shape[:2], -1).view(np.uint32)).view(np.uint8)
    if fmt.bits == 4:
        bytes_NJC = bytes_NK.reshape(len(bytes_NK), -1, _WORD_BYTES)
        halves = np.stack((bytes_NJC & 15, bytes_NJC >> 4), axis=2)
        bytes_NK = halves.reshape(len(bytes_NK), -1)
    q_NK = bytes_NK[:num_rows, :num_cols] - _zero_point(fmt)
    return QuantTensor(
        fmt,
        q_NK if fmt.has_min else q_NK.view(np.int8),
        _rows(arrays["scale"])[:num_rows],
        _rows(arrays["min"])[:num_rows] if fmt.has_min else None,
    )


def to_dense(
    layout: LayoutName, arrays: dict[str, Array], fmt: Format, num_rows: int, num_cols: int
) -> Array:
    """float32 [N, K]: the values that the stored arrays stand for."""
    if fmt.is_dense:
        return to_float32(unpack_dense(layout, arrays, num_rows, num_cols))
    return unpack_quantised(layout, arrays, fmt, num_rows, num_cols).dequantize()


def _rows_shape(num_rows: int, num_cols: int) -> tuple[int, int]:
    """[Np, Kp] of layout `rows`."""
    num_blocks = -(-num_cols // ROW_COLS_MULTIPLE)
    return -(-num_rows // TILE) * TILE, num_blocks * ROW_COLS_MULTIPLE


def _padded(x_NK: Array, shape: tuple[int, int]) -> Array:
    """The matrix with zeros up to `shape`, contiguous; itself where that changes nothing."""
    if x_NK.shape == shape:
        return np.ascontiguousarray(x_NK)
    padded_NK = np.zeros(shape, x_NK.dtype)
    padded_NK[: x_NK.shape[0], : x_NK.shape[1]] = x_NK
    return padded_NK


def _padded_cols(num_cols: int) -> int:
    return -(-num_cols // COLS_MULTIPLE) * COLS_MULTIPLE


def _zero_point(fmt: Format) -> np.uint8:
    """The byte that q = 0 is stored as."""
    return np.uint8(0 if fmt.has_min else 1 << (fmt.bits - 1))


def _pad_rows(x_NG: Array) -> Array:
    missing = -len(x_NG) % TILE
    return np.pad(x_NG, ((0, missing), (0, 0))) if missing else x_NG


def _tiles(x_NJ: Array) -> Array:
    """[I, J, U] of whole tiles of rows."""
    x_IUJ = x_NJ.reshape(-1, TILE, x_NJ.shape[1])
    return np.ascontiguousarray(x_IUJ.transpose(0, 2, 1))


def _rows(x_IJU: Array) -> Array:
    """[N, J], contiguous: inverse of `_tiles`."""
    num_tiles, num_words, _ = x_IJU.shape
    return np.ascontiguousarray(x_IJU.transpose(0, 2, 1)).reshape(num_tiles * TILE, num_words)
