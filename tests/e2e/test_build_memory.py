"""The memory of a build, and the plan against the bytes on disk and in memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import build_memory
from puna.memory import available_bytes

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_proc
def test_small_engine(tmp_path: Path) -> None:
    shape = "hidden=256,layers=4,heads=4,kv_heads=2,ffn=704,vocab=4000"
    figures = build_memory.measure(tmp_path, shape)
    assert figures["rank_file_bytes"] == figures["planned"]["weights"]
    assert build_memory.session_memory(tmp_path / "engine") == figures["planned"]
    assert figures["samples"] > 5
    assert 10_000_000 < figures["peak_private_bytes"] < build_memory.LIMIT_BYTES


@needs_proc
def test_private_bytes_sees_what_is_allocated() -> None:
    before = build_memory.private_bytes(os.getpid())
    block = bytearray(os.urandom(1)) * 50_000_000
    assert build_memory.private_bytes(os.getpid()) - before > 0.9 * len(block)


@needs_proc
@pytest.mark.slow
def test_int8_of_1_1_billion_weights(tmp_path: Path) -> None:
    figures = build_memory.measure(tmp_path)
    assert figures["checkpoint_bytes"] > 2_200_000_000
    assert figures["rank_file_bytes"] == figures["planned"]["weights"] > 1_100_000_000
    assert figures["peak_private_bytes"] < build_memory.LIMIT_BYTES
    if (available_bytes() or 0) > 1.5 * figures["planned"]["total"]:
        assert build_memory.session_memory(tmp_path / "engine") == figures["planned"]
