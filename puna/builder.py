"""builder: stream a checkpoint into an engine directory.

Load a few rows, shard, quantise, pack, write; then digest, and rename the finished directory to its
name. Peak memory is a few chunks a worker, whatever the model's size. What is built was decided by
`puna.plan`; this file decides only how the bytes get there, and
`puna.output` how the directory gets its name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Mapping as MappingABC
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

from puna.auto_target import auto_target
from puna.checkpoint import Checkpoint, open_checkpoint
from puna.engine import (
    CONFIG_FILE,
    KERNELS_DIR,
    TOKENIZER_DIR,
    DummyRecipe,
    EngineConfig,
    Provenance,
)
from puna.errors import CheckpointError, ConfigError, TokenizerError
from puna.manifest import READ_BYTES, write_manifest
from puna.memory import available_bytes, human_bytes
from puna.nvidia import COMPILERS, INSTALL, missing_packages
from puna.output import check_output, finish, is_engine, workspace
from puna.plan import BuildConfig, CheckpointFacts, plan
from puna.rank_file import rank_file, rank_file_name
from puna.rank_writer import Task, write_ranks, write_ranks_in_processes
from puna.shard import CHUNK_WEIGHTS
from puna.targets import TARGETS
from puna.tokenizer import load_tokenizer
from puna.version import puna_version
from puna.weights import checkpoint_weights

# Chunk as loaded, as float32, scaled, and packed: about 28 bytes a weight at the peak, measured
# with int8 in groups (x86-64, 2026-11).
BYTES_A_CHUNK_WEIGHT = 28
# Files beside the rank files: config, manifest and tokenizer stay well below this.
SMALL_FILES_BYTES = 64 * 2**20
# More threads than these would take more memory than they are worth; --workers asks for them.
MAX_DEFAULT_WORKERS = 4


class Progress(Protocol):
    """Told how many bytes of `total` have been written and digested."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class BuildResult:
    """A finished engine: where it lies and what it is."""

    path: Path
    config: EngineConfig


def open_source(path: str | Path) -> Checkpoint:
    """Open a checkpoint (see `open_checkpoint`); an engine in its place gets its own message."""
    if is_engine(Path(os.path.expanduser(path))):
        raise CheckpointError(
            f"{path} is an engine already: run it with puna run {path}, or build from the "
            "checkpoint that it came from"
        )
    return open_checkpoint(path)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming every missing, unexpected and misshapen tensor at once."""
    expected = {weight.name: weight.shape for weight in checkpoint_weights(checkpoint.spec)}
    found = checkpoint.names()
    shapes = {name: checkpoint.shape(name) for name in sorted(found & expected.keys())}
    wrong = [
        f"{name} is {list(shape)} instead of {list(expected[name])}"
        for name, shape in shapes.items()
        if shape != expected[name]
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("missing", sorted(expected.keys() - found)),
            ("unexpected", sorted(found - expected.keys())),
            ("wrong shape", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.source} does not fit its config: {'; '.join(problems)}: "
            "get the checkpoint again, or mend its config"
        )


def plan_checkpoint(
    checkpoint: Checkpoint, config: BuildConfig, materialize: bool = False
) -> EngineConfig:
    """Plan an engine of a checkpoint. Reads headers only; source digests are added by `build`.

    Target "auto" looks for a GPU; a named one needs none.
    """
    check_tensors(checkpoint)
    matrices = [weight.name for weight in checkpoint_weights(checkpoint.spec) if weight.is_matrix]
    seed = getattr(checkpoint, "seed", None)
    is_recipe = checkpoint.kind == "dummy" and not materialize
    facts = CheckpointFacts(
        spec=checkpoint.spec,
        formats={name: checkpoint.format(name) for name in matrices},
        generation=checkpoint.generation,
        provenance=Provenance(
            checkpoint.source, checkpoint.kind, {}, puna_version(), checkpoint.notes()
        ),
        dummy=DummyRecipe(seed) if is_recipe and seed is not None else None,
    )
    if config.target == "auto":
        return plan(facts, config, auto_target())
    return plan(facts, config)


def build(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    config: BuildConfig | None = None,
    *,
    workers: int | None = None,
    processes: int = 1,
    force: bool = False,
    materialize: bool = False,
    tokenizer: MappingABC[str, bytes] | None = None,
    progress: Progress | None = None,
    kernel_progress: Progress | None = None,
) -> BuildResult:
    """Build an engine at `out`.

    `checkpoint` is a directory (Hugging Face or Meta), a .gguf file, a hub id, or an open
    Checkpoint, which stays open. `workers` threads share the tensors of all ranks (default: the
    CPUs of this machine, at most 4). With `processes` above 1 each rank is written by a process of
    its own, that many at a time, among which the workers are divided; the bytes are the same.
    `force` replaces an engine at `out`, and nothing else.
    `materialize` writes dummy weights out instead of their recipe. `tokenizer` gives the files of
    the engine's tokenizer in place of the checkpoint's. `kernel_progress` hears of the kernels that
    are compiled for a GPU, before `progress` does of the bytes. Raises PunaError for what the user
    can mend; whatever happens, `out` is a whole engine or what it was before.
    """
    is_named = isinstance(checkpoint, (str, Path))
    with closing(open_source(checkpoint)) if is_named else nullcontext(checkpoint) as opened:
        return _build(
            opened,
            Path(out),
            config,
            workers,
            processes,
            force,
            materialize,
            tokenizer,
            progress,
            kernel_progress,
        )


def _build(
    checkpoint: Checkpoint,
    out: Path,
    config: BuildConfig | None,
    workers: int | None,
    processes: int,
    force: bool,
    materialize: bool,
    tokenizer: MappingABC[str, bytes] | None,
    progress: Progress | None,
    kernel_progress: Progress | None,
) -> BuildResult:
    out = Path(os.path.abspath(out))
    planned = plan_checkpoint(checkpoint, config or BuildConfig(), materialize)
    check_output(out, force)
    _check_compilers(planned)
    if workers is None:
        workers = min(num_cpus(), MAX_DEFAULT_WORKERS)
    for name, number in (("workers", workers), ("processes", processes)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; it must be at least 1: raise it")
    processes = min(processes, planned.world_size)
    workers = max(workers, processes)
    files = checkpoint.tokenizer_files() if tokenizer is None else tokenizer
    _check_room(out, planned, workers)
    sources = _existing(checkpoint)
    with workspace(out) as folder:
        if TARGETS[planned.target].is_gpu:
            # Before the weights: what can fail should not do so after minutes of writing.
            _write_kernels(folder / KERNELS_DIR, planned, kernel_progress)
        bar = _Bar(planned, sources, progress)
        planned = _write(folder, planned, checkpoint, sources, files, workers, processes, bar)
        finish(folder, out, force)
    return BuildResult(out, planned)


def _write(
    folder: Path,
    planned: EngineConfig,
    checkpoint: Checkpoint,
    sources: list[Path],
    tokenizer: MappingABC[str, bytes],
    workers: int,
    processes: int,
    bar: _Bar,
) -> EngineConfig:
    """Make `folder`, which has its kernels, a whole engine; returns the config with the digests of
    its sources."""
    if tokenizer:
        _write_tokenizer(folder / TOKENIZER_DIR, tokenizer)
    placeholder = "0" * 64
    if planned.dummy is None:
        task = Task(folder, planned, checkpoint, placeholder)
        if processes == 1:
            write_ranks(task, range(planned.world_size), workers, bar.add)
        else:
            write_ranks_in_processes(task, processes, max(1, workers // processes), bar.add)
    digests = _digest_sources(sources, workers, bar)
    planned = replace(planned, provenance=replace(planned.provenance, digests=digests))
    (folder / CONFIG_FILE).write_bytes(planned.to_bytes())
    for rank in range(planned.world_size if planned.dummy is None else 0):
        # Only the digest in the header differs from the placeholder's, so nothing moves.
        header = rank_file(planned, rank, planned.digest()).header
        with (folder / rank_file_name(rank)).open("r+b") as file:
            file.write(header)
    write_manifest(folder, workers, bar.add)
    return planned


def _write_tokenizer(folder: Path, files: MappingABC[str, bytes]) -> None:
    """Write the files and load what they make: the build should fail, not the first run."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        load_tokenizer(folder)
    except TokenizerError as error:
        found = str(error).replace(f"{folder}{os.sep}", "")
        raise TokenizerError(
            f"the tokenizer cannot be used ({found}): mend it, or take another with --tokenizer DIR"
        ) from error


