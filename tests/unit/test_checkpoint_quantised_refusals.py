"""Quantised checkpoints that puna refuses: other methods and forms, layers that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import hf_name, tiny_weights, write_hf
from quantised_writers import Array, How, write_quantised

from puna.builder import check_tensors
from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.hf import open_quantised
from puna.errors import CheckpointError

STEM = hf_name("layers.0.attn.q.weight").removesuffix(".weight")


def opened(tmp_path: Path, how: How, **options: Any) -> Checkpoint:
    write_quantised(tmp_path, tiny_weights(np.float16), how, **options)
    return open_checkpoint(str(tmp_path))


def test_open_quantised_refusals(tmp_path: Path) -> None:
    model_dir = write_hf(tmp_path / "model", tiny_weights())
    with pytest.raises(CheckpointError, match="given has no quantised layers; needed"):
        open_quantised(model_dir / "model.safetensors", model_dir, "given")
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        open_quantised(tmp_path / "nothing", model_dir, "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights; needed one of"):
        open_quantised(tmp_path / "empty", model_dir, "x")


GROUP = {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quantised ('fp8'), which puna does not read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised ('bitsandbytes')"),
        ({"quant_algo": "FP8"}, "quantised ('fp8')"),
        ({}, "of unknown method"),
        ({"quant_method": 4}, "quant_method is 4; it must be a string"),
        ({"quant_method": "gptq", "bits": 3}, "to 3 bits, puna reads 4 and 8 bits: use such"),
        ({"quant_method": "gptq", "bits": 2}, "to 2 bits, puna reads 4 and 8 bits: use such"),
        ({"quant_method": "gptq", "bits": "4"}, "bits is '4'; it must be a whole number"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0; it must be"),
        ({"bits": 4, "is_marlin_format": True}, "GPTQ weights are in form 'marlin'"),
        ({"bits": 4, "checkpoint_format": "bitblas"}, "form 'bitblas', puna reads gptq or"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ weights are in form 'gemv', puna reads"),
        ({"quant_method": "awq", "version": "marlin"}, "AWQ weights are in form 'marlin'"),
        ({"quant_method": "awq", "bits": 8}, "to 8 bits, puna reads 4 bits"),
        ({"quant_method": "compressed-tensors"}, "in form 'unknown', puna reads pack-quantized"),
        ({**PACKED, "format": "float-quantized"}, "compressed-tensors weights are in form 'float-"),
        (
            {**PACKED, "config_groups": {"g": {**GROUP, "format": "nvfp4-pack-quantized"}}},
            "config_groups: g: compressed-tensors weights are in form 'nvfp4-pack-quantized'",
        ),
        (
            {**PACKED, "config_groups": {"g": {**GROUP, "input_activations": {"num_bits": 8}}}},
            "activations are quantised as well",
        ),
        ({**PACKED, "config_groups": {"g": {"weights": {"num_bits": 3}}}}, "to 3 bits"),
        (
            {**PACKED, "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}},
            "in form 'float', puna reads int",
        ),
        ({**PACKED, "transform_config": {"x": 1}}, "transform_config (rotated weights)"),
    ],
)  # fmt: skip
def test_refused_by_config(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_hf(tmp_path, tiny_weights(), quantization_config=config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    text = str(caught.value)
    assert message in text and text.startswith(f"{tmp_path / 'config.json'}: quantization_config")
    assert text.isprintable()


def replaced(last: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], None]:
    def edit(tensors: dict[str, Array]) -> None:
        name = f"{STEM}.{last}"
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    return edit


def removed(last: str) -> Callable[[dict[str, Array]], None]:
    def edit(tensors: dict[str, Array]) -> None:
        del tensors[f"{STEM}.{last}"]

    return edit


def doubled(tensors: dict[str, Array]) -> None:
    tensors[f"{STEM}.weight"] = np.zeros((64, 64), np.float16)


AWQ, PACK = How("awq"), How("compressed-tensors", is_symmetric=False)
ORDER, PACK_ORDER = How(is_act_order=True), How("compressed-tensors", is_act_order=True)


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        (How(), replaced("qweight", lambda x: x[1:]), "qweight is [7, 64]; the others make it [8,"),
        (How(), replaced("qweight", lambda x: x[:, :-1]), "qweight is [8, 63]"),
        (How(), replaced("qweight", lambda x: x.astype(np.int64)), "type I64; needed 32-bit"),
        (How(), replaced("qweight", lambda x: x[0]), "qweight is [64]; needed 2 axes"),
        (How(), replaced("qzeros", lambda x: x[:, :-1]), "7 words hold 64 numbers, 4 bits make 8"),
        (How(), replaced("qzeros", lambda x: x[:1]), "qzeros is [1, 8]"),
        (How(), replaced("scales", lambda x: x[:1]), "qzeros is [2, 8]; the others make it [1, 8]"),
        (How(), replaced("scales", lambda x: x.astype(np.int32)), "scales has type I32; needed"),
        (How(), replaced("scales", lambda x: x[:, :0]), "scales is [2, 0]; needed 2 axes"),
        (How(), replaced("g_idx", lambda x: x[:-9]), "qweight is [8, 64]; the others make it [7,"),
        (How(), replaced("g_idx", lambda x: x + 1), "g_idx names groups beyond the 2 that have"),
        (How(), replaced("g_idx", lambda x: x - 1), "g_idx names groups beyond"),
        (How(), replaced("g_idx", lambda x: x.astype(np.float32)), "g_idx has type F32; needed"),
        (ORDER, removed("g_idx"), "act order needs g_idx, which is missing"),
        (PACK_ORDER, removed("weight_g_idx"), "act order needs weight_g_idx, which is missing"),
        (How(), removed("scales"), "gptq needs scales, which is missing"),
        (How(), doubled, "self_attn.q_proj is there both quantised and not"),
        (AWQ, replaced("qweight", lambda x: x[:, :-1]), "qweight is [64, 7]; the others make it"),
        (AWQ, replaced("scales", lambda x: x[:, :-1]), "qweight is [64, 8]; the others make it"),
        (AWQ, replaced("qzeros", lambda x: x[:1]), "qzeros is [1, 8]; the others make it [2, 8]"),
        (AWQ, removed("qzeros"), "awq needs qzeros, which is missing"),
        (PACK, replaced("weight_shape", lambda x: x * 2), "8 words hold 128 numbers, 4 bits make"),
        (PACK, replaced("weight_shape", lambda x: x - 64), "weight_shape holds [0, 0]; needed"),
        (PACK, replaced("weight_shape", lambda x: x[:1]), "weight_shape holds [64]; needed rows"),
        (PACK, replaced("weight_scale", lambda x: x[1:]), "weight_scale is [63, 2]; the others"),
        (PACK, replaced("weight_scale", lambda x: x[:, :1]), "1 scales a row for 64 columns in"),
        (PACK, replaced("weight_zero_point", lambda x: x[1:]), "weight_zero_point is [7, 2]"),
        (PACK, removed("weight_shape"), "compressed-tensors needs weight_shape"),
    ],
)  # fmt: skip
def test_damaged_layers(
    how: How, change: Callable[[dict[str, Array]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, how, change=change)
    text = str(caught.value)
    assert message in text and text.isprintable()
    assert text.startswith(f"{tmp_path}: {STEM}")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"group_size": 64}, "groups of 32, not 64"),
        ({"bits": 8}, "8 words hold 64 numbers, 8 bits"),
    ],
)
def test_configs_that_contradict_the_tensors(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, **said}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, How(), quantization_config=config)


def test_three_bits_without_a_config(tmp_path: Path) -> None:
    change = replaced("qzeros", lambda x: x[:, :6])  # 64 numbers of 3 bits
    with pytest.raises(CheckpointError, match="to 3 bits, puna reads 4 and 8 bits"):
        opened(tmp_path, How(), change=change, quantization_config=None)


def test_other_tensors_of_unknown_modules_are_reported(tmp_path: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, np.float32)

    found = opened(tmp_path, How(), change=change)
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.self_attn\.k_scale"):
        check_tensors(found)
