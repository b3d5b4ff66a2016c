"""kill -9 at any moment of a build: the output is a whole engine, the right one, or not there."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from small_models import listing

from puna.builder import build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.cli import main

SHAPE = "hidden=256,layers=8,heads=4,ffn=704,vocab=2000,max_positions=128"
NUM_KILLS = 25


def build_dummy(out: Path, seed: int, force: bool = False) -> None:
    checkpoint = DummyCheckpoint(parse_preset(SHAPE), seed=seed)
    build(checkpoint, out, workers=2, force=force, materialize=True)


def killed_build(out: Path, seed: int, force: bool, delay: float) -> bool:
    """Build in a child, kill it after `delay` seconds; whether it was still building."""
    child = os.fork()
    if child == 0:
        try:
            build_dummy(out, seed, force)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_builds(is_there: bool, tmp_path: Path) -> None:
    out, old, new = tmp_path / "engine", tmp_path / "reference" / "old", tmp_path / "reference/new"
    build_dummy(old, seed=1)
    start = time.monotonic()
    build_dummy(new, seed=2)
    duration = time.monotonic() - start
    wanted = {"old": listing(old), "new": listing(new)}
    assert wanted["old"]["rank0.safetensors"] != wanted["new"]["rank0.safetensors"]
    if is_there:
        build_dummy(out, seed=1)
    rng, num_killed, found = random.Random(0), 0, set()
    for _ in range(10 * NUM_KILLS):
        if num_killed == NUM_KILLS:
            break
        was_killed = killed_build(out, 2, is_there, rng.random() * duration)
        num_killed += was_killed
        # The machine may be busier or idler than when the duration was taken.
        duration *= 1.05 if was_killed else 0.9
        assert len(list(tmp_path.glob("engine.tmp-*"))) <= 1, "an older folder was left"
        if not out.exists():
            found.add("none")
            continue
        assert main(["verify", str(out)]) == 0
        (kind,) = [name for name, engine in wanted.items() if listing(out) == engine]
        found.add(kind)
        if kind == "new":  # the next build starts from what it replaces
            build_dummy(out, seed=1, force=True) if is_there else _remove(out)
    assert num_killed == NUM_KILLS, "the builds ended too early to be killed"
    assert ("none" in found) != is_there
    build_dummy(out, seed=2, force=True)
    assert listing(out) == wanted["new"]
    assert sorted(os.listdir(tmp_path)) == ["engine", "reference"], "stale folders were left"


def _remove(engine: Path) -> None:
    for path in engine.rglob("*"):
        path.unlink()
    engine.rmdir()
