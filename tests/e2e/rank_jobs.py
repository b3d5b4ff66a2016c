"""How the tests start ranks: a small engine for any number of them, launchers, and their output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import ROOT

# Llama 2 70B in miniature: 64 heads, 8 KV heads.
SHAPE = "hidden=512,layers=4,heads=64,kv_heads=8,head_dim=8,ffn=1376,vocab=1003,max_positions=256"

Engines = Callable[..., Path]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LAUNCHERS = {
    "puna launch": lambda n: [sys.executable, "-m", "puna", "launch", "-n", n, "--"],
    "torchrun": lambda n: [*TORCHRUN, "--standalone", "--nproc-per-node", n],
    "open mpi": lambda n: ["mpirun.openmpi", "-n", n, sys.executable],
    "mpich": lambda n: ["mpirun.mpich", "-n", n, sys.executable],
}


def environment() -> dict[str, str]:
    # Slots beyond this machine's cores, and root in CI's container.
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def ran(
    *argv: object, seconds: float = 120, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*prefix, *map(str, argv)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def launch(num_ranks: int, *command: object, options: tuple[object, ...] = ()) -> list[object]:
    return [sys.executable, "-m", "puna", "launch", "-n", num_ranks, *options, "--", *command]


def launcher_argv(launcher: str, num_ranks: int) -> list[str]:
    argv = [*map(str, LAUNCHERS[launcher](num_ranks))]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"needs {argv[0]}")
    return argv
