"""GPTQ, AWQ and pack-quantized checkpoints: their own integers and scales, on any slice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import SPEC, hf_config, hf_name, tiny_weights, write_hf
from quantised_writers import (
    Array,
    How,
    Layer,
    gptq_tensors,
    layer_tensors,
    quantise,
    quantised_layers,
    save,
    tensors_of,
    write_quantised,
)

from puna.builder import build, check_tensors, plan_checkpoint
from puna.checkpoint import FULL, open_checkpoint
from puna.checkpoint.fields import Fields
from puna.checkpoint.hf import open_quantised
from puna.checkpoint.hf_quant import quantised_linear
from puna.checkpoint.hf_quant_config import Quantisation, read_quantisation
from puna.checkpoint.packed_ints import PackedInts
from puna.checkpoint.stored import DenseTensor
from puna.errors import CheckpointError, ConfigError
from puna.plan import BuildConfig
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


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", FORMS)
def test_integers_scales_and_values_are_the_files(name: str, method: str, tmp_path: Path) -> None:
    how = replace(FORMS[name], method=method.removesuffix("_v2"), is_v2=method == "gptq_v2")
    if how.bits == 8 and method == "awq":
        pytest.skip("AutoAWQ writes four bits only")
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


def add_biases(value: float) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        for name in [n for n in tensors if n.endswith(".scales")]:
            bias = np.zeros(tensors[name].shape[1], np.float16)
            bias[-1] = value
            tensors[name.replace(".scales", ".bias")] = bias

    return change


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    found, _ = opened(tmp_path, How(), change=add_biases(0))
    check_tensors(found)
    assert not any(name.endswith(".bias") for name in found.names())


def test_other_biases_are_reported(tmp_path: Path) -> None:
    found, _ = opened(tmp_path, How(), change=add_biases(0.5))
    with pytest.raises(CheckpointError, match=r"unexpected: layers\.0\.attn\.k\.bias, "):
        check_tensors(found)


def test_biases_that_the_model_has_are_read(tmp_path: Path) -> None:
    found, _ = opened(tmp_path, How(), change=add_biases(0.5), attention_bias=True, mlp_bias=True)
    check_tensors(found)
    assert found.load("layers.1.mlp.down.bias")[-1] == 0.5


def test_layers_that_were_not_converted(tmp_path: Path) -> None:
    weights, how = tiny_weights(np.float16), How("awq")
    layers = quantised_layers(weights, how)
    kept = {name: layer for name, layer in layers.items() if not name.startswith("layers.1.")}
    write_quantised(tmp_path, weights, how)
    save(tmp_path / "model.safetensors", tensors_of(weights, kept, how))
    found = open_checkpoint(str(tmp_path))
    check_tensors(found)
    assert found.format(Q).name == "int4-g32"
    assert found.format("layers.1.attn.q.weight").name == "float16"


def test_quantised_head(tmp_path: Path) -> None:
    weights = tiny_weights(np.float16)
    head = quantise(weights.pop("head.weight"), How())

    def change(tensors: dict[str, Array]) -> None:
        tensors |= {f"lm_head.{last}": array for last, array in gptq_tensors(head).items()}

    write_quantised(tmp_path, weights, How(), change)
    found = open_checkpoint(str(tmp_path))
    check_tensors(found)
    assert np.array_equal(found.load("head.weight"), head.values())
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "head.weight" not in open_checkpoint(str(tmp_path)).names()


def test_tensors_over_several_files_and_in_pytorch_form(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    weights, how = tiny_weights(np.float16), How()
    layers = write_quantised(tmp_path, weights, how)
    (tmp_path / "model.safetensors").unlink()
    tensors = tensors_of(weights, layers, how)
    weight_map = {}
    for i in range(3):
        names = sorted(tensors)[i::3]
        file = f"pytorch_model-{i + 1:05}-of-00003.bin"
        save(tmp_path / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = open_checkpoint(str(tmp_path))
    assert_same(found.load_quantized(DOWN), expected(layers[DOWN], "int4-g32"))


@pytest.mark.parametrize(
    ("how", "name", "config"),
    [
        (How(), "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}),
        (
            How("awq", is_symmetric=False),
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        ),
    ],
)
def test_older_configs_and_file_names(
    how: How, name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    layers = write_quantised(
        tmp_path,
        tiny_weights(np.float16),
        how,
        file="gptq_model-4bit-32g.safetensors",
        quantization_config=None,
    )
    (tmp_path / name).write_text(json.dumps(config))
    found = open_checkpoint(str(tmp_path))
    assert np.array_equal(found.load(Q), layers[Q].values())
    assert found.notes() == ()
    assert {path.name for path in found.files()} == {
        "config.json",
        name,
        "gptq_model-4bit-32g.safetensors",
    }


ANY = [
    How(),
    How(is_symmetric=False),
    How(is_v2=True),
    How(bits=8, group_size=-1, is_symmetric=False),
    How(is_act_order=True),
    How("awq", is_symmetric=False),
    How("awq", group_size=16),
    How("compressed-tensors", is_symmetric=False),
]


@pytest.mark.parametrize("how", ANY)
def test_without_a_config_the_tensors_tell(how: How, tmp_path: Path) -> None:
    found, layers = opened(tmp_path, how, quantization_config=None)
    assert f"no config says how {tmp_path} was quantised: {how.method}" in found.notes()[0]
    for name, layer in layers.items():
        assert np.array_equal(found.load(name), layer.values())


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("is_whole", [True, False])
def test_quantised_weights_beside_the_model(is_file: bool, is_whole: bool, tmp_path: Path) -> None:
    """As `--quant_ckpt_path` gives them: what they lack comes from the model's own directory."""
    weights, how = tiny_weights(np.float16), How()
    model_dir = write_hf(tmp_path / "model", weights)
    (model_dir / "tokenizer.json").write_bytes(b"{}")
    layers = quantised_layers(weights, how)
    tensors = tensors_of(weights, layers, how)
    if not is_whole:
        tensors = {n: a for n, a in tensors.items() if not n.startswith(("lm_head", "model.norm"))}
    folder = tmp_path / "quantised"
    folder.mkdir()
    path = save(folder / "model.safetensors", tensors)
    found = open_quantised(path if is_file else folder, model_dir, "given")
    check_tensors(found)
    assert found.source == "given" and found.tokenizer_files() == {"tokenizer.json": b"{}"}
    assert found.format(DOWN).name == "int4-g32"
    assert np.array_equal(found.load(DOWN), layers[DOWN].values())
    assert np.array_equal(found.load("head.weight"), weights["head.weight"])
    digests = build(found, tmp_path / "engine", tokenizer={}).config.provenance.digests
    files = {"config.json", "model.safetensors"}
    if not is_whole:
        files = {"config.json", "quantised/model.safetensors", "model/model.safetensors"}
    assert set(digests) == files


