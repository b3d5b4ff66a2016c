"""rank_writer: the tensors of an engine, from a checkpoint into its rank files.

Decides who writes what: threads share the tensors of all ranks, or each rank has a process of its
own. Every number goes to a place that the plan fixed, so that the bytes are the same either way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock

import numpy as np

from puna.engine import EngineConfig
from puna.errors import ConfigError, PunaError
from puna.huge_pages import reserve, write_at
from puna.rank_file import RankFile, RankWeight, rank_file, rank_file_name, rank_weights
from puna.shard import WeightSource, rank_rows

Count = Callable[[int], None]  # told how many bytes have been written


@dataclass(frozen=True)
class Task:
    """What is written where."""

    folder: Path
    planned: EngineConfig
    source: WeightSource
    digest: str  # of the config, for the headers

    def layout(self, rank: int) -> RankFile:
        return rank_file(self.planned, rank, self.digest)


def write_ranks(task: Task, ranks: range, num_threads: int, count: Count) -> None:
    """Write the files of `ranks`, their headers left out, with threads that share all tensors."""
    stop = Event()
    with _open_files(task, ranks) as files, ThreadPoolExecutor(num_threads) as pool:
        tasks = [
            pool.submit(_write_weight, *files[rank], weight, task.source, stop, count)
            for rank in ranks
            for weight in rank_weights(task.planned, rank)
        ]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
            for done in tasks:
                if done.done():
                    done.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _write_weight(
    descriptor: int,
    layout: RankFile,
    weight: RankWeight,
    source: WeightSource,
    stop: Event,
    count: Count,
) -> None:
    for first, arrays in rank_rows(weight, source):
        if stop.is_set():
            return
        for name, rows in arrays.items():
            stored = layout.arrays[name]
            row_bytes = stored.num_bytes // stored.shape[0]
            assert rows.dtype == stored.dtype and rows[0].nbytes == row_bytes, name
            data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            write_at(descriptor, data, stored.offset + first * row_bytes)
            count(rows.nbytes)


@contextmanager
def _open_files(task: Task, ranks: range) -> Iterator[dict[int, tuple[int, RankFile]]]:
    files: dict[int, tuple[int, RankFile]] = {}
    try:
        for rank in ranks:
            layout = task.layout(rank)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            files[rank] = os.open(task.folder / rank_file_name(rank), flags, 0o644), layout
            reserve(files[rank][0], layout.num_bytes)
        yield files
    finally:
        for descriptor, _ in files.values():
            os.close(descriptor)


def write_ranks_in_processes(
    task: Task, num_processes: int, num_threads: int, count: Count
) -> None:
    """The same for all ranks: a process for each, `num_processes` at a time, with `num_threads`."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError("this system cannot fork processes: build with one (--processes 1)")
    waiting = list(range(task.planned.world_size))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                rank = waiting.pop(0)
                running.update(_start(task, rank, num_threads))
            for pipe in wait_for(list(running)):
                assert isinstance(pipe, Connection)
                if not _hear(pipe, running[pipe], count):
                    _, process = running.pop(pipe)
                    process.join()
                    pipe.close()
    finally:
        for pipe, (_, process) in running.items():
            process.terminate()
            process.join()
            pipe.close()


def _start(task: Task, rank: int, num_threads: int) -> dict[Connection, tuple[int, BaseProcess]]:
    # Forked, so that the checkpoint is not opened again; it is mapped, and read by position only.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_write_one, args=(task, rank, num_threads, theirs))
    process.start()
    theirs.close()
    return {ours: (rank, process)}


def _write_one(task: Task, rank: int, num_threads: int, pipe: Connection) -> None:
    """A process's whole life. It tells how it gets on, and ends when nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lock = Lock()

    def count(num_bytes: int) -> None:
        with lock:
            pipe.send(num_bytes)

    try:
        write_ranks(task, range(rank, rank + 1), num_threads, count)
        pipe.send(None)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        pipe.send(error)


def _hear(pipe: Connection, sender: tuple[int, BaseProcess], count: Count) -> bool:
    """Take one message; whether there will be more. Raises what the process raised."""
    rank, process = sender
    try:
        message = pipe.recv()
    except EOFError:
        process.join()
        raise PunaError(
            f"the process that wrote rank {rank} ended with status {process.exitcode}: it may have "
            "run out of memory: use fewer processes"
        ) from None
    if isinstance(message, Exception):
        raise message
    if message is None:
        return False
    count(message)
    return True
