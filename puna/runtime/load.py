"""From an engine's files to a model that is ready to be recorded: map or generate, then bind.

Decides where a rank's arrays come from and which of them goes where in `Llama`. Knows no steps.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from puna.dummy import DummyWeights
from puna.engine import EngineConfig
from puna.models.llama.model import Layer, Llama
from puna.ops import LayerCache, Linear, Norm, Ops, RopeTable
from puna.quant import Array
from puna.rank_file import RankFile, RankWeight, check_rank_file, rank_weights
from puna.shard import rank_rows


def map_weights(path: Path, mapped: mmap.mmap, layout: RankFile) -> dict[str, Array]:
    """Arrays over a memory map of the rank's file; two processes share its pages."""
    check_rank_file(path, layout)
    return _views(np.frombuffer(mapped, np.uint8), layout)


def generate_weights(
    config: EngineConfig, rank: int, layout: RankFile, report: Callable[[int], None]
) -> dict[str, Array]:
    """The arrays of a dummy engine, made as the build would have made them."""
    assert config.dummy is not None
    arrays = _views(np.zeros(layout.num_bytes, np.uint8), layout)
    source = DummyWeights(config.spec, config.dummy.seed)
    for weight in rank_weights(config, rank):
        for first, chunk in rank_rows(weight, source):
            for name, values in chunk.items():
                arrays[name][first : first + len(values)] = values
                report(values.nbytes)
    return arrays


def _views(data: Array, layout: RankFile) -> dict[str, Array]:
    return {
        name: data[array.offset : array.offset + array.num_bytes]
        .view(array.dtype)
        .reshape(array.shape)
        for name, array in layout.arrays.items()
    }


def bind_model(
    config: EngineConfig,
    rank: int,
    ops: Ops,
    stored: dict[str, Array],
    arrays: dict[str, Array],
    caches: Sequence[LayerCache],
    report: Callable[[int], None],
) -> Llama:
    """Bind stored weights, KV cache and RoPE tables to the model; `report` is told the bytes.

    `arrays` are the workspace of `puna.memory`, in which the RoPE tables are already computed;
    `caches` are one for each layer here. All are arrays of whatever `ops` computes with.
    """
    spec, mapping = config.spec, config.mapping(rank)
    weights = {weight.name: weight for weight in rank_weights(config, rank)}

    def matrix(weight: RankWeight) -> object:
        prefix = f"{weight.name}."
        parts = {
            name.removeprefix(prefix): array
            for name, array in stored.items()
            if name.startswith(prefix)
        }
        shape = (weight.num_rows, weight.num_cols)
        workspace = arrays.get(f"unpacked.{weight.name}")
        loaded = ops.load_matrix(parts, weight.format.name, shape, workspace)
        report(sum(array.nbytes for array in parts.values()))
        return loaded

    def linear(name: str, *parts: str) -> Linear:
        """The matrices of `parts`, or that of `name`, and the bias of `name`."""
        matrices = tuple(matrix(weights[f"{part}.weight"]) for part in parts or (name,))
        return Linear(matrices, stored.get(f"{name}.bias"))

    def norm(name: str) -> Norm:
        return Norm(stored[f"{name}.weight"], spec.rms_norm_eps)

    def layer(index: int, cache: LayerCache) -> Layer:
        at = f"layers.{index}"
        return Layer(
            attn_norm=norm(f"{at}.attn_norm"),
            qkv=linear(f"{at}.attn.qkv", f"{at}.attn.q", f"{at}.attn.k", f"{at}.attn.v"),
            o=linear(f"{at}.attn.o"),
            mlp_norm=norm(f"{at}.mlp_norm"),
            gate_up=linear(f"{at}.mlp.gate_up", f"{at}.mlp.gate", f"{at}.mlp.up"),
            down=linear(f"{at}.mlp.down"),
            cache=cache,
        )

    rope = RopeTable(arrays["rope_cos_PE"], arrays["rope_sin_PE"])
    layers = tuple(
        layer(index, cache)
        for index, cache in zip(mapping.layers(spec.num_layers), caches, strict=True)
    )
    embed = linear("embed") if "embed.weight" in weights else None
    head = None
    if mapping.is_last_stage:
        head = embed if spec.tie_word_embeddings else linear("head")
    return Llama(
        layers=layers,
        rope=rope,
        embed=embed if mapping.is_first_stage else None,
        norm=norm("norm") if mapping.is_last_stage else None,
        head=head,
    )


def layer_caches(kv: dict[str, Array]) -> list[LayerCache]:
    """Views of the arrays of `puna.memory.kv_cache_specs`, for each layer."""
    kv_cache = kv["kv_cache"]
    _, _, num_blocks, num_kv_heads, block_size, head_dim = kv_cache.shape
    keys_shape = (num_blocks, num_kv_heads, head_dim, block_size)
    caches = []
    for i, (keys, values_NKPE) in enumerate(kv_cache):
        scales = kv["kv_scales"][i] if "kv_scales" in kv else (None, None)
        caches.append(LayerCache(keys.reshape(keys_shape), values_NKPE, *scales))
    return caches
