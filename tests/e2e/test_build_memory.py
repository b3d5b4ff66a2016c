"""The memory of a build, and the plan against the bytes on disk and in memory."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from benchmarks import build_memory
from puna.engine import read_config
from puna.memory import available_bytes, rank_memory

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def check_session(engine: Path, planned: dict[str, int]) -> None:
    session = build_memory.session_memory(engine)
    assert session["held"] == session["planned"]
    for part in ("weights", "kv_cache", *(("workspace",) if session["device"] == "cpu" else ())):
        assert session["held"][part] == planned[part]


@needs_proc
def test_small_engine(tmp_path: Path) -> None:
    shape = "hidden=256,layers=4,heads=4,kv_heads=2,ffn=704,vocab=4000"
    figures = build_memory.measure(tmp_path, shape)
    assert figures["rank_file_bytes"] == figures["planned"]["weights"]
    check_session(tmp_path / "engine", figures["planned"])
    assert figures["samples"] > 5
    assert 10_000_000 < figures["peak_private_bytes"] < build_memory.LIMIT_BYTES


@needs_proc
def test_private_bytes_sees_what_is_allocated() -> None:
    before = build_memory.private_bytes(os.getpid())
    # Not from malloc, which may have memory left over from earlier tests.
    with mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"\1" * len(block))
        assert build_memory.private_bytes(os.getpid()) - before > 0.9 * len(block)


@needs_proc
@pytest.mark.slow
def test_int8_of_1_1_billion_weights(tmp_path: Path) -> None:
    figures = build_memory.measure(tmp_path)
    assert figures["checkpoint_bytes"] > 2_200_000_000
    assert figures["rank_file_bytes"] == figures["planned"]["weights"] > 1_100_000_000
    assert figures["peak_private_bytes"] < build_memory.LIMIT_BYTES
    reference = rank_memory(read_config(tmp_path / "engine"), 0, "reference")
    if (available_bytes() or 0) > 1.5 * reference.total:
        check_session(tmp_path / "engine", figures["planned"])
