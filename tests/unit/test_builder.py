"""The build: what reaches the disk is the plan's, and what was there before is not lost."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoint_writers import SPEC, tiny_weights, write_hf, write_tokenizer
from safetensors.numpy import load_file

import puna.builder
import puna.output
import puna.rank_writer
import puna.shard
from puna import BuildConfig, build
from puna.checkpoint import open_checkpoint
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.engine import read_config
from puna.errors import CheckpointError, ConfigError, PunaError, TokenizerError
from puna.memory import human_bytes
from puna.rank_file import rank_file

WEIGHTS = tiny_weights()
QKV = ("q", "k", "v")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", WEIGHTS)


def stored(engine: Path, rank: int = 0) -> dict[str, np.ndarray]:
    """What another program reads from a rank's file."""
    return load_file(engine / f"rank{rank}.safetensors")


def matrix(found: dict[str, np.ndarray], name: str, num_rows: int) -> np.ndarray:
    """A stored float32 matrix, row by row; the rows that fill its last tile are zeros."""
    data = found[f"{name}.data"]
    assert data.dtype == np.float32 and data.shape[0] == -(-num_rows // 16) and data.shape[2] == 16
    rows = np.concatenate([tile.T for tile in data])
    assert not rows[num_rows:].any()
    return rows[:num_rows]


def test_dense_engine_holds_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    result = build(checkpoint, tmp_path / "engine")
    found = stored(result.path)
    for i in range(SPEC.num_layers):
        for part in QKV:
            name = f"layers.{i}.attn.{part}.weight"
            assert np.array_equal(matrix(found, name, len(WEIGHTS[name])), WEIGHTS[name])
    embed = WEIGHTS["embed.weight"]
    assert np.array_equal(matrix(found, "embed.weight", len(embed)), embed)
    assert np.array_equal(found["norm.weight"], WEIGHTS["norm.weight"])
    assert read_config(result.path) == result.config


def test_tensor_parallel_ranks_split_the_rows(checkpoint: Path, tmp_path: Path) -> None:
    engine = build(checkpoint, tmp_path / "engine", BuildConfig(tp_size=2)).path
    for rank in range(2):
        found = stored(engine, rank)
        for part in QKV:
            name = f"layers.1.attn.{part}.weight"
            rows = np.split(WEIGHTS[name], 2)[rank]
            assert np.array_equal(matrix(found, name, len(rows)), rows)
        down = np.split(WEIGHTS["layers.1.mlp.down.weight"], 2, axis=1)[rank]
        assert np.array_equal(matrix(found, "layers.1.mlp.down.weight", len(down)), down)


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_chunks_are_whole_tiles_and_change_no_byte(
    quant, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix built in one piece and one built some tiles at a time are the same."""
    config = BuildConfig(quant=quant, tp_size=2)
    whole = build(checkpoint, tmp_path / "whole", config).path
    rows: list[int] = []
    pack = puna.shard.pack_dense if quant == "none" else puna.shard.pack_quantised

    def counting(layout, x):
        rows.append(len(x if quant == "none" else x.q_NK))
        return pack(layout, x)

    monkeypatch.setattr(puna.shard, pack.__name__, counting)
    monkeypatch.setattr(puna.shard, "CHUNK_WEIGHTS", 64 * 32)
    parts = build(checkpoint, tmp_path / "parts", config).path
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert 32 in rows and max(rows) <= 64, "the narrow matrices in chunks of more rows"


@pytest.mark.parametrize("config", [BuildConfig(), BuildConfig(quant="int8", tp_size=2)])
def test_files_are_what_the_config_lays_out(
    config: BuildConfig, checkpoint: Path, tmp_path: Path
) -> None:
    engine, planned = (lambda r: (r.path, r.config))(build(checkpoint, tmp_path / "e", config))
    for rank in range(planned.world_size):
        layout = rank_file(planned, rank, planned.digest())
        data = (engine / f"rank{rank}.safetensors").read_bytes()
        assert len(data) == layout.num_bytes == planned.memory[rank].weights
        assert data.startswith(layout.header)


def test_provenance(checkpoint: Path, tmp_path: Path) -> None:
    found = build(checkpoint, tmp_path / "engine").config.provenance
    assert (found.source, found.kind) == (str(checkpoint), "hf")
    assert found.digests == {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_number_of_workers_changes_no_byte(quant, checkpoint: Path, tmp_path: Path) -> None:
    for workers in (1, 5):
        build(checkpoint, tmp_path / str(workers), BuildConfig(quant=quant), workers=workers)
    names = ("config.json", "manifest.json", "rank0.safetensors")
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()


def test_progress_reaches_the_end(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    build(checkpoint, tmp_path / "engine", progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert 0.9 * calls[-1][1] <= calls[-1][0] <= calls[-1][1]


def test_open_checkpoint_stays_open(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint)
    build(opened, tmp_path / "engine")
    assert opened.load("norm.weight").shape == (64,)
    opened.close()


def test_engine_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    engine = build(checkpoint, tmp_path / "engine").path
    with pytest.raises(CheckpointError, match="is an engine already"):
        build(engine, tmp_path / "again")


def dummy(seed: int = 0) -> DummyCheckpoint:
    return DummyCheckpoint(parse_preset("hidden=64,layers=1,heads=4,ffn=96,vocab=100"), seed=seed)


def test_output_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "engine", puna.builder._write

    def slow(*arguments):
        out.mkdir()
        (out / "mine").touch()
        return write(*arguments)

    monkeypatch.setattr(puna.builder, "_write", slow)
    with pytest.raises(ConfigError, match="exists already"):
        build(dummy(), out)
    assert os.listdir(out) == ["mine"] and os.listdir(tmp_path) == ["engine"]


def test_force_without_an_atomic_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(dummy(1), tmp_path / "engine")
    monkeypatch.setattr(puna.output, "_exchange", lambda a, b: False)
    config = build(dummy(2), tmp_path / "engine", force=True).config
    assert read_config(tmp_path / "engine") == config and config.dummy.seed == 2
    assert os.listdir(tmp_path) == ["engine"]


def test_only_dead_builds_are_cleaned_up(tmp_path: Path) -> None:
    stale, alive, notes, other = (
        tmp_path / f"engine{suffix}"
        for suffix in (".tmp-0123abcd", ".tmp-89abcdef", ".tmp-my-notes", "2.tmp-0123abcd")
    )
    for folder in (stale, alive, notes, other):
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / "engine.tmp-76543210").touch()  # a file, no folder
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        build(dummy(), tmp_path / "engine")
    finally:
        os.close(lock)
    kept = {"engine", alive.name, notes.name, other.name, "engine.tmp-76543210"}
    assert set(os.listdir(tmp_path)) == kept


@pytest.mark.parametrize("name", ["engine[1]", "engine *", "-o", "ünï"])
def test_names_with_special_characters(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.tmp-0123abcd").mkdir()
    build(dummy(), tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_two_builds_of_one_name(tmp_path: Path) -> None:
    """Both finish, one after the other; neither removes the other's folder."""
    errors: list[Exception] = []

    def run(seed: int) -> None:
        try:
            build(dummy(seed), tmp_path / "engine", force=True, materialize=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["engine"]
    assert len(stored(tmp_path / "engine")) > 5


def test_default_workers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build on a machine of many CPUs needs no more memory than on one of a few."""
    monkeypatch.setattr(puna.builder, "num_cpus", lambda: 256)
    seen: list[int] = []
    monkeypatch.setattr(puna.builder, "_check_room", lambda out, plan, n: seen.append(n))
    build(dummy(), tmp_path / "engine")
    assert seen == [puna.builder.MAX_DEFAULT_WORKERS]


def test_check_room_counts_weights_and_workers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 3 * puna.builder.CHUNK_WEIGHTS * puna.builder.BYTES_A_CHUNK_WEIGHT
    monkeypatch.setattr(puna.builder, "available_bytes", lambda: needed - 1)
    with pytest.raises(ConfigError, match=f"3 workers need {human_bytes(needed)}"):
        build(checkpoint, tmp_path / "engine", workers=3)
    monkeypatch.setattr(puna.builder, "available_bytes", lambda: needed)
    build(checkpoint, tmp_path / "engine", workers=3)


def test_given_tokenizer_replaces_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    write_tokenizer(checkpoint)
    given = {"tokenizer.json": (checkpoint / "tokenizer.json").read_bytes()}
    own = build(checkpoint, tmp_path / "own").path
    other = build(checkpoint, tmp_path / "other", tokenizer=given).path
    none = build(checkpoint, tmp_path / "none", tokenizer={}).path
    assert sorted(os.listdir(own / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]
    assert os.listdir(other / "tokenizer") == ["tokenizer.json"]
    assert not (none / "tokenizer").exists()
    assert "tokenizer/tokenizer.json" in {
        file["path"] for file in json.loads((other / "manifest.json").read_text())["files"]
    }


def test_damaged_tokenizer_fails_the_build(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_bytes(b"{")
    with pytest.raises(TokenizerError, match=r"cannot be used \(tokenizer.json .*--tokenizer DIR"):
        build(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_processes_write_the_bytes_that_threads_write(
    shape: tuple[int, int], checkpoint: Path, tmp_path: Path
) -> None:
    config = BuildConfig(tp_size=shape[0], pp_size=shape[1], quant="int8")
    told: list[tuple[int, int]] = []
    one = build(checkpoint, tmp_path / "one", config).path
    many = build(
        checkpoint,
        tmp_path / "many",
        config,
        processes=3,
        progress=lambda done, total: told.append((done, total)),
    ).path
    assert told[-1][0] > 0.9 * told[-1][1]
    for path in sorted(one.rglob("*")):
        if path.is_file():
            assert (many / path.relative_to(one)).read_bytes() == path.read_bytes(), path.name
    assert len(list(many.rglob("*"))) == len(list(one.rglob("*")))


def test_what_a_process_finds_wrong_is_told_as_ever(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "norm.weight": np.full_like(WEIGHTS["norm.weight"], np.nan)}
    bad = write_hf(tmp_path / "bad", weights)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds NaN"):
        build(bad, tmp_path / "engine", BuildConfig(tp_size=4), processes=2)
    assert not (tmp_path / "engine").exists()
    with pytest.raises(ConfigError, match="processes is 0"):
        build(bad, tmp_path / "engine", processes=0)


def test_a_process_that_is_killed_ends_the_build(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(puna.rank_writer, "_write_weight", die)
    with pytest.raises(PunaError, match=r"process that wrote rank \d ended with status -9"):
        build(checkpoint, tmp_path / "engine", BuildConfig(tp_size=2), processes=2)
    assert not any(path.name.startswith("engine") for path in tmp_path.iterdir())


def test_an_empty_directory_may_be_there(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    config = build(checkpoint, tmp_path / "engine").config
    assert read_config(tmp_path / "engine") == config
