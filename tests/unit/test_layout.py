"""Packed arrays: bit-exact there and back, and exactly as large as declared."""

from __future__ import annotations

import numpy as np
import pytest

from puna.errors import EngineError
from puna.layout import array_specs, check_layout, pack_rows, to_dense, unpack_rows
from puna.quant import DTYPES, Format, QuantTensor

QUANTISED = ["int8", "int8-g32", "int8-g32-min", "int8-g16-f32", "int4", "int4-g32"]
QUANTISED += ["int4-g32-min", "int4-g32-min-f32", "int4-g128"]


def random_tensor(fmt: Format, num_rows: int, num_cols: int) -> QuantTensor:
    """Every value of the range occurs, the smallest too."""
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


@pytest.mark.parametrize("num_cols", [1, 2, 31, 32, 33, 172])
@pytest.mark.parametrize("name", QUANTISED)
def test_pack_and_unpack_are_inverse(name: str, num_cols: int) -> None:
    fmt = Format.parse(name)
    tensor = random_tensor(fmt, 5, num_cols)
    arrays = pack_rows(tensor)
    specs = array_specs(fmt, 5, num_cols)
    assert {key: (array.dtype, array.shape) for key, array in arrays.items()} == specs
    assert list(arrays) == list(specs), "file order"
    back = unpack_rows(arrays, fmt, num_cols)
    assert back.q_NK.dtype == tensor.q_NK.dtype
    assert np.array_equal(back.q_NK, tensor.q_NK)
    assert np.array_equal(back.scale_NG, tensor.scale_NG)
    assert (back.min_NG is None) == (tensor.min_NG is None)
    assert back.min_NG is None or np.array_equal(back.min_NG, tensor.min_NG)
    assert np.array_equal(to_dense(arrays, fmt, num_cols), tensor.dequantize())


def test_four_bits_keep_the_even_column_low_and_signed_values_offset_by_eight() -> None:
    fmt = Format.parse("int4")
    q_NK = np.array([[-8, 7, 1]], np.int8)
    packed = pack_rows(QuantTensor(fmt, q_NK, np.ones((1, 1), np.float32)))["q"]
    assert packed.tolist() == [[0 | 15 << 4, 9]]


@pytest.mark.parametrize("name", DTYPES)
def test_dense_rows_are_as_numpy_keeps_them(name: str) -> None:
    fmt = Format.dense(name)
    assert array_specs(fmt, 3, 7) == {"data": (DTYPES[name], (3, 7))}
    x_NK = np.arange(21).reshape(3, 7).astype(DTYPES[name])
    assert np.array_equal(to_dense({"data": x_NK}, fmt, 7), np.arange(21).reshape(3, 7))


def test_unknown_layouts_are_refused() -> None:
    check_layout("rows")
    with pytest.raises(EngineError, match=r"tiles16.*rebuild"):
        check_layout("tiles16")
