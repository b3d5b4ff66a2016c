"""From canonical weights to the arrays of one rank: slice, shard, cast or quantise, pad, pack.

Works a few row tiles at a time, so that memory does not grow with the model. Used by the build
(which writes them to a file) and by sessions of dummy engines (which keep them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np

from puna.errors import CheckpointError
from puna.layout import TILE, pack_dense, pack_quantised
from puna.quant import DTYPES, Array, Format, QuantTensor, all_finite, quantize, to_float32
from puna.rank_file import RankWeight
from puna.weights import Extent

# Weights handled at once: 16 MiB as float32. Larger chunks are no faster and cost memory.
CHUNK_WEIGHTS = 4 * 2**20


class WeightSource(Protocol):
    """The part of a checkpoint that sharding needs (see `puna.checkpoint.Checkpoint`)."""

    def format(self, name: str) -> Format: ...
    def load(self, name: str, rows: slice = ..., cols: slice = ...) -> Array: ...
    def load_quantized(self, name: str, rows: slice = ..., cols: slice = ...) -> QuantTensor: ...


def rank_rows(weight: RankWeight, source: WeightSource) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (first, stored arrays by full name) until every row of the rank's tensor is given.

    `first` is where the arrays belong on the first axis of the stored ones, which counts what the
    layout of a matrix says, and numbers of a vector. Raises CheckpointError for values that are
    not finite or do not fit the stored dtype.
    """
    first = 0
    for part, rows in zip(weight.weight.parts, weight.rows, strict=True):
        step = max(1, CHUNK_WEIGHTS // weight.num_cols // TILE) * TILE
        for at in range(0, rows.size, step):
            chunk = Extent(
                min(rows.start + at, rows.stop),
                min(rows.start + at + step, rows.stop),
                min(step, rows.size - at),
            )
            if weight.weight.is_matrix:
                arrays = _matrix_rows(part.name, chunk, weight, source)
                named = {f"{weight.name}.{suffix}": array for suffix, array in arrays.items()}
            else:
                named = {weight.name: _vector(part.name, chunk, source)}
            yield first, named
            first += len(next(iter(named.values())))


def _vector(name: str, rows: Extent, source: WeightSource) -> Array:
    out = np.zeros(rows.size, np.float32)
    out[: rows.num_source] = to_float32(_finite(name, source.load(name, rows.source)))
    return out


def _matrix_rows(
    name: str, rows: Extent, weight: RankWeight, source: WeightSource
) -> dict[str, Array]:
    fmt, cols = weight.format, weight.cols
    if not fmt.is_dense and source.format(name) == fmt:
        kept = source.load_quantized(name, rows.source, cols.source)
        for values in (kept.scale_NG, kept.min_NG):
            if values is not None:
                _finite(name, values)
        return pack_quantised(weight.layout, _pad_quantised(kept, rows.size, cols.size))
    x_NK = _finite(name, source.load(name, rows.source, cols.source))
    if fmt.is_dense:
        return pack_dense(weight.layout, _pad(_cast(name, x_NK, fmt), rows.size, cols.size))
    padded_NK = _pad(to_float32(x_NK), rows.size, cols.size)
    return pack_quantised(weight.layout, quantize(padded_NK, fmt))


def _finite(name: str, x: Array) -> Array:
    if not all_finite(x):
        raise CheckpointError(f"{name} holds NaN or infinite values: get the checkpoint again")
    return x


def _cast(name: str, x: Array, fmt: Format) -> Array:
    dtype = DTYPES[fmt.dtype]
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        out = to_float32(x).astype(dtype)
    if not all_finite(out):
        raise CheckpointError(
            f"{name} holds values beyond the range of {fmt.dtype}: "
            "build with --dtype bfloat16 or float32"
        )
    return out


def _pad(x: Array, num_rows: int, num_cols: int) -> Array:
    if x.shape == (num_rows, num_cols):
        return x
    return np.pad(x, ((0, num_rows - x.shape[0]), (0, num_cols - x.shape[1])))


def _pad_quantised(x: QuantTensor, num_rows: int, num_cols: int) -> QuantTensor:
    """Padding with q, scale and min all zero stands for weights of zero in every format."""
    num_groups = x.format.num_groups(num_cols)
    min_NG = None if x.min_NG is None else _pad(x.min_NG, num_rows, num_groups)
    q_NK, scale_NG = _pad(x.q_NK, num_rows, num_cols), _pad(x.scale_NG, num_rows, num_groups)
    return replace(x, q_NK=q_NK, scale_NG=scale_NG, min_NG=min_NG)
