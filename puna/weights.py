"""The one table of every tensor of a LLaMA model, with logical axes.

Derived from it, and declared nowhere else: the names a checkpoint must have and their shapes, what
each rank holds (sharding, KV-head duplication, zero padding, pipeline stages), which biases are
fused in an engine, and which may be quantised. This file knows neither files nor number formats.

Two views of the same weights:

- `checkpoint_weights`: canonical tensors as published, one projection each;
- `engine_weights`: what an engine stores, with the biases of q, k, v and of gate, up fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from puna.mapping import Mapping
from puna.spec import ModelSpec

# How one dimension is split over tensor-parallel ranks:
#   vocab, ffn  equal contiguous parts, zero-padded
#   heads       whole query heads
#   kv_heads    whole KV heads, each held by several ranks when tp > num_kv_heads
#   once        rank 0 holds it and the others hold zeros (a bias added to a sum over ranks)
#   None        every rank holds all of it
Axis = Literal["vocab", "ffn", "heads", "kv_heads", "once"] | None
Stage = Literal["first", "layer", "last"]


@dataclass(frozen=True)
class WeightSpec:
    """One canonical tensor: [N, K] matrix or [N] vector, and how each dimension is split."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    stage: Stage
    layer: int = -1

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class EngineWeight:
    """One tensor of an engine: a canonical matrix, or canonical vectors one after the other."""

    name: str
    parts: tuple[WeightSpec, ...]

    @property
    def is_matrix(self) -> bool:
        return self.parts[0].is_matrix

    @property
    def stage(self) -> Stage:
        return self.parts[0].stage

    @property
    def layer(self) -> int:
        return self.parts[0].layer


@dataclass(frozen=True)
class Extent:
    """What one rank holds of one dimension: source indices start..stop, then zeros up to `size`."""

    start: int
    stop: int
    size: int

    @property
    def source(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def num_source(self) -> int:
        return self.stop - self.start


def checkpoint_weights(spec: ModelSpec) -> tuple[WeightSpec, ...]:
    """Every canonical tensor of the model, in the order of execution."""
    return tuple(part for weight in engine_weights(spec) for part in weight.parts)


def engine_weights(spec: ModelSpec) -> tuple[EngineWeight, ...]:
    """Every tensor of an engine of one rank, in the order of execution."""
    return tuple(_engine_weights(spec))


def _engine_weights(s: ModelSpec) -> Iterator[EngineWeight]:
    hidden, vocab = s.hidden_size, s.vocab_size
    yield _single(WeightSpec("embed.weight", (vocab, hidden), ("vocab", None), "first"))
    for i in range(s.num_layers):
        yield from _layer_weights(s, i)
    yield _single(WeightSpec("norm.weight", (hidden,), (None,), "last"))
    if not s.tie_word_embeddings:
        yield _single(WeightSpec("head.weight", (vocab, hidden), ("vocab", None), "last"))


def _layer_weights(s: ModelSpec, i: int) -> Iterator[EngineWeight]:
    hidden, ffn, q, kv = s.hidden_size, s.intermediate_size, s.q_size, s.kv_size

    def projection(name: str, rows: int, cols: int, axes: tuple[Axis, Axis]) -> WeightSpec:
        return WeightSpec(f"layers.{i}.{name}.weight", (rows, cols), axes, "layer", i)

    def bias(name: str, rows: int, axis: Axis) -> WeightSpec:
        return WeightSpec(f"layers.{i}.{name}.bias", (rows,), (axis,), "layer", i)

    def norm(name: str) -> WeightSpec:
        return WeightSpec(f"layers.{i}.{name}.weight", (hidden,), (None,), "layer", i)

    def fused(name: str, *parts: WeightSpec) -> EngineWeight:
        return EngineWeight(f"layers.{i}.{name}.bias", parts)

    yield _single(norm("attn_norm"))
    yield _single(projection("attn.q", q, hidden, ("heads", None)))
    yield _single(projection("attn.k", kv, hidden, ("kv_heads", None)))
    yield _single(projection("attn.v", kv, hidden, ("kv_heads", None)))
    if s.attention_bias:
        yield fused(
            "attn.qkv",
            bias("attn.q", q, "heads"),
            bias("attn.k", kv, "kv_heads"),
            bias("attn.v", kv, "kv_heads"),
        )
    yield _single(projection("attn.o", hidden, q, (None, "heads")))
    if s.attention_bias:
        yield _single(bias("attn.o", hidden, "once"))
    yield _single(norm("mlp_norm"))
    yield _single(projection("mlp.gate", ffn, hidden, ("ffn", None)))
    yield _single(projection("mlp.up", ffn, hidden, ("ffn", None)))
    if s.mlp_bias:
        yield fused("mlp.gate_up", bias("mlp.gate", ffn, "ffn"), bias("mlp.up", ffn, "ffn"))
    yield _single(projection("mlp.down", hidden, ffn, (None, "ffn")))
    if s.mlp_bias:
        yield _single(bias("mlp.down", hidden, "once"))


def _single(part: WeightSpec) -> EngineWeight:
    return EngineWeight(part.name, (part,))


def on_rank(
    weights: Iterable[EngineWeight], spec: ModelSpec, mapping: Mapping
) -> list[EngineWeight]:
    """The tensors that the rank's pipeline stage holds."""
    layers = mapping.layers(spec.num_layers)

    def is_here(weight: EngineWeight) -> bool:
        if weight.stage == "layer":
            return weight.layer in layers
        is_tied_head = weight.name == "embed.weight" and spec.tie_word_embeddings
        on_last = mapping.is_last_stage and (weight.stage == "last" or is_tied_head)
        return on_last or (mapping.is_first_stage and weight.stage == "first")

    return [weight for weight in weights if is_here(weight)]


def extent(axis: Axis, size: int, spec: ModelSpec, mapping: Mapping, multiple: int = 1) -> Extent:
    """What the rank holds of a dimension of `size`; vocab and ffn parts are padded to
    `multiple`."""
    tp_size, tp_rank = mapping.tp_size, mapping.tp_rank
    if axis is None:
        return Extent(0, size, size)
    if axis == "once":
        return Extent(0, size if tp_rank == 0 else 0, size)
    if axis == "heads":
        part = size // tp_size
        return Extent(tp_rank * part, (tp_rank + 1) * part, part)
    if axis == "kv_heads":
        num_heads_here = max(spec.num_kv_heads // tp_size, 1)
        first_head = tp_rank * spec.num_kv_heads // tp_size
        part = num_heads_here * spec.head_dim
        return Extent(first_head * spec.head_dim, first_head * spec.head_dim + part, part)
    part = -(-size // (tp_size * multiple)) * multiple
    start = min(tp_rank * part, size)
    return Extent(start, min(start + part, size), part)
