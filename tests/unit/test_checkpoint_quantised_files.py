"""Whole checkpoints with quantised layers: what else is in them, which files, and which config.

The layers themselves: test_checkpoint_quantised.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import hf_config, tiny_weights, write_hf
from quantised_writers import (
    Array,
    How,
    gptq_tensors,
    quantise,
    quantised_layers,
    save,
    tensors_of,
    write_quantised,
)
from test_checkpoint_quantised import DOWN, Q, assert_same, expected, opened

from puna.builder import build, check_tensors, plan_checkpoint
from puna.checkpoint import open_checkpoint
from puna.checkpoint.fields import Fields
from puna.checkpoint.hf import open_quantised
from puna.checkpoint.hf_quant_config import Quantisation, read_quantisation
from puna.errors import CheckpointError, ConfigError
from puna.plan import BuildConfig


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
