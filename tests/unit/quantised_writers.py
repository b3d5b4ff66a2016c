"""Writes GPTQ, AWQ and pack-quantized checkpoints, naively from their published formulas.

Knows the forms from the writers' side, never through puna. A layer is w[n, k] = scale[n, g] *
(q[n, k] - zero[n, g]) with unsigned q and zero, and g the group of column k.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoint_writers import hf_config, hf_name, to_torch

Array = np.ndarray[Any, np.dtype[Any]]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclass(frozen=True)
class Layer:
    """A quantised linear layer, unpacked. `groups_K`: the group of each column."""

    bits: int
    q_NK: Array
    zero_NG: Array
    scale_NG: Array
    groups_K: Array

    def values(self) -> Array:
        """float64 [N, K], exact."""
        scale_NK = self.scale_NG.astype(np.float64)[:, self.groups_K]
        return scale_NK * (self.q_NK.astype(np.int64) - self.zero_NG[:, self.groups_K])


@dataclass(frozen=True)
class How:
    """How to quantise: `group_size` -1 is one group a row."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    is_symmetric: bool = True
    is_act_order: bool = False
    is_v2: bool = False
    scale: str = "float16"


def quantise(x_NK: Array, how: How, seed: int = 0) -> Layer:
    """Round to nearest within each group; zeros and scales are what the values need."""
    num_rows, num_cols = x_NK.shape
    size = num_cols if how.group_size == -1 else how.group_size
    groups_K = np.arange(num_cols) // size
    if how.is_act_order:
        groups_K = np.random.default_rng(seed).permutation(groups_K)
    largest, middle = 2**how.bits - 1, 2 ** (how.bits - 1)
    num_groups = int(groups_K.max()) + 1
    scale_NG = np.zeros((num_rows, num_groups), FLOATS[how.scale])
    zero_NG = np.full((num_rows, num_groups), middle, np.int64)
    q_NK = np.zeros((num_rows, num_cols), np.int64)
    for g in range(num_groups):
        x = x_NK[:, groups_K == g].astype(np.float64)
        low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 1e-6)
        spread = 2 * np.maximum(-low, high) if how.is_symmetric else high - low
        scale_NG[:, g] = spread / largest
        scale = scale_NG[:, g].astype(np.float64)
        if not how.is_symmetric:
            zero_NG[:, g] = np.clip(np.rint(-low / scale), 0, largest)
        q = np.rint(x / scale[:, None]) + zero_NG[:, g, None]
        q_NK[:, groups_K == g] = np.clip(q, 0, largest)
    return Layer(how.bits, q_NK, zero_NG, scale_NG, groups_K)


def pack(numbers: Array, bits: int, order: tuple[int, ...] = ()) -> Array:
    """int32 [L, ceil(size * bits / 32)]: the numbers of each line, the first in the lowest bits."""
    a_word = 32 // bits
    out = np.zeros((len(numbers), -(-numbers.shape[1] // a_word)), np.uint64)
    for at in range(out.shape[1]):
        for field in range(a_word):
            column = at * a_word + (order[field] if order else field)
            if column < numbers.shape[1]:
                out[:, at] |= numbers[:, column].astype(np.uint64) << np.uint64(bits * field)
    return out.astype(np.uint32).view(np.int32)


def gptq_tensors(layer: Layer, is_v2: bool = False) -> dict[str, Array]:
    """qweight is packed along inputs, qzeros along outputs. Version 1 takes one from every zero of
    a word at once: a zero of 0 borrows from the next one."""
    words = pack(layer.zero_NG.T, layer.bits).view(np.uint32)
    if not is_v2:
        words = words - np.uint32(0x11111111 if layer.bits == 4 else 0x01010101)
    return {
        "qweight": np.ascontiguousarray(pack(layer.q_NK, layer.bits).T),
        "qzeros": words.view(np.int32),
        "scales": np.ascontiguousarray(layer.scale_NG.T),
        "g_idx": layer.groups_K.astype(np.int32),
    }


def awq_tensors(layer: Layer) -> dict[str, Array]:
    return {
        "qweight": pack(layer.q_NK.T, 4, AWQ_ORDER),
        "qzeros": pack(layer.zero_NG.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(layer.scale_NG.T),
    }


def compressed_tensors(layer: Layer, how: How) -> dict[str, Array]:
    """Signed numbers plus 2^(bits - 1), which is where the unsigned ones are already."""
    tensors = {
        "weight_packed": pack(layer.q_NK, layer.bits),
        "weight_scale": layer.scale_NG,
        "weight_shape": np.array(layer.q_NK.shape, np.int64),
    }
    if not how.is_symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(layer.zero_NG.T, layer.bits).T)
    if how.is_act_order:
        tensors["weight_g_idx"] = layer.groups_K.astype(np.int32)
    return tensors


def layer_tensors(layer: Layer, how: How) -> dict[str, Array]:
    if how.method == "gptq":
        return gptq_tensors(layer, how.is_v2)
    return awq_tensors(layer) if how.method == "awq" else compressed_tensors(layer, how)


def quantization_config(how: How) -> dict[str, Any]:
    """What the tools write into config.json."""
    if how.method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": how.bits,
            "group_size": how.group_size,
            "desc_act": how.is_act_order,
            "sym": how.is_symmetric,
            "checkpoint_format": "gptq_v2" if how.is_v2 else "gptq",
        }
    if how.method == "awq":
        return {
            "quant_method": "awq",
            "bits": how.bits,
            "group_size": how.group_size,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    weights = {"num_bits": how.bits, "type": "int", "symmetric": how.is_symmetric}
    weights["actorder"] = "group" if how.is_act_order else None
    by_group = {"strategy": "group", "group_size": how.group_size}
    weights |= {"strategy": "channel", "group_size": None} if how.group_size == -1 else by_group
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def quantised_layers(weights: dict[str, Array], how: How) -> dict[str, Layer]:
    """Every linear layer of the decoder, by canonical name of its weight."""
    linear = [name for name, array in weights.items() if is_linear(name) and array.ndim == 2]
    return {name: quantise(weights[name], how, i) for i, name in enumerate(linear)}


def is_linear(name: str) -> bool:
    return name.startswith("layers.")


def tensors_of(weights: dict[str, Array], layers: dict[str, Layer], how: How) -> dict[str, Array]:
    """All tensors of a checkpoint by Hugging Face name: `layers` quantised, the rest dense."""
    out = {hf_name(name): array for name, array in weights.items() if name not in layers}
    for name, layer in layers.items():
        stem = hf_name(name).removesuffix(".weight")
        out |= {f"{stem}.{last}": array for last, array in layer_tensors(layer, how).items()}
    return out


def save(path: Path, tensors: dict[str, Array]) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(tensors, path)
    else:
        import torch

        torch.save({name: to_torch(array) for name, array in tensors.items()}, path)
    return path


def write_quantised(
    directory: Path,
    weights: dict[str, Array],
    how: How,
    change: Callable[[dict[str, Array]], None] = lambda tensors: None,
    file: str = "model.safetensors",
    **changes: Any,
) -> dict[str, Layer]:
    """A checkpoint of checkpoint_writers.SPEC; `change` edits its tensors, `changes` its config."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = quantised_layers(weights, how)
    tensors = tensors_of(weights, layers, how)
    change(tensors)
    config = hf_config(**{"quantization_config": quantization_config(how), **changes})
    (directory / "config.json").write_text(json.dumps(config))
    save(directory / file, tensors)
    return layers
