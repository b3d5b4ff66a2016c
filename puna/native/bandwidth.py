"""How fast this machine reads memory: the ceiling of whatever reads all weights for each token.

The native library measures it with the vector loads and the thread pool that its kernels use. NumPy
stands in where there is no library; it comes within a few percent.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from puna.errors import ConfigError
from puna.native.library import find_library

# Far beyond every cache, so that each round reads memory.
BUFFER_BYTES = 2_000_000_000
NUM_ROUNDS = 5


def read_bandwidth(threads: int, num_bytes: int = BUFFER_BYTES) -> float:
    """Read bandwidth of memory in GB/s: `threads` threads, the best of several rounds.

    Whoever is short of memory asks for less than BUFFER_BYTES. ConfigError if it cannot be had.
    """
    library = find_library()
    if library is None:
        return numpy_read_bandwidth(threads, num_bytes)
    measure = library.puna_read_bandwidth
    measure.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    measure.restype = ctypes.c_double
    found = measure(threads, num_bytes, NUM_ROUNDS)
    if not found:
        raise ConfigError(
            f"the read bandwidth needs a buffer of {num_bytes:,} bytes, which the system refuses: "
            "lift the limit on this process's memory (ulimit -v)"
        )
    return found


def numpy_read_bandwidth(threads: int, num_bytes: int) -> float:
    """The same with NumPy, whose reductions let go of the interpreter."""
    words = np.empty(num_bytes // 8, np.uint64)
    parts = np.array_split(words, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        # Pages exist, and lie near the thread that reads them, only once they are written.
        list(pool.map(lambda part: part.fill(1), parts))
        for _ in range(NUM_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = max(best, words.nbytes / (time.perf_counter() - start))
    return best / 1e9
