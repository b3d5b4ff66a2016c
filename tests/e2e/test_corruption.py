"""No byte of an engine can change unnoticed: every damage is refused before the first token."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_models import Puna, listing

from puna.errors import EngineError
from puna.mapping import Mapping
from puna.runtime.session import Session

NUM_CHANGES = 2000


@contextmanager
def byte_changed(path: Path, offset: int, mask: int) -> Iterator[None]:
    """One byte of a file differs by `mask`, for as long as the block lasts."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        old = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([old[0] ^ mask]), offset)
        try:
            yield
        finally:
            os.pwrite(descriptor, old, offset)
    finally:
        os.close(descriptor)


def changes(engine: Path) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, mask): half of them spread over all bytes, half over the files."""
    rng = random.Random(0)
    files = sorted(path for path in engine.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for i in range(NUM_CHANGES):
        index = rng.choices(range(len(files)), sizes)[0] if i % 2 else i // 2 % len(files)
        is_rank = files[index].suffix == ".safetensors"
        # The header of a rank's file is small beside its data; a third of its changes go there.
        end = 4096 if is_rank and i % 3 == 0 else sizes[index]
        yield files[index], rng.randrange(min(end, sizes[index])), rng.randrange(1, 256)


def test_every_changed_byte_is_refused(engine: Path, copied: Any) -> None:
    path = copied(engine)
    before = listing(path)
    accepted, seen = [], set()
    for file, offset, mask in changes(path):
        with byte_changed(file, offset, mask):
            seen.add(file.name)
            try:
                Session.open(path, threads=1).close()
            except EngineError:
                continue
            accepted.append(f"{file.name} byte {offset} ^ {mask}")
    assert not accepted
    assert seen == {Path(name).name for name in before}
    assert listing(path) == before
    Session.open(path, threads=1).close()


def test_every_length_but_the_right_one_is_refused(engine: Path, copied: Any) -> None:
    path = copied(engine)
    for name, data in listing(path).items():
        file = path / name
        for wrong in (b"", data[: len(data) // 2], data[:-1], data + b"\n", data + b"\0" * 64):
            file.write_bytes(wrong)
            with pytest.raises(EngineError):
                Session.open(path, threads=1)
        file.unlink()
        with pytest.raises(EngineError):
            Session.open(path, threads=1)
        file.write_bytes(data)
    Session.open(path, threads=1).close()


def test_files_that_change_places_are_refused(engine: Path, copied: Any) -> None:
    path = copied(engine)
    added = path / "tokenizer" / "added_tokens.json"
    added.write_text('{"secret": 3}')
    with pytest.raises(EngineError, match=r"tokenizer/added_tokens\.json is not in the manifest"):
        Session.open(path, threads=1)
    added.unlink()
    (path / "tokenizer" / "tokenizer.json").rename(added)
    with pytest.raises(EngineError, match=r"tokenizer/tokenizer\.json is missing"):
        Session.open(path, threads=1)


def open_rank(path: Path, rank: int) -> Session:
    """One of two ranks, which runs no step and needs no other."""
    comm: Any = SimpleNamespace(mapping=Mapping(rank, tp_size=2), close=lambda: None)
    return Session.open(path, comm=comm)


def test_each_rank_checks_its_own_file(pair_engine: Path, copied: Any, puna: Puna) -> None:
    path = copied(pair_engine)
    size = (path / "rank1.safetensors").stat().st_size
    for offset in (0, 100, size // 2, size - 1):
        with byte_changed(path / "rank1.safetensors", offset, 1):
            open_rank(path, 0).close()
            with pytest.raises(EngineError, match=r"rank1\.safetensors was changed"):
                open_rank(path, 1)
            assert puna("verify", path).status == 2
    (path / "rank1.safetensors").unlink()
    open_rank(path, 0).close()
    assert puna("verify", path).status == 2


def test_ranks_that_change_places_are_refused(pair_engine: Path, copied: Any) -> None:
    path = copied(pair_engine)
    first, second, other = (path / name for name in ("rank0.safetensors", "rank1.safetensors", "x"))
    first.rename(other)
    second.rename(first)
    other.rename(second)
    for rank in (0, 1):
        with pytest.raises(EngineError, match=rf"rank{rank}\.safetensors was changed"):
            open_rank(path, rank)
