"""The memory plan: what is planned is what a session holds and what lies on disk, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.builder import build
from puna.checkpoint.dummy import DummyCheckpoint
from puna.engine import RankMemory, read_config
from puna.llm import LLM
from puna.memory import (
    available_bytes,
    human_bytes,
    kv_block_bytes,
    kv_cache_specs,
    rank_memory,
    workspace_specs,
)
from puna.plan import BuildConfig
from puna.rank_file import rank_file_name, rank_weights
from puna.runtime.session import Session
from puna.spec import ModelSpec

SPEC = ModelSpec(
    hidden_size=60,
    intermediate_size=101,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=18,
    vocab_size=97,
    max_position_embeddings=200,
    attention_bias=True,
)
CONFIGS: list[dict[str, Any]] = [
    {},
    {"dtype": "float32", "max_batch_size": 1, "max_num_tokens": 1},
    {"dtype": "bfloat16", "quant": "none", "max_seq_len": 33},
    {"quant": "int8", "max_batch_size": 3},
    {"quant": "int8", "group_size": 32},
    {"quant": "int4", "max_num_tokens": 77},
    {"quant": "int8", "kv_dtype": "int8"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_plan_is_what_the_session_holds_and_what_lies_on_disk(
    config: dict[str, Any], tmp_path: Path
) -> None:
    planned = build(DummyCheckpoint(SPEC), tmp_path / "e", BuildConfig(**config), materialize=True)
    (memory,) = planned.config.memory
    assert memory == read_config(tmp_path / "e").memory[0]
    assert memory.weights == (tmp_path / "e" / rank_file_name(0)).stat().st_size
    assert memory == rank_memory(planned.config, 0, "cpu")
    for device in ("auto", "reference"):
        session = Session.open(tmp_path / "e", device=device)
        assert session.memory == rank_memory(planned.config, 0, session.device)
        assert (session.memory.weights, session.memory.kv_cache) == (
            memory.weights,
            memory.kv_cache,
        )
        session.close()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 3), (2, 3)])
def test_every_rank_file_has_its_planned_size(tp: int, pp: int, tmp_path: Path) -> None:
    config = BuildConfig(quant="int8", tp_size=tp, pp_size=pp)
    built = build(DummyCheckpoint(SPEC), tmp_path / "e", config, materialize=True).config
    sizes = [(tmp_path / "e" / rank_file_name(r)).stat().st_size for r in range(tp * pp)]
    assert sizes == [memory.weights for memory in built.memory]
    shapes = [kv_cache_specs(built, r, 1)["kv_cache"][1] for r in range(tp * pp)]
    kv_heads = [shape[3] for shape in shapes]
    assert kv_heads == [max(1, SPEC.num_kv_heads // tp)] * (tp * pp)
    layers = [shape[0] for shape in shapes[::tp]]
    assert sum(layers) == SPEC.num_layers


def test_kv_cache_bytes_are_a_number_of_blocks(tmp_path: Path) -> None:
    built = build(DummyCheckpoint(SPEC), tmp_path / "e", BuildConfig(dtype="float16")).config
    block = kv_block_bytes(built, 0)
    assert block == 3 * 2 * 16 * 2 * 18 * 2  # layers, K and V, tokens, heads, head_dim, bytes
    assert built.memory[0].kv_cache == block * built.limits.num_blocks
    session = Session.open(tmp_path / "e", kv_cache_bytes=5 * block + block - 1)
    assert session.num_blocks == 5 and session.memory.kv_cache == 5 * block
    session.close()


def test_a_recipe_needs_the_memory_of_what_it_makes(tmp_path: Path) -> None:
    """A dummy engine stores nothing, but its session holds all the weights."""
    recipe = build(DummyCheckpoint(SPEC), tmp_path / "recipe").config
    stored = build(DummyCheckpoint(SPEC), tmp_path / "stored", materialize=True).config
    # The two headers differ in the config's digest only, which has a fixed length.
    assert recipe.memory == stored.memory
    assert not (tmp_path / "recipe" / rank_file_name(0)).exists()
    session = Session.open(tmp_path / "recipe")
    assert session.memory == rank_memory(recipe, 0, session.device)
    assert session.memory.weights == recipe.memory[0].weights
    session.close()


def test_total_is_the_sum_and_large_models_do_not_overflow(tmp_path: Path) -> None:
    assert RankMemory(1, 2, 3).total == 6 and RankMemory(1, 2, 3).to_json()["total"] == 6
    planned = build(DummyCheckpoint(SPEC), tmp_path / "e").config
    dtype, shape = kv_cache_specs(planned, 0, 2**40)["kv_cache"]
    assert dtype == np.float16 and shape[2] == 2**40
    specs = workspace_specs(planned, 0, "cpu").values()
    sizes = [dtype.itemsize * int(np.prod(s)) for dtype, s in specs]
    assert sum(sizes) == planned.memory[0].workspace


def test_an_int8_cache_has_a_scale_for_each_token_and_head(tmp_path: Path) -> None:
    built = build(DummyCheckpoint(SPEC), tmp_path / "e", BuildConfig(kv_dtype="int8")).config
    assert kv_cache_specs(built, 0, 5) == {
        "kv_cache": (np.int8, (3, 2, 5, 2, 16, 18)),
        "kv_scales": (np.float32, (3, 2, 5, 2, 16)),
    }
    assert kv_block_bytes(built, 0) == 3 * 2 * 2 * 16 * (18 + 4)
    session = Session.open(tmp_path / "e", kv_cache_bytes=5 * kv_block_bytes(built, 0))
    assert session.num_blocks == 5 and session.memory.kv_cache == 5 * kv_block_bytes(built, 0)
    session.close()


@pytest.mark.parametrize("tp", [1, 2])
def test_each_device_has_its_own_workspace(tp: int, tmp_path: Path) -> None:
    config = BuildConfig(tp_size=tp, max_batch_size=3, max_num_tokens=7, max_seq_len=129)
    built = build(DummyCheckpoint(SPEC), tmp_path / "e", config).config
    cpu, reference = (workspace_specs(built, 0, device) for device in ("cpu", "reference"))
    for name in cpu.keys() & reference.keys():
        assert cpu[name] == reference[name]
    unpacked = reference.keys() - cpu.keys()
    assert unpacked == {
        f"unpacked.{weight.name}" for weight in rank_weights(built, 0) if weight.weight.is_matrix
    }
    assert reference["unpacked.layers.2.attn.q.weight"] == (np.float32, (72 // tp, 60))
    # 101 of ffn over two ranks are 51 each; the widest input is rounded up to whole groups of 32.
    most = 128 if tp == 1 else 64
    assert {name: cpu[name] for name in cpu.keys() - reference.keys()} == {
        "kv_TX": (np.float32, (7, 2 * 36 // tp)),
        "attended_TQ": (np.float32, (7, 72 // tp)),
        "act_float_TK": (np.float32, (7, most)),
        "act_bf16_TK": (np.uint16, (7, most)),
        "act_q32_TX": (np.int8, (7, most // 32 * 44)),
        "act_q16_TX": (np.int8, (7, most // 16 * 28)),
        "attn_part": (np.float32, (3, 2, 4 // tp, 20)),
    }


def test_human_bytes() -> None:
    found = [human_bytes(n) for n in (0, 999, 1000, 123_456_789, 999_600_000_000, 2 * 10**15)]
    assert found == ["0 B", "999 B", "1 kB", "123 MB", "1 TB", "2e+03 TB"]
    assert (available_bytes() or 1) > 0


def test_a_sequence_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    """33 tokens need a third block, in the KV cache and in the block table."""
    config = BuildConfig(max_seq_len=33, max_batch_size=1)
    planned = build(DummyCheckpoint(SPEC), tmp_path / "e", config).config
    assert workspace_specs(planned, 0, "cpu")["block_table_SM"][1] == (1, 3)
    with LLM(tmp_path / "e") as llm:
        assert np.isfinite(llm.logits([1] * 33)).all()
