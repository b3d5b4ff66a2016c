"""GPTQ, AWQ and pack-quantized checkpoints: their own integers and scales, on any slice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import SPEC, hf_name, tiny_weights
from quantised_writers import (
    Array,
    How,
    Layer,
    gptq_tensors,
    layer_tensors,
    quantise,
    write_quantised,
)

from puna.builder import check_tensors
from puna.checkpoint import FULL, open_checkpoint
from puna.checkpoint.hf_quant import quantised_linear
from puna.checkpoint.hf_quant_config import Quantisation
from puna.checkpoint.packed_ints import PackedInts
from puna.checkpoint.stored import DenseTensor
from puna.quant import QuantTensor

Q, OUT, DOWN = (f"layers.0.{name}.weight" for name in ("attn.q", "attn.o", "mlp.down"))
STEM = hf_name(Q).removesuffix(".weight")
LABELS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}


def expected(layer: Layer, name: str) -> QuantTensor:
    """What puna's format means, from the writer's integers."""
    from puna.quant import Format

    fmt = Format.parse(name)
    scale_NG = layer.scale_NG.astype(np.float16 if fmt.scale_dtype == "float16" else np.float32)
    if not fmt.has_min:
        q_NK = (layer.q_NK - 2 ** (layer.bits - 1)).astype(np.int8)
        return QuantTensor(fmt, q_NK, scale_NG)
    min_NG = -(layer.scale_NG.astype(np.float64) * layer.zero_NG)
    return QuantTensor(fmt, layer.q_NK.astype(np.uint8), scale_NG, min_NG.astype(np.float32))


def assert_same(found: QuantTensor, wanted: QuantTensor) -> None:
    assert found.format == wanted.format
    assert np.array_equal(found.q_NK, wanted.q_NK)
    assert found.scale_NG.dtype == wanted.scale_NG.dtype
    assert np.array_equal(found.scale_NG, wanted.scale_NG)
    assert (found.min_NG is None) == (wanted.min_NG is None)
    if found.min_NG is not None and wanted.min_NG is not None:
        assert found.min_NG.dtype == wanted.min_NG.dtype
        assert np.array_equal(found.min_NG, wanted.min_NG)


def opened(tmp_path: Path, how: How, **options: Any) -> tuple[Any, dict[str, Layer]]:
    layers = write_quantised(tmp_path, tiny_weights(np.float16), how, **options)
    return open_checkpoint(str(tmp_path)), layers


FORMS = {
    "int4-g32": How(),
    "int8-g32": How(bits=8),
    "int4-g32-min-f32": How(is_symmetric=False),
    "int8-g32-min-f32": How(bits=8, is_symmetric=False),
    "int4": How(group_size=-1),
    "int8": How(bits=8, group_size=-1),
    "int4-min": How(group_size=-1, is_symmetric=False),
    "int4-g16": How(group_size=16),
}


METHODS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
# AutoAWQ writes four bits only.
WRITTEN = [(n, m) for n in FORMS for m in METHODS if m != "awq" or FORMS[n].bits == 4]


@pytest.mark.parametrize(("name", "method"), WRITTEN)
def test_integers_scales_and_values_are_the_files(name: str, method: str, tmp_path: Path) -> None:
    how = replace(FORMS[name], method=method.removesuffix("_v2"), is_v2=method == "gptq_v2")
    found, layers = opened(tmp_path, how)
    assert found.notes() == ()
    check_tensors(found)
    assert len(layers) == 7 * SPEC.num_layers
    for layer_name, layer in layers.items():
        assert found.format(layer_name).name == name
        wanted = expected(layer, name)
        assert_same(found.load_quantized(layer_name), wanted)
        values = found.load(layer_name)
        assert values.dtype == np.float32
        assert np.array_equal(values, layer.values())
        assert np.array_equal(values, wanted.dequantize())  # exact, with a minimum as well
    assert found.format("embed.weight").name == "float16"
    assert np.array_equal(found.load("norm.weight"), tiny_weights(np.float16)["norm.weight"])


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("group_size", [16, -1])
def test_slices(method: str, group_size: int, tmp_path: Path) -> None:
    found, layers = opened(tmp_path, How(method, 4, group_size, is_symmetric=False))
    name = found.format(DOWN).name
    whole, values = expected(layers[DOWN], name), layers[DOWN].values()
    num_rows, num_cols = values.shape
    rng = np.random.default_rng(0)
    for _ in range(30):
        r0, r1 = sorted(rng.integers(0, num_rows + 1, 2).tolist())
        c0, c1 = sorted(rng.integers(0, num_cols + 1, 2).tolist())
        rows, cols = slice(r0, r1), slice(c0, c1)
        assert np.array_equal(found.load(DOWN, rows, cols), values[rows, cols])
        if group_size > 0:
            cols = slice(c0 // 16 * 16, c1 // 16 * 16)
            groups = slice(c0 // 16, c1 // 16)
        else:
            groups = slice(0, 1)
        assert whole.min_NG is not None
        assert_same(
            found.load_quantized(DOWN, rows, cols),
            replace(
                whole,
                q_NK=whole.q_NK[rows, cols],
                scale_NG=whole.scale_NG[rows, groups],
                min_NG=whole.min_NG[rows, groups],
            ),
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_of_nought_borrows_in_version_1(bits: int, tmp_path: Path) -> None:
    """-1 in a word of unsigned fields: the whole word is what is subtracted from and added to."""
    layer = quantise(np.abs(tiny_weights()[Q]), How(bits=bits, is_symmetric=False))
    assert (layer.zero_NG == 0).all()
    layer.zero_NG[::3] = 2**bits - 1
    linear = quantised_linear(
        "x", stored(gptq_tensors(layer)), Quantisation("gptq", bits, 32, is_v1=True)
    )
    assert np.array_equal(linear.load(FULL, FULL), layer.values())


def test_symmetry_is_seen_in_the_tensors(tmp_path: Path) -> None:
    """Not believed from the config: one odd zero makes a minimum."""

    def change(tensors: dict[str, Array]) -> None:
        tensors[f"{STEM}.qzeros"].view(np.uint32)[-1, -1] += np.uint32(1 << 28)

    found, layers = opened(tmp_path, How(), change=change)
    assert (found.format(Q).name, found.format(OUT).name) == ("int4-g32-min-f32", "int4-g32")
    layers[Q].zero_NG[-1, -1] += 1
    assert np.array_equal(found.load(Q), layers[Q].values())


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
def test_act_order_is_dequantised(method: str, scale: str, tmp_path: Path) -> None:
    how = How(method, is_act_order=True, is_symmetric=False, scale=scale)
    found, layers = opened(tmp_path, how)
    assert found.notes() == (
        "14 layers quantised in act order have no exact form in puna: dequantised to " + scale,
    )
    for name, layer in layers.items():
        assert found.format(name).name == scale
        wanted = layer.values()
        assert np.array_equal(found.load(name), wanted)
        assert np.array_equal(found.load(name, slice(3, 17), slice(5, 41)), wanted[3:17, 5:41])


def test_act_order_of_one_group_is_no_order(tmp_path: Path) -> None:
    found, layers = opened(tmp_path, How(group_size=-1, is_act_order=True))
    assert found.notes() == () and found.format(Q).name == "int4"
    assert_same(found.load_quantized(Q), expected(layers[Q], "int4"))


def test_group_indices_of_minus_one_are_none(tmp_path: Path) -> None:
    """compressed-tensors' initial value, which stays where there is no act order."""

    def change(tensors: dict[str, Array]) -> None:
        for name in [n for n in tensors if n.endswith(".weight_shape")]:
            num_cols = tensors[name][1]
            tensors[name.replace("shape", "g_idx")] = np.full(num_cols, -1, np.int32)

    found, layers = opened(tmp_path, How("compressed-tensors"), change=change)
    assert found.notes() == ()
    assert_same(found.load_quantized(DOWN), expected(layers[DOWN], "int4-g32"))