def _check_compilers(planned: EngineConfig) -> None:
    if TARGETS[planned.target].is_gpu and (missing := missing_packages(COMPILERS)):
        raise ConfigError(
            f"target {planned.target} needs {', '.join(missing)} to compile its kernels, not "
            f"installed: {INSTALL}, or build for the CPU with --target cpu"
        )


def _write_kernels(folder: Path, planned: EngineConfig, progress: Progress | None) -> None:
    """Compile the engine's kernels, which needs no GPU."""
    from puna.cuda.compile import compile_kernels

    folder.mkdir()
    for name, data in compile_kernels(planned, progress).items():
        (folder / name).write_bytes(data)


class _Bar:
    """Bytes to do (written once, digested once, sources digested once) and done."""

    def __init__(
        self, planned: EngineConfig, sources: list[Path], progress: Progress | None
    ) -> None:
        stored = 0 if planned.dummy else sum(memory.weights for memory in planned.memory)
        self.total = 2 * stored + sum(path.stat().st_size for path in sources)
        self.done = 0
        self._progress = progress
        self._lock = Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.done = min(self.done + num_bytes, self.total)
            if self._progress:
                self._progress(self.done, self.total)


def _existing(checkpoint: Checkpoint) -> list[Path]:
    return [path for path in checkpoint.files() if path.is_file()]


def _digest_sources(sources: list[Path], workers: int, bar: _Bar) -> dict[str, str]:
    """SHA-256 of each source file by name (and folder, where names repeat), several at once."""
    counts = Counter(path.name for path in sources)

    def digest(path: Path) -> str:
        hasher = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                hasher.update(chunk)
                bar.add(len(chunk))
        return hasher.hexdigest()

    with ThreadPoolExecutor(workers) as pool:
        return {
            (path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}"): value
            for path, value in zip(sources, pool.map(digest, sources), strict=True)
        }


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_room(out: Path, planned: EngineConfig, workers: int) -> None:
    """Refuse before the work starts when disk or RAM cannot hold it."""
    parent = next(path for path in out.parents if os.path.exists(path))
    stored = 0 if planned.dummy else sum(memory.weights for memory in planned.memory)
    needed, free = stored + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(
            f"{parent} has {human_bytes(free)} free, the engine needs {human_bytes(needed)}: free "
            "some, or build elsewhere with -o"
        )
    needed, available = workers * CHUNK_WEIGHTS * BYTES_A_CHUNK_WEIGHT, available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"{human_bytes(available)} of RAM are free, {workers} workers need "
            f"{human_bytes(needed)}: lower --workers, or close other programs"
        )
