"""A rank's weights onto a GPU: read, checked and copied at the same time, or made there.

The rank's file lies as it is in one buffer of bytes, and its arrays are views of that. Several
threads each read a chunk of the file a piece at a time into pinned memory, digest the piece and
begin its copy; digesting goes on while the copy does. Decides nothing of what the arrays are for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from puna.dummy import DummyWeights
from puna.engine import EngineConfig
from puna.manifest import CHUNK_BYTES, FileDigest, damaged
from puna.quant import DTYPES
from puna.rank_file import RankFile, check_rank_file, rank_weights
from puna.runtime.cuda_dummy import fill_dummy_matrix
from puna.shard import rank_rows

# A thread reads the next piece while the copies of the last ones are under way.
_PIECE_BYTES = 4 * 2**20
_PIECES = 3
# More threads read no faster, and each has pinned memory.
_MOST_THREADS = 16

TORCH_DTYPES = MappingProxyType(
    {dtype: getattr(torch, name) for name, dtype in DTYPES.items()}
    | {np.dtype(name): getattr(torch, name) for name in ("int8", "uint8", "int32")}
)


def weight_views(data: torch.Tensor, layout: RankFile) -> dict[str, Any]:
    """The arrays of a rank's file over its bytes, as tensors."""
    return {
        name: data[array.offset : array.offset + array.num_bytes]
        .view(TORCH_DTYPES[array.dtype])
        .view(array.shape)
        for name, array in layout.arrays.items()
    }


def generate_weights_on(
    config: EngineConfig,
    rank: int,
    arrays: dict[str, torch.Tensor],
    report: Callable[[int], None],
) -> None:
    """Fill the arrays of a dummy engine, which are zero, where they are."""
    assert config.dummy is not None
    source = DummyWeights(config.spec, config.dummy.seed)
    for weight in rank_weights(config, rank):
        if not weight.weight.is_matrix:
            for first, chunk in rank_rows(weight, source):
                for name, values in chunk.items():
                    part = arrays[name][first : first + len(values)]
                    part.copy_(torch.from_numpy(values))
                    report(values.nbytes)
            continue
        (part,), (rows,), cols = weight.weight.parts, weight.rows, weight.cols
        data_NK = arrays[f"{weight.name}.data"]
        fill_dummy_matrix(
            data_NK[: rows.num_source, : cols.num_source],
            config.dummy.seed,
            part.name,
            part.shape[1],
            rows.start,
            cols.start,
        )
        report(data_NK.nbytes)


@contextmanager
def reading(
    engine_dir: Path,
    file: FileDigest,
    layout: RankFile,
    out: torch.Tensor,
    threads: int,
    report: Callable[[int], None],
) -> Iterator[Callable[[], None]]:
    """Read a rank's file into `out`, its bytes on the GPU, while the caller does something else.

    Gives the function that waits for the end of it: EngineError if a byte differs from the
    manifest. `report` is told the bytes read, from several threads. Leaving ends the threads.
    """
    path = engine_dir / file.path
    check_rank_file(path, layout)
    stop, chunks = Event(), count()
    workers = max(1, min(threads, _MOST_THREADS, len(file.chunks)))
    with ThreadPoolExecutor(workers) as pool:

        def read() -> list[str]:
            problems = _read_chunks(path, file, out, chunks, stop, report)
            if problems:
                stop.set()  # the others need not read on
            return problems

        futures = [pool.submit(read) for _ in range(workers)]

        def wait() -> None:
            try:
                problems = sorted({problem for future in futures for problem in future.result()})
            except OSError as error:
                problems = [f"{file.path} cannot be read ({error.strerror})"]
            if problems:
                raise damaged(engine_dir, problems)

        try:
            yield wait
        finally:
            stop.set()


def _read_chunks(
    path: Path,
    file: FileDigest,
    out: torch.Tensor,
    chunks: Iterator[int],
    stop: Event,
    report: Callable[[int], None],
) -> list[str]:
    """Take chunks until there are none left; what is wrong with them."""
    ring = _Ring(out.device)
    with path.open("rb", buffering=0) as opened:
        while (index := next(chunks)) < len(file.chunks) and not stop.is_set():
            start = index * CHUNK_BYTES
            end, hasher = min(start + CHUNK_BYTES, file.size), hashlib.sha256()
            for at in range(start, end, _PIECE_BYTES):
                piece = ring.next_piece()[: min(_PIECE_BYTES, end - at)]
                if not _read_exactly(opened.fileno(), piece, at):
                    return [f"{file.path} was truncated"]
                hasher.update(piece.numpy().data)
                ring.copy(piece, out[at : at + len(piece)])
            if hasher.hexdigest() != file.chunks[index]:
                return [f"{file.path} was changed"]
            report(end - start)
    ring.wait()
    return []


def _read_exactly(fd: int, piece: torch.Tensor, offset: int) -> bool:
    """Fill `piece` from the file; whether it was long enough."""
    view = piece.numpy().data
    while view:
        num_bytes = os.preadv(fd, [view], offset)
        if not num_bytes:
            return False
        view, offset = view[num_bytes:], offset + num_bytes
    return True


class _Ring:
    """A thread's pieces of pinned memory, and its stream. Of a test on a CPU: of plain memory."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(device)  # of this thread
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._pieces = [
            torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=is_gpu) for _ in range(_PIECES)
        ]
        self._copied = [torch.cuda.Event() if is_gpu else None for _ in range(_PIECES)]
        self._next = 0

    def next_piece(self) -> torch.Tensor:
        """One that is not being copied any more."""
        if (copied := self._copied[self._next]) is not None:
            copied.synchronize()
        return self._pieces[self._next]

    def copy(self, piece: torch.Tensor, out: torch.Tensor) -> None:
        """Begin to copy what `next_piece` gave."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            out.copy_(piece, non_blocking=True)
            if (copied := self._copied[self._next]) is not None:
                copied.record()
        self._next = (self._next + 1) % _PIECES

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
