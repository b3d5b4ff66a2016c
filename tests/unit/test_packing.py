"""Packing and quantising in C++ is packing and quantising in NumPy, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest

import puna.layout
import puna.quant
from puna.layout import pack_dense, pack_quantised
from puna.native.library import find_library
from puna.native.packing import find_packer
from puna.quant import DTYPES, Array, Format, QuantTensor, quantize

pytestmark = pytest.mark.skipif(find_library() is None, reason="needs the native library")

Result = TypeVar("Result")
Both = Callable[[Callable[[], Result]], tuple[Result, Result]]
# Around tiles of 16 rows, words of 2, 4 and 8 columns, padding to 32, and groups of up to 128.
SHAPES = [(1, 1), (1, 2), (16, 32), (17, 33), (37, 50), (50, 37), (64, 128), (33, 101), (5, 4100)]
SYMMETRIC = ["int8", "int8-g16", "int8-g32", "int8-g32-f32", "int8-g48", "int4", "int4-g16"]
SYMMETRIC += ["int4-g32", "int4-g128", "int4-g32-f32"]
WITH_MIN = ["int8-min", "int8-g32-min", "int4-g32-min", "int4-g16-min", "int4-g32-min-f32"]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both[Result]:
    """both(compute): its result with the native library, and without."""
    packer = find_packer()
    assert packer is not None

    def compute(function: Callable[[], Result]) -> tuple[Result, Result]:
        results = []
        for found in (packer, None):
            for module in (puna.layout, puna.quant):
                monkeypatch.setattr(module, "find_packer", lambda found=found: found)
            results.append(function())
        return results[0], results[1]

    return compute


def uneven(num_rows: int, num_cols: int, seed: int = 0) -> Array:
    """Rows of zeros (also -0), tiny, usual and large numbers, ties between integers among them."""
    rng = np.random.default_rng(seed)
    size = rng.choice(np.float32([0, -0.0, 1e-8, 1e-4, 1, 300]), (num_rows, 1))
    x_NK = size * rng.standard_normal((num_rows, num_cols)).astype(np.float32)
    x_NK[-1] = rng.integers(-254, 255, num_cols) / 2  # with a scale of 1: halves are ties
    x_NK[-1, rng.integers(num_cols)] = 127
    return x_NK.astype(np.float32)


def same(found: Array, expected: Array) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.flags.c_contiguous and found.tobytes() == expected.tobytes()


def same_arrays(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert list(found) == list(expected)
    for suffix, array in expected.items():
        same(found[suffix], array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
def test_dense(dtype: str, num_rows: int, num_cols: int, both: Both[dict[str, Array]]) -> None:
    x_NK = uneven(num_rows, num_cols).astype(DTYPES[dtype])
    same_arrays(*both(lambda: pack_dense("tiles", x_NK)))


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
def test_quantising_and_packing(name: str, num_rows: int, num_cols: int, both: Both) -> None:
    x_NK, fmt = uneven(num_rows, num_cols), Format.parse(name)
    found, expected = both(lambda: quantize(x_NK, fmt))
    same(found.q_NK, expected.q_NK)
    same(found.scale_NG, expected.scale_NG)
    same_arrays(*both(lambda: pack_quantised("tiles", expected)))


@pytest.mark.parametrize("name", WITH_MIN)
@pytest.mark.parametrize(("num_rows", "num_cols"), SHAPES)
def test_blocks_with_a_minimum(name: str, num_rows: int, num_cols: int, both: Both) -> None:
    rng, fmt = np.random.default_rng(num_cols), Format.parse(name)
    groups = (2, num_rows, fmt.num_groups(num_cols))
    scale_NG, min_NG = rng.standard_normal(groups).astype(DTYPES[fmt.scale_dtype])
    q_NK = rng.integers(0, fmt.q_range[1] + 1, (num_rows, num_cols)).astype(np.uint8)
    tensor = QuantTensor(fmt, q_NK, scale_NG, min_NG)
    same_arrays(*both(lambda: pack_quantised("tiles", tensor)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_every_dtype_and_any_strides(dtype: str, both: Both) -> None:
    wide_NK = uneven(40, 90).astype(DTYPES[dtype])
    for x_NK in (wide_NK, wide_NK[::2, 1::3], wide_NK[:, ::-1], wide_NK.T):
        for fmt in (Format.parse("int8"), Format.parse("int4-g32")):
            found, expected = both(lambda x=x_NK, fmt=fmt: quantize(x, fmt))
            same(found.q_NK, expected.q_NK)
            same(found.scale_NG, expected.scale_NG)
        same_arrays(*both(lambda x=x_NK: pack_dense("tiles", x)))


@pytest.mark.parametrize("name", ["int8", "int8-g32", "int4-g32", "int4-g128"])
def test_quantising_the_ends_of_the_range(name: str, both: Both) -> None:
    """Denormal numbers, scales that round to nothing in float16, and large numbers."""
    x_NK = np.resize(np.float32([1e-45, -1e-40, 1e-7, 2e-8, -3e-6, 6e-8, 0, -0.0]), (20, 50))
    x_NK = x_NK * np.float32(2) ** np.arange(0, 20, dtype=np.float32)[:, None]
    is_half = Format.parse(name).scale_dtype == "float16"
    x_NK[-1, 3] = 4e5 if is_half else 3e38
    found, expected = both(lambda: quantize(x_NK, Format.parse(name)))
    same(found.q_NK, expected.q_NK)
    same(found.scale_NG, expected.scale_NG)
