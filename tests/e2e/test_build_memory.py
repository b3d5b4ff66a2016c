"""The memory of a build, and the plan against the bytes on disk and in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small_models import TESTS

from puna.memory import available_bytes


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = TESTS.parent / "benchmarks" / "build_memory.py"
    spec = importlib.util.spec_from_file_location("build_memory", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_proc
def test_small_engine(benchmark: ModuleType, tmp_path: Path) -> None:
    shape = "hidden=256,layers=4,heads=4,kv_heads=2,ffn=704,vocab=4000"
    figures = benchmark.measure(tmp_path, shape)
    assert figures["rank_file_bytes"] == figures["planned"]["weights"]
    assert benchmark.session_memory(tmp_path / "engine") == figures["planned"]
    assert figures["samples"] > 5
    assert 10_000_000 < figures["peak_private_bytes"] < benchmark.LIMIT_BYTES


@needs_proc
def test_private_bytes_sees_what_is_allocated(benchmark: ModuleType) -> None:
    import os

    before = benchmark.private_bytes(os.getpid())
    block = bytearray(os.urandom(1)) * 50_000_000
    assert benchmark.private_bytes(os.getpid()) - before > 0.9 * len(block)


@needs_proc
@pytest.mark.slow
def test_int8_of_1_1_billion_weights(benchmark: ModuleType, tmp_path: Path) -> None:
    figures = benchmark.measure(tmp_path)
    assert figures["checkpoint_bytes"] > 2_200_000_000
    assert figures["rank_file_bytes"] == figures["planned"]["weights"] > 1_100_000_000
    assert figures["peak_private_bytes"] < benchmark.LIMIT_BYTES
    if (available_bytes() or 0) > 1.5 * figures["planned"]["total"]:
        assert benchmark.session_memory(tmp_path / "engine") == figures["planned"]
