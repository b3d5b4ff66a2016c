"""Formats and the arithmetic between floats and integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.quant import (
    DTYPES,
    Format,
    QuantTensor,
    all_finite,
    quantize,
    spread_groups,
    to_float32,
)

# Every format that some checkpoint or option leads to.
NAMES = [
    *DTYPES,
    "int8",
    "int8-g32",
    "int8-g32-min",
    "int8-g32-min-f32",
    "int8-g16-f32",
    "int4",
    "int4-g32",
    "int4-g128",
    "int4-g32-min",
    "int4-g32-min-f32",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name: str) -> None:
    assert Format.parse(name).name == name


@given(st.sampled_from([4, 8]), st.integers(0, 300), st.booleans(), st.sampled_from([16, 32]))
def test_every_quantised_format_has_a_name_of_its_own(
    bits: int, group_size: int, has_min: bool, scale_bits: int
) -> None:
    fmt = Format("", bits, group_size, has_min, f"float{scale_bits}")
    if not group_size and scale_bits == 16:
        return  # a scale per channel is always float32
    assert Format.parse(fmt.name) == fmt


@pytest.mark.parametrize(
    "name", ["", "int3", "int8-g0", "int8-g032", "int4-min-g32", "int8-f32", "fp8", "int8-g32-"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown weight format"):
        Format.parse(name)


@pytest.mark.parametrize("num_cols", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("name", ["int8", "int8-g32", "int8-g16-f32", "int4", "int4-g32"])
def test_rounding_error_is_at_most_half_a_step(name: str, num_cols: int) -> None:
    fmt, rng = Format.parse(name), np.random.default_rng(0)
    x_NK = (rng.standard_normal((13, num_cols)) * rng.uniform(0.01, 10, (13, 1))).astype(np.float32)
    x_NK[3] = 0
    tensor = quantize(x_NK, fmt)
    low, high = fmt.q_range
    assert tensor.q_NK.min() > low and tensor.q_NK.max() <= high, "symmetric: -high to high"
    assert tensor.scale_NG.dtype == DTYPES[fmt.scale_dtype]
    scale_NK = np.broadcast_to(spread_groups(tensor.scale_NG, fmt, num_cols), x_NK.shape)
    # A scale rounded down by 2^-11 cuts the largest weight by that much.
    slack = np.abs(x_NK) * 2.0**-11 if fmt.scale_dtype == "float16" else 0
    error = np.abs(x_NK - tensor.dequantize())
    assert (error <= scale_NK / 2 * (1 + 1e-5) + slack).all()
    assert not tensor.dequantize()[3].any()


def test_the_largest_weight_of_a_group_uses_the_whole_range() -> None:
    x_NK = np.zeros((2, 64), np.float32)
    x_NK[0, 5], x_NK[0, 40], x_NK[1, 63] = -2.0, 0.5, 127.0
    tensor = quantize(x_NK, Format.parse("int8-g32"))
    assert tensor.q_NK[0, 5] == -127 and tensor.q_NK[0, 40] == 127 and tensor.q_NK[1, 63] == 127


def test_quantising_what_was_quantised_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    for name in ("int8", "int4"):
        fmt = Format.parse(name)
        once = quantize(rng.standard_normal((9, 50)).astype(np.float32), fmt)
        twice = quantize(once.dequantize(), fmt)
        assert np.array_equal(once.q_NK, twice.q_NK)


def test_tiny_weights_become_zero_and_not_nan() -> None:
    """A group whose scale is below float16 has scale 0."""
    x_NK = np.full((1, 32), 1e-9, np.float32)
    tensor = quantize(x_NK, Format.parse("int8-g32"))
    assert not tensor.scale_NG.any() and not tensor.dequantize().any()


def test_dequantize_is_scale_times_q_plus_min() -> None:
    fmt = Format.parse("int4-g32-min")
    q_NK = np.arange(48, dtype=np.uint8).reshape(1, 48) % 16
    scale_NG, min_NG = np.array([[0.5, 2]], np.float16), np.array([[-1, 3]], np.float16)
    found = QuantTensor(fmt, q_NK, scale_NG, min_NG).dequantize()
    q_K = q_NK[0].astype(np.float64)
    expected = np.concatenate([q_K[:32] * 0.5 - 1, q_K[32:] * 2 + 3])
    assert np.array_equal(found[0], expected)


def test_formats_with_a_minimum_or_dense_are_not_quantised_to() -> None:
    x_NK = np.ones((1, 32), np.float32)
    with pytest.raises(ConfigError, match="does not quantise"):
        quantize(x_NK, Format.parse("int4-g32-min"))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50), st.sampled_from(list(DTYPES)))
def test_to_float32_and_all_finite_agree_with_numpy(bits: list[int], name: str) -> None:
    if name == "float32":
        x = (np.array(bits, np.uint32) << 16).view(np.float32)
    else:
        x = np.array(bits, np.uint16).view(DTYPES[name])
    wide = to_float32(x)
    assert wide.dtype == np.float32
    assert np.array_equal(wide, x.astype(np.float32), equal_nan=True)
    assert all_finite(x) == bool(np.isfinite(x.astype(np.float32)).all())
