"""Packed arrays: where every number lies, bit-exact there and back, and as large as declared."""

from __future__ import annotations

import numpy as np
import pytest

import puna.layout
import puna.quant
from puna.errors import EngineError
from puna.layout import (
    array_specs,
    axis_rows,
    check_layout,
    pack_dense,
    pack_quantised,
    to_dense,
    unpack_dense,
    unpack_quantised,
)
from puna.native.packing import find_packer
from puna.quant import DTYPES, Array, Format, QuantTensor, to_float32

QUANTISED = ["int8", "int8-g32", "int8-g16-f32", "int8-g48", "int8-g32-min", "int8-min"]
QUANTISED += ["int4", "int4-g16", "int4-g32", "int4-g32-min", "int4-g32-min-f32", "int4-g128"]
SHAPES = [(1, 1), (5, 2), (15, 31), (16, 32), (17, 33), (35, 172), (48, 7)]


@pytest.fixture(autouse=True, params=["numpy", "native"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds of both ways to pack."""
    packer = None
    if request.param == "native":
        packer = find_packer()
        if packer is None:
            pytest.skip("needs the native library")
    for module in (puna.layout, puna.quant):
        monkeypatch.setattr(module, "find_packer", lambda: packer)


def random_tensor(fmt: Format, num_rows: int, num_cols: int) -> QuantTensor:
    """Every value of the range may occur, the smallest and the largest do."""
    rng = np.random.default_rng(num_cols)
    low, high = fmt.q_range
    q_NK = rng.integers(low, high + 1, (num_rows, num_cols))
    q_NK[0, 0], q_NK[-1, -1] = low, high
    groups = (num_rows, fmt.num_groups(num_cols))
    scale_dtype = DTYPES[fmt.scale_dtype]
    return QuantTensor(
        fmt,
        q_NK.astype(np.uint8 if fmt.has_min else np.int8),
        rng.standard_normal(groups).astype(scale_dtype),
        rng.standard_normal(groups).astype(scale_dtype) if fmt.has_min else None,
    )


def random_dense(dtype: str, num_rows: int, num_cols: int) -> Array:
    return (
        np.random.default_rng(num_cols).standard_normal((num_rows, num_cols)).astype(DTYPES[dtype])
    )


def check_specs(arrays: dict[str, Array], fmt: Format, num_rows: int, num_cols: int) -> None:
    specs = array_specs("tiles", fmt, num_rows, num_cols)
    assert {key: (array.dtype, array.shape) for key, array in arrays.items()} == specs
    assert list(arrays) == list(specs), "file order"
    assert all(array.flags.c_contiguous for array in arrays.values())


@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_pack_and_unpack_are_inverse(name: str, num_rows: int, num_cols: int) -> None:
    fmt = Format.parse(name)
    tensor = random_tensor(fmt, num_rows, num_cols)
    arrays = pack_quantised("tiles", tensor)
    check_specs(arrays, fmt, num_rows, num_cols)
    back = unpack_quantised("tiles", arrays, fmt, num_rows, num_cols)
    assert back.q_NK.dtype == tensor.q_NK.dtype
    assert np.array_equal(back.q_NK, tensor.q_NK)
    assert np.array_equal(back.scale_NG, tensor.scale_NG)
    assert (back.min_NG is None) == (tensor.min_NG is None)
    assert back.min_NG is None or np.array_equal(back.min_NG, tensor.min_NG)
    assert np.array_equal(to_dense("tiles", arrays, fmt, num_rows, num_cols), tensor.dequantize())


@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_dense_pack_and_unpack_are_inverse(name: str, num_rows: int, num_cols: int) -> None:
    x_NK = random_dense(name, num_rows, num_cols)
    arrays = pack_dense("tiles", x_NK)
    check_specs(arrays, Format.dense(name), num_rows, num_cols)
    back_NK = unpack_dense("tiles", arrays, num_rows, num_cols)
    assert back_NK.dtype == x_NK.dtype and np.array_equal(back_NK, x_NK)
    dense_NK = to_dense("tiles", arrays, Format.dense(name), num_rows, num_cols)
    assert dense_NK.dtype == np.float32 and np.array_equal(dense_NK, to_float32(x_NK))


def naive_dense(x_NK: Array) -> Array:
    """The definition: columns of a row in words of four bytes, words of 16 rows side by side."""
    num_rows, num_cols = x_NK.shape
    a_word = 4 // x_NK.dtype.itemsize
    out = np.zeros((-(-num_rows // 16), -(-num_cols // a_word), 16, a_word), x_NK.dtype)
    for tile, j, n, c in np.ndindex(*out.shape):
        row, column = 16 * tile + n, a_word * j + c
        if row < num_rows and column < num_cols:
            out[tile, j, n, c] = x_NK[row, column]
    return out[..., 0] if a_word == 1 else out


def naive_q(tensor: QuantTensor) -> Array:
    num_rows, num_cols = tensor.q_NK.shape
    padded = -(-num_cols // 32) * 32
    bits, num_tiles = tensor.format.bits, -(-num_rows // 16)
    offset = 0 if tensor.format.has_min else {8: 128, 4: 8}[bits]

    def u(row: int, column: int) -> int:
        is_there = row < num_rows and column < num_cols
        return offset + (int(tensor.q_NK[row, column]) if is_there else 0)

    out = np.zeros((num_tiles, padded // (4 if bits == 8 else 8), 16, 4), np.uint8)
    for tile, j, n, c in np.ndindex(*out.shape):
        row = 16 * tile + n
        if bits == 8:
            out[tile, j, n, c] = u(row, 4 * j + c)
        else:
            out[tile, j, n, c] = u(row, 8 * j + c) + 16 * u(row, 8 * j + 4 + c)
    return out


def naive_groups(x_NG: Array) -> Array:
    num_rows, num_groups = x_NG.shape
    out = np.zeros((-(-num_rows // 16), num_groups, 16), x_NG.dtype)
    for tile, group, n in np.ndindex(*out.shape):
        if 16 * tile + n < num_rows:
            out[tile, group, n] = x_NG[16 * tile + n, group]
    return out


@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
@pytest.mark.parametrize("name", QUANTISED)
def test_every_quantised_number_and_padding_lies_where_the_layout_says(
    name: str, num_rows: int, num_cols: int
) -> None:
    tensor = random_tensor(Format.parse(name), num_rows, num_cols)
    arrays = pack_quantised("tiles", tensor)
    assert np.array_equal(arrays["q"], naive_q(tensor))
    assert np.array_equal(arrays["scale"], naive_groups(tensor.scale_NG))
    if tensor.min_NG is not None:
        assert np.array_equal(arrays["min"], naive_groups(tensor.min_NG))


@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dense_number_and_padding_lies_where_the_layout_says(
    name: str, num_rows: int, num_cols: int
) -> None:
    x_NK = random_dense(name, num_rows, num_cols)
    assert np.array_equal(pack_dense("tiles", x_NK)["data"], naive_dense(x_NK))


@pytest.mark.parametrize("name", ["bfloat16", "int4-g32-min"])
def test_tiles_are_packed_and_unpacked_in_any_number(name: str) -> None:
    fmt = Format.parse(name)
    if fmt.is_dense:
        x_NK = random_dense(name, 70, 45)
        whole, part = pack_dense("tiles", x_NK), pack_dense("tiles", x_NK[32:64])
        values_NK = to_float32(x_NK)
    else:
        x = random_tensor(fmt, 70, 45)
        assert x.min_NG is not None
        rows = slice(32, 64)
        whole = pack_quantised("tiles", x)
        part = pack_quantised(
            "tiles", QuantTensor(fmt, x.q_NK[rows], x.scale_NG[rows], x.min_NG[rows])
        )
        values_NK = x.dequantize()
    for suffix, array in part.items():
        assert np.array_equal(whole[suffix][2:4], array)
    last = {suffix: array[3:] for suffix, array in whole.items()}
    assert np.array_equal(to_dense("tiles", last, fmt, 22, 45), values_NK[48:])


@pytest.mark.parametrize(("num_rows", "num_cols"), [*SHAPES, (32, 64), (33, 128), (2, 129)])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rows_are_the_matrix_with_zeros_to_whole_cache_lines_and_tiles(
    name: str, num_rows: int, num_cols: int
) -> None:
    x_NK = random_dense(name, num_rows, num_cols)
    arrays, fmt = pack_dense("rows", x_NK), Format.dense(name)
    padded_NK = np.zeros((-(-num_rows // 16) * 16, -(-num_cols // 64) * 64), DTYPES[name])
    padded_NK[:num_rows, :num_cols] = x_NK
    assert arrays.keys() == {"data"} and arrays["data"].flags.c_contiguous
    assert array_specs("rows", fmt, num_rows, num_cols) == {
        "data": (padded_NK.dtype, padded_NK.shape)
    }
    assert arrays["data"].dtype == padded_NK.dtype
    assert np.array_equal(arrays["data"], padded_NK)
    assert np.array_equal(unpack_dense("rows", arrays, num_rows, num_cols), x_NK)
    dense_NK = to_dense("rows", arrays, fmt, num_rows, num_cols)
    assert dense_NK.dtype == np.float32 and np.array_equal(dense_NK, to_float32(x_NK))


def test_rows_that_are_whole_already_are_not_copied() -> None:
    x_NK = random_dense("float16", 32, 128)
    assert pack_dense("rows", x_NK)["data"] is x_NK


def test_tiles_of_rows_are_packed_in_any_number() -> None:
    x_NK = random_dense("bfloat16", 70, 45)
    whole, part = pack_dense("rows", x_NK)["data"], pack_dense("rows", x_NK[32:64])["data"]
    unit = axis_rows("rows")
    assert (axis_rows("tiles"), unit) == (16, 1)
    assert np.array_equal(whole[32 // unit : 64 // unit], part)


@pytest.mark.parametrize("name", ["float32", "int8", "int4-g32-min"])
def test_rows_hold_halves_only(name: str) -> None:
    fmt = Format.parse(name)
    with pytest.raises(EngineError, match=f"float16 and bfloat16, not {name}"):
        array_specs("rows", fmt, 16, 64)
    if not fmt.is_dense:
        with pytest.raises(EngineError, match=f"not {name}"):
            pack_quantised("rows", random_tensor(fmt, 16, 64))


def test_unknown_layouts_are_refused() -> None:
    assert (check_layout("tiles"), check_layout("rows")) == ("tiles", "rows")
    with pytest.raises(EngineError, match=r"columns.*reads tiles, rows: rebuild"):
        check_layout("columns")