def test_groups_that_no_backend_has_are_dequantised(tmp_path: Path) -> None:
    found, layers = opened(tmp_path, How(group_size=8))
    assert found.notes()[0].startswith("14 layers quantised in groups of 8 have no exact form")
    assert np.array_equal(found.load(DOWN), layers[DOWN].values())


@pytest.mark.parametrize("scale", ["bfloat16", "float32"])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_wider_scales_are_kept(scale: str, is_symmetric: bool, tmp_path: Path) -> None:
    how = How("compressed-tensors", 8, 32, is_symmetric, scale=scale)
    found, layers = opened(tmp_path, how)
    name = "int8-g32-f32" if is_symmetric else "int8-g32-min-f32"
    assert found.format(OUT).name == name
    assert_same(found.load_quantized(OUT), expected(layers[OUT], name))
    np.testing.assert_allclose(found.load(OUT), layers[OUT].values(), rtol=1e-7, atol=0)


def stored(tensors: dict[str, Array]) -> dict[str, DenseTensor]:
    return {n: DenseTensor((a,), LABELS[a.dtype.name]) for n, a in tensors.items()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(33, 65), (1, 16), (7, 100), (40, 41)])
@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_odd_sizes(method: str, shape: tuple[int, int], bits: int) -> None:
    """Words that are not full, and a last group that is short."""
    how = How(method, bits, 16, is_symmetric=False)
    layer = quantise(np.random.default_rng(1).standard_normal(shape).astype(np.float32), how)
    said = Quantisation(method, bits, 16, is_v1=True)
    linear = quantised_linear("x", stored(layer_tensors(layer, how)), said)
    assert linear.shape == shape
    assert np.array_equal(linear.load(FULL, FULL), layer.values())
    if shape[1] > 16:
        found = linear.load_quantized(slice(1, None), slice(16, None))
        assert np.array_equal(found.q_NK, layer.q_NK[1:, 16:])
        assert np.array_equal(found.scale_NG, layer.scale_NG[1:, 1:])
        end = slice(shape[1], shape[1])  # a rank that has only padding
        assert linear.load_quantized(FULL, end).scale_NG.shape == (shape[0], 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("added", [0, 5])
@pytest.mark.parametrize("size", [3, 8, 21])
def test_numbers_that_are_all_the_same(bits: int, added: int, size: int) -> None:
    a_word = 32 // bits
    numbers = np.full((3, size), 6, np.int64)
    words = np.zeros((3, -(-size // a_word)), np.uint32)
    for k in range(size):
        words[:, k // a_word] |= numbers[:, k].astype(np.uint32) << np.uint32(k % a_word * bits)
    packed = PackedInts(words - np.uint32(added), bits, size, added=added)
    assert packed.holds_only(6) and not packed.holds_only(7)
    assert np.array_equal(packed.unpack(FULL, FULL), numbers)
    words[1, -1] ^= np.uint32(1 << (size - 1) % a_word * bits)
    assert not PackedInts(words - np.uint32(added), bits, size, added=added).holds_only(6)
