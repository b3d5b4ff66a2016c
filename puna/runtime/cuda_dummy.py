"""Dummy weights made on a GPU: the same bits as `puna.dummy_values` makes on a CPU.

Values are exact in float32
and rounded to nearest when they are stored, as NumPy does it. Knows no layout but rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from puna.cuda.hash32 import mix32, signed
from puna.dummy_values import HIGH_WORD, STEP, dummy_keys

# Values made at a time: 16 MiB of each temporary, which then stay in the GPU's cache.
_CHUNK = 4 * 2**20
_BYTE_PAIRS = 0x00FF00FF


def fill_dummy_matrix(
    out_NK: torch.Tensor, seed: int, name: str, num_cols: int, first_row: int, first_col: int
) -> None:
    """Fill a part of a stored matrix with that of the dummy matrix `name` of `num_cols` columns
    which begins at `first_row` and `first_col`. `out_NK` is float16, bfloat16 or float32."""
    num_rows, width = out_NK.shape
    if not out_NK.numel():
        return
    key0, key1 = dummy_keys(seed, name)
    device = out_NK.device
    rows_at_once = max(1, min(num_rows, _CHUNK // width))
    x_XK, spare_XK = (
        torch.empty((rows_at_once, width), dtype=torch.int32, device=device) for _ in range(2)
    )
    cols_K = torch.arange(first_col, first_col + width, dtype=torch.int32, device=device)
    for start, stop in _chunks(num_rows, rows_at_once):
        x_NK, spare_NK = x_XK[: stop - start], spare_XK[: stop - start]
        # The row's first index in 64 bits; of the sum with a column, the low word wraps by itself.
        rows_N = np.arange(first_row + start, first_row + stop, dtype=np.uint64)
        low_N = torch.from_numpy((rows_N * np.uint64(num_cols)).astype(np.uint32).view(np.int32))
        torch.add(low_N.to(device)[:, None], cols_K, out=x_NK)
        x_NK ^= signed(key0)
        mix32(x_NK, spare_NK)
        if (first_row + stop) * num_cols >= 2**32:
            x_NK ^= _high_words(rows_N, num_cols, first_col, width, device)
        x_NK ^= signed(key1)
        mix32(x_NK, spare_NK)
        _sum_bytes(x_NK, spare_NK)
        values_NK = x_NK.to(torch.float32)
        values_NK -= 510
        values_NK *= STEP
        out_NK[start:stop] = values_NK


def _chunks(num_rows: int, rows_at_once: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, rows_at_once):
        yield start, min(start + rows_at_once, num_rows)


def _high_words(
    rows_N: np.ndarray[Any, Any], num_cols: int, first_col: int, width: int, device: torch.device
) -> torch.Tensor:
    """The upper words of the indices, spread: of a matrix with more than 2^32 numbers."""
    cols_K = np.arange(first_col, first_col + width, dtype=np.uint64)
    index_NK = rows_N[:, None] * np.uint64(num_cols) + cols_K
    high_NK = (index_NK >> np.uint64(32)).astype(np.uint32) * HIGH_WORD
    return torch.from_numpy(high_NK.view(np.int32)).to(device)


def _sum_bytes(x: torch.Tensor, spare: torch.Tensor) -> None:
    """The sum of the four bytes of each word, in place."""
    torch.bitwise_right_shift(x, 8, out=spare)
    spare &= _BYTE_PAIRS
    x &= _BYTE_PAIRS
    x += spare
    torch.bitwise_right_shift(x, 16, out=spare)
    x &= 0xFFFF
    x += spare
