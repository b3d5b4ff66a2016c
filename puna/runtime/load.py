"""From an engine's files to a model that is ready to be recorded: map or generate, then bind.

Decides where a rank's arrays come from and which of them goes where in `Llama`. Knows no steps.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from puna.dummy import DummyWeights
from puna.engine import EngineConfig
from puna.models.llama.model import Layer, Llama
from puna.ops import LayerCache, Linear, Norm, Ops, RopeTable
from puna.quant import Array
from puna.rank_file import RankFile, RankWeight, check_rank_file, rank_weights
from puna.rope import rope_tables
from puna.shard import rank_rows


def map_weights(path: Path, layout: RankFile) -> dict[str, Array]:
    """Arrays over a memory map of the rank's file; two processes share its pages."""
    check_rank_file(path, layout)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _views(np.frombuffer(mapped, np.uint8), layout)


def generate_weights(
    config: EngineConfig, rank: int, layout: RankFile, report: Callable[[int], None]
) -> dict[str, Array]:
    """The arrays of a dummy engine, made as the build would have made them."""
    assert config.dummy is not None
    arrays = _views(np.zeros(layout.num_bytes, np.uint8), layout)
    source = DummyWeights(config.spec, config.dummy.seed)
    for weight in rank_weights(config, rank):
        for first, rows in rank_rows(weight, source):
            for name, values in rows.items():
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
    kv_cache: Array,
    report: Callable[[int], None],
) -> Llama:
    """Bind stored weights, KV cache and RoPE tables to the model; `report` is told the bytes."""
    spec, mapping = config.spec, config.mapping(rank)
    weights = {weight.name: weight for weight in rank_weights(config, rank)}

    def matrix(weight: RankWeight) -> object:
        prefix = f"{weight.name}."
        parts = {
            name.removeprefix(prefix): array
            for name, array in stored.items()
            if name.startswith(prefix)
        }
        loaded = ops.load_matrix(parts, weight.format.name, arrays[f"unpacked.{weight.name}"])
        report(sum(array.nbytes for array in parts.values()))
        return loaded

    def linear(name: str, parts: tuple[str, ...] = ()) -> Linear:
        names = (
            [f"{name}.weight"] if f"{name}.weight" in weights else [f"{p}.weight" for p in parts]
        )
        return Linear(tuple(matrix(weights[n]) for n in names), stored.get(f"{name}.bias"))

    def norm(name: str) -> Norm:
        return Norm(stored[f"{name}.weight"], spec.rms_norm_eps)

    def layer(index: int, layer_cache: Array) -> Layer:
        at = f"layers.{index}"
        qkv_parts = tuple(f"{at}.attn.{part}" for part in ("q", "k", "v"))
        mlp_parts = tuple(f"{at}.mlp.{part}" for part in ("gate", "up"))
        return Layer(
            attn_norm=norm(f"{at}.attn_norm"),
            qkv=linear(f"{at}.attn.qkv", qkv_parts),
            o=linear(f"{at}.attn.o"),
            mlp_norm=norm(f"{at}.mlp_norm"),
            gate_up=linear(f"{at}.mlp.gate_up", mlp_parts),
            down=linear(f"{at}.mlp.down"),
            cache=LayerCache(layer_cache[0], layer_cache[1]),
        )

    rope = RopeTable(arrays["rope_cos_PE"], arrays["rope_sin_PE"])
    rope.cos_PE[:], rope.sin_PE[:] = rope_tables(spec.rope, spec.head_dim, len(rope.cos_PE))
    layers = tuple(
        layer(index, layer_cache)
        for index, layer_cache in zip(mapping.layers(spec.num_layers), kv_cache, strict=True)
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
