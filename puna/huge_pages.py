"""Huge pages, where the system has them: for files in the page cache, and for large arrays.

Reading weights through pages of 4 KiB costs a fifth of the speed on a virtual machine (2 threads of
a Zen 4, 2026-11; benchmarks/NOTES.md): the processor looks up each page. Linux keeps a file's pages
in blocks of 2 MiB where its file system can (ext4 since 6.16, XFS, tmpfs) and the first who touches
them says so. Elsewhere these functions do the same without.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HUGE_PAGE = 2 * 2**20
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; mmap has no name for it
_HAS_ADVICE = hasattr(mmap, "MADV_HUGEPAGE")


def map_file(path: Path) -> mmap.mmap:
    """A read-only map of a file that is not empty; processes that map it share its pages."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _advise(mapped)
    return mapped


def populate(mapped: mmap.mmap, start: int, size: int) -> None:
    """Bring part of a map into memory; the caller's thread does not hold up others. A hint."""
    madvise = _madvise()
    if madvise is None:
        return
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(address + first, min(start + size, len(mapped)) - first, _POPULATE_READ)


@cache
def _madvise() -> Any:
    """The C function: mmap's method would not let go of the interpreter."""
    if not _HAS_ADVICE:
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], int
    return function


def _advise(mapped: mmap.mmap) -> None:
    if not _HAS_ADVICE:
        return
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without huge pages


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """An array of zeros whose pages come into being when they are touched."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return np.zeros(shape, dtype)
    # A page more, so that the array can begin with one.
    memory = _anonymous(num_bytes + HUGE_PAGE)
    _advise(memory)
    data = np.frombuffer(memory, np.uint8)
    first = -data.ctypes.data % HUGE_PAGE
    return data[first : first + num_bytes].view(dtype).reshape(shape)


def _anonymous(size: int) -> mmap.mmap:
    """Memory of this process alone: by default it would be shared, and such has no huge pages."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def reserve(descriptor: int, size: int) -> None:
    """Give a new file its size and its place on the disk; OSError where there is none left."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def write_at(descriptor: int, data: np.ndarray[Any, np.dtype[np.uint8]], offset: int) -> None:
    """Write bytes into a file that was reserved; other threads may write elsewhere in it."""
    if not _HAS_ADVICE:
        _write_at(descriptor, data.data, offset)
        return
    size, stop = os.fstat(descriptor).st_size, offset + len(data)
    first = offset // HUGE_PAGE * HUGE_PAGE
    last = min(-(-stop // HUGE_PAGE) * HUGE_PAGE, size)
    with mmap.mmap(descriptor, last - first, offset=first) as window:
        _advise(window)
        target = np.frombuffer(window, np.uint8)
        target[offset - first : stop - first] = data
        del target  # or the window cannot be closed


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