def test_bits_and_groups_that_differ_by_layer(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`, and several config_groups: the tensors decide."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*": {}}}
    said = read_quantisation(Fields(config, "x"))
    assert said == Quantisation("gptq", is_v1=True)  # neither bits nor groups
    found, layers = opened(tmp_path, How(bits=8), quantization_config=config)
    assert found.format(Q).name == "int8-g32"
    assert np.array_equal(found.load(Q), layers[Q].values())


def test_plan_names_what_the_checkpoint_holds(tmp_path: Path) -> None:
    found, _ = opened(tmp_path, How(is_symmetric=False))
    planned = plan_checkpoint(found, BuildConfig())
    assert planned.quant == "int4-g32-min-f32" and planned.dtype == "float16"
    assert "int4-g32-min-f32, " in planned.resolved["quant"][1]
    assert plan_checkpoint(found, BuildConfig(quant="none")).quant == "none"
    assert plan_checkpoint(found, BuildConfig(quant="int8")).quant == "int8"


def test_tp_that_cuts_a_group_is_refused(tmp_path: Path) -> None:
    """o_proj's inputs are heads; the ffn is padded to whole groups instead."""
    found, _ = opened(tmp_path, How(group_size=32))
    planned = plan_checkpoint(found, BuildConfig(tp_size=2))
    assert planned.ffn_multiple == 32
    with pytest.raises(ConfigError, match=r"tp 4 cuts the checkpoint's int4-g32 .*--quant int8"):
        plan_checkpoint(found, BuildConfig(tp_size=4))
    plan_checkpoint(found, BuildConfig(tp_size=4, quant="none"))


def test_config_alone_is_no_quantisation(tmp_path: Path) -> None:
    """A config may say that nothing was converted; then everything is dense."""
    config = {"quant_method": "gptq", "bits": 4, "modules_to_not_convert": [".*"]}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(quantization_config=config)))
    write_hf(tmp_path, tiny_weights(), quantization_config=config)
    found = open_checkpoint(str(tmp_path))
    check_tensors(found)
    assert found.format(Q).name == "float32"
