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
    kv_cache_spec,
    workspace_specs,
)
from puna.plan import BuildConfig
from puna.rank_file import rank_file_name
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
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_plan_is_what_the_session_holds_and_what_lies_on_disk(
    config: dict[str, Any], tmp_path: Path
) -> None:
    planned = build(DummyCheckpoint(SPEC), tmp_path / "e", BuildConfig(**config), materialize=True)
    (memory,) = planned.config.memory
    assert memory == read_config(tmp_path / "e").memory[0]
    assert memory.weights == (tmp_path / "e" / rank_file_name(0)).stat().st_size
    session = Session.open(tmp_path / "e")
    assert session.memory == memory
    session.close()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 3), (2, 3)])
def test_every_rank_file_has_its_planned_size(tp: int, pp: int, tmp_path: Path) -> None:
    config = BuildConfig(quant="int8", tp_size=tp, pp_size=pp)
    built = build(DummyCheckpoint(SPEC), tmp_path / "e", config, materialize=True).config
    sizes = [(tmp_path / "e" / rank_file_name(r)).stat().st_size for r in range(tp * pp)]
    assert sizes == [memory.weights for memory in built.memory]
    kv_heads = [kv_cache_spec(built, r, 1)[1][4] for r in range(tp * pp)]
    assert kv_heads == [max(1, SPEC.num_kv_heads // tp)] * (tp * pp)
    layers = [kv_cache_spec(built, r, 1)[1][0] for r in range(0, tp * pp, tp)]
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
    assert session.memory == recipe.memory[0]
    session.close()


def test_total_is_the_sum_and_large_models_do_not_overflow(tmp_path: Path) -> None:
    assert RankMemory(1, 2, 3).total == 6 and RankMemory(1, 2, 3).to_json()["total"] == 6
    planned = build(DummyCheckpoint(SPEC), tmp_path / "e").config
    dtype, shape = kv_cache_spec(planned, 0, 2**40)
    assert dtype == np.float16 and shape[2] == 2**40
    sizes = [dtype.itemsize * int(np.prod(s)) for dtype, s in workspace_specs(planned, 0).values()]
    assert sum(sizes) == planned.memory[0].workspace


def test_human_bytes() -> None:
    found = [human_bytes(n) for n in (0, 999, 1000, 123_456_789, 999_600_000_000, 2 * 10**15)]
    assert found == ["0 B", "999 B", "1 kB", "123 MB", "1 TB", "2e+03 TB"]
    assert (available_bytes() or 1) > 0


def test_a_sequence_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    """33 tokens need a third block, in the KV cache and in the block table."""
    config = BuildConfig(max_seq_len=33, max_batch_size=1)
    planned = build(DummyCheckpoint(SPEC), tmp_path / "e", config).config
    assert workspace_specs(planned, 0)["block_table_SM"][1] == (1, 3)
    with LLM(tmp_path / "e") as llm:
        assert np.isfinite(llm.logits([1] * 33)).all()
