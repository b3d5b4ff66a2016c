"""The weight table: names, shapes, and what each rank holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from puna.mapping import Mapping
from puna.spec import ModelSpec
from puna.weights import (
    Axis,
    Extent,
    checkpoint_weights,
    engine_weights,
    extent,
    on_rank,
)

SPEC = ModelSpec(64, 172, 5, 8, 4, 8, 509, 512)


def shard(x: np.ndarray, axis: Axis, at: Extent) -> np.ndarray:
    part = np.zeros((at.size, *x.shape[1:]), x.dtype)
    part[: at.num_source] = x[at.source]
    return part


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("axis", "size"),
    [("vocab", 509), ("ffn", 172), ("heads", 64), ("kv_heads", 32), ("once", 64), (None, 64)],
)
def test_unshard_of_shard_is_identity(axis: Axis, size: int, tp: int, multiple: int) -> None:
    x = np.random.default_rng(0).standard_normal((size, 3))
    extents = [extent(axis, size, SPEC, Mapping(rank, tp), multiple) for rank in range(tp)]
    assert len({at.size for at in extents}) == 1, "ranks have equal parts"
    assert all(0 <= at.num_source <= at.size for at in extents)
    parts = [shard(x, axis, at) for at in extents]
    back = np.full_like(x, np.nan)
    for at, part in zip(extents, parts, strict=True):
        held = back[at.source]
        assert (np.isnan(held) | (held == part[: at.num_source])).all(), "copies differ"
        back[at.source] = part[: at.num_source]
        assert not part[at.num_source :].any(), "padding is zero"
    assert np.array_equal(back, x)

    copies = sum(at.num_source for at in extents) / size
    if axis == "kv_heads":
        assert copies == max(1, tp // SPEC.num_kv_heads)
    elif axis is None:
        assert copies == tp
    else:
        assert copies == 1
    if axis in ("vocab", "ffn"):
        assert extents[0].size % multiple == 0
        # Padding is less than one multiple a rank.
        assert extents[0].size * tp - size < tp * multiple


def test_each_query_head_finds_its_kv_head_on_its_own_rank() -> None:
    for num_heads, num_kv_heads in ((8, 4), (8, 1), (12, 3), (16, 16)):
        spec = replace(SPEC, num_heads=num_heads, num_kv_heads=num_kv_heads)
        for tp in range(1, num_heads + 1):
            if num_heads % tp or (num_kv_heads % tp and tp % num_kv_heads):
                continue
            for rank in range(tp):
                heads = extent("heads", spec.q_size, spec, Mapping(rank, tp))
                kv = extent("kv_heads", spec.kv_size, spec, Mapping(rank, tp))
                q_here = range(heads.start // spec.head_dim, heads.stop // spec.head_dim)
                kv_here = range(kv.start // spec.head_dim, kv.stop // spec.head_dim)
                for i, head in enumerate(q_here):
                    wanted = head // (num_heads // num_kv_heads)
                    assert kv_here[i // (len(q_here) // len(kv_here))] == wanted


@pytest.mark.parametrize("pp", [1, 2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_every_tensor_once_and_a_tied_embedding_at_both_ends(
    pp: int, tied: bool
) -> None:
    spec = replace(SPEC, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    table = engine_weights(spec)
    held = [w.name for rank in range(pp) for w in on_rank(table, spec, Mapping(rank, 1, pp))]
    expected = [weight.name for weight in table] + ["embed.weight"] * (tied and pp > 1)
    assert sorted(held) == sorted(expected)
    assert held[0] == "embed.weight"


def test_names_and_shapes() -> None:
    spec = ModelSpec(6, 10, 1, 3, 1, 4, 11, 16, attention_bias=True, mlp_bias=True)
    assert [(weight.name, weight.shape) for weight in checkpoint_weights(spec)] == [
        ("embed.weight", (11, 6)),
        ("layers.0.attn_norm.weight", (6,)),
        ("layers.0.attn.q.weight", (12, 6)),
        ("layers.0.attn.k.weight", (4, 6)),
        ("layers.0.attn.v.weight", (4, 6)),
        ("layers.0.attn.q.bias", (12,)),
        ("layers.0.attn.k.bias", (4,)),
        ("layers.0.attn.v.bias", (4,)),
        ("layers.0.attn.o.weight", (6, 12)),
        ("layers.0.attn.o.bias", (6,)),
        ("layers.0.mlp_norm.weight", (6,)),
        ("layers.0.mlp.gate.weight", (10, 6)),
        ("layers.0.mlp.up.weight", (10, 6)),
        ("layers.0.mlp.gate.bias", (10,)),
        ("layers.0.mlp.up.bias", (10,)),
        ("layers.0.mlp.down.weight", (6, 10)),
        ("layers.0.mlp.down.bias", (6,)),
        ("norm.weight", (6,)),
        ("head.weight", (11, 6)),
    ]


def test_only_biases_are_fused() -> None:
    spec = replace(SPEC, attention_bias=True, mlp_bias=True)
    fused = {w.name: [part.name for part in w.parts] for w in engine_weights(spec)}
    assert {name for name, parts in fused.items() if parts != [name]} == {
        f"layers.{i}.{name}.bias"
        for i in range(spec.num_layers)
        for name in ("attn.qkv", "mlp.gate_up")
    }
    assert fused["layers.2.attn.qkv.bias"] == [f"layers.2.attn.{part}.bias" for part in "qkv"]
    gate_up = [f"layers.2.mlp.{part}.bias" for part in ("gate", "up")]
    assert fused["layers.2.mlp.gate_up.bias"] == gate_up
    assert all(w.layer == 2 for w in engine_weights(spec) if w.name.startswith("layers.2."))
