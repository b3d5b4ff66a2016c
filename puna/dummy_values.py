"""Dummy weights: a counter-based hash of (seed, tensor name, global index), the same bits anywhere.

A value depends on nothing but its own coordinates, so every tp, rank, slice and device computes the
same weights without storing or passing any. This file knows neither tensor names nor shapes nor how
dummy weights are quantised or laid out. `counter_bits` is also the random source of the sampler.
"""

from __future__ import annotations

import hashlib

import numpy as np

from puna.quant import Array

# Chris Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/): 32 bits to 32, bijective.
MULTIPLIERS = (np.uint32(0x7FEB352D), np.uint32(0x846CA68B))
HIGH_WORD = np.uint32(0x9E3779B9)  # odd (2^32 / golden ratio): spreads the index's upper word
_CHUNK = 1 << 16  # values hashed at a time: the temporaries stay in a core's cache

STEP = 2.0**-13  # every dummy value is a multiple of this: exact in float16 and float32


def dummy_keys(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit keys of a tensor: the first words of SHA-256("seed:name"), little endian.

    >>> [hex(key) for key in dummy_keys(0, "embed.weight")]
    ['0xbad8918f', '0xd88f3bc5']
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def mix32(x: Array) -> Array:
    """lowbias32 of each uint32, in place; returns its argument."""
    x ^= x >> np.uint32(16)
    x *= MULTIPLIERS[0]
    x ^= x >> np.uint32(15)
    x *= MULTIPLIERS[1]
    x ^= x >> np.uint32(16)
    return x


def counter_bits(key0: int | Array, key1: int | Array, index: Array) -> Array:
    """32 random bits for each 64-bit counter: uint64 [...] -> uint32 [...].

    The keys are for all counters, or one for each.

    >>> counter_bits(1, 2, np.array([0, 1, 2**40], np.uint64)).tolist()
    [3405767568, 3507691905, 903288019]
    """
    index = np.asarray(index, np.uint64)
    x = mix32(index.astype(np.uint32) ^ np.asarray(key0).astype(np.uint32))
    x ^= (index >> np.uint64(32)).astype(np.uint32) * HIGH_WORD
    x ^= np.asarray(key1).astype(np.uint32)
    return mix32(x)


def dummy_values(seed: int, name: str, num_cols: int, rows: slice, cols: slice) -> Array:
    """float32 [n, k]: the slice `rows`, `cols` of the dummy matrix `name` with `num_cols` columns.

    Values are (sum of the hash's four bytes - 510) / 8192: near normal, mean 0, standard deviation
    0.018. `rows` needs a stop (the number of rows is not known here); a vector is one column.
    """
    row_start, row_stop = rows.start or 0, rows.stop
    col_start, col_stop, _ = cols.indices(num_cols)
    keys = dummy_keys(seed, name)
    num_rows, width = max(0, row_stop - row_start), max(0, col_stop - col_start)
    out = np.empty((num_rows, width), np.float32)
    if not out.size:
        return out
    col_K = np.arange(col_start, col_stop, dtype=np.uint64)
    rows_at_once = max(1, _CHUNK // width)
    for start in range(0, num_rows, rows_at_once):
        stop = min(start + rows_at_once, num_rows)
        row_N = np.arange(row_start + start, row_start + stop, dtype=np.uint64)
        bits = counter_bits(*keys, row_N[:, None] * np.uint64(num_cols) + col_K)
        # A pairwise sum in place: bytes 0+1 and 2+3 in two 16-bit halves, then the halves.
        bits = (bits & np.uint32(0x00FF00FF)) + ((bits >> np.uint32(8)) & np.uint32(0x00FF00FF))
        total = (bits & np.uint32(0xFFFF)) + (bits >> np.uint32(16))
        np.subtract(total, 510, out=out[start:stop], dtype=np.float32, casting="unsafe")
        out[start:stop] *= np.float32(STEP)
    return out
