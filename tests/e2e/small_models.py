"""Small checkpoints with a tokenizer, and how the tests of the command line run `puna`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from checkpoint_writers import SPEC, tiny_weights, write_hf, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DUMMY = "hidden=64,layers=2,heads=4,kv_heads=2,ffn=96,vocab=300,max_positions=128"


class Ran(NamedTuple):
    """What a command left behind."""

    status: object
    out: str
    err: str


Puna = Callable[..., Ran]
Refused = Callable[..., str]
Script = Callable[..., Ran]


def weights(vocab_size: int = 300) -> dict[str, np.ndarray]:
    """Random weights of `checkpoint_writers.SPEC`, with a vocabulary for bytes."""
    rng = np.random.default_rng(1)
    shape = (vocab_size, SPEC.hidden_size)
    matrices = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name in ("embed.weight", "head.weight")
    }
    return {**tiny_weights(), **matrices}


def write_checkpoint(path: Path, **changes: np.ndarray) -> Path:
    """A Hugging Face checkpoint of two shards with a tokenizer; `changes` replace weights."""
    write_hf(path, weights() | changes, num_files=2, vocab_size=300, max_position_embeddings=128)
    return write_tokenizer(path)


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m puna` from the source tree in a process of its own."""
    return subprocess.run(
        command_line(*arguments), cwd=Path(__file__).resolve().parents[2], timeout=120, **options
    )  # type: ignore


def command_line(*arguments: object) -> list[str | bytes]:
    """The argv of `python -m puna`; bytes stay as they are."""
    given = [value if isinstance(value, bytes) else str(value) for value in arguments]
    return [sys.executable, "-m", "puna", *given]
