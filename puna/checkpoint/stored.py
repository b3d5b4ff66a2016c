"""What file readers have in common: tensors as they lie in files, and a Checkpoint made of them.

Decides how slices, joined shards and interleaved RoPE rows become canonical rows. Knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from puna.checkpoint import FULL
from puna.errors import CheckpointError
from puna.quant import DTYPES, Array, Format, QuantTensor
from puna.spec import GenerationDefaults, ModelSpec

_FLOATS = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.float64): "float32"}
)


class StoredTensor(Protocol):
    """One tensor of a checkpoint; the methods are those of `Checkpoint`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def format(self) -> Format: ...

    def load(self, rows: slice, cols: slice) -> Array: ...

    def load_quantized(self, rows: slice, cols: slice) -> QuantTensor: ...


@dataclass(frozen=True)
class DenseTensor:
    """Floats in one file, or in the shards of several, joined along `axis`.

    `head_dim` says that rows are interleaved RoPE pairs of heads that long (0: as they should be).
    `label` is the file's own word for the dtype.
    """

    parts: tuple[Array, ...]
    label: str
    axis: int = 0
    head_dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def format(self) -> Format:
        if name := _FLOATS.get(self.parts[0].dtype):
            return Format.dense(name)
        raise CheckpointError(
            f"weights of type {self.label} are not supported; puna reads float32, float16, "
            "bfloat16 and float64 (use the checkpoint's unquantised form, or its GGUF)"
        )

    def load(self, rows: slice, cols: slice) -> Array:
        if self.head_dim:
            return load_half_split(self._load, self.shape[0], self.head_dim, rows, cols)
        return self._load(rows, cols)

    def _load(self, rows: slice, cols: slice) -> Array:
        shape = self.shape
        wanted = [span(rows, shape[0])]
        if len(shape) > 1:
            wanted.append(span(cols, shape[1]))
        pieces, end = [], 0
        for part in self.parts:
            start, end = end, end + part.shape[self.axis]
            lo, hi = max(wanted[self.axis][0], start), min(wanted[self.axis][1], end)
            if lo < hi or (part is self.parts[-1] and not pieces):
                bounds = list(wanted)
                bounds[self.axis] = (lo - start, max(hi, lo) - start)
                pieces.append(part[tuple(slice(*b) for b in bounds)])
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)
        with np.errstate(
            over="ignore"
        ):  # float64 beyond float32: infinite, which the caller checks
            return np.ascontiguousarray(joined, dtype=DTYPES[self.format.dtype])

    def load_quantized(self, rows: slice, cols: slice) -> QuantTensor:
        raise AssertionError(f"a {self.label} tensor has no blocks; use load")


def span(part: slice, size: int) -> tuple[int, int]:
    """(start, stop) of a slice of `size` items; slices of tensors have no step."""
    start, stop, step = part.indices(size)
    assert step == 1, part
    return start, max(start, stop)


def load_half_split(
    load: Callable[[slice, slice], Array], num_rows: int, head_dim: int, rows: slice, cols: slice
) -> Array:
    """Canonical (half-split) rows, from a `load` whose rows are interleaved.

    Meta and GGUF rotate the pairs (2i, 2i + 1) of a head, puna the pairs (i, i + E/2): canonical
    row h*E + j*E/2 + i is stored row h*E + 2*i + j. Whole heads are read: at most two more.
    """
    start, stop = span(rows, num_rows)
    first = start // head_dim * head_dim
    stored = load(slice(first, min(-(-stop // head_dim) * head_dim, num_rows)), cols)
    return stored[interleaved_rows(start, stop, head_dim) - first]


def interleaved_rows(start: int, stop: int, head_dim: int) -> Array:
    """Stored (interleaved) row of each canonical row start..stop-1: int64 [stop - start].

    >>> interleaved_rows(0, 8, 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    head, row = np.divmod(np.arange(start, stop), head_dim)
    half, i = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * i + half


@dataclass(frozen=True)
class FileCheckpoint:
    """A `Checkpoint` whose tensors are known by canonical name; built by the format's `open_…`."""

    kind: str
    source: str
    spec: ModelSpec
    generation: GenerationDefaults
    tensors: Mapping[str, StoredTensor]
    read_tokenizer: Callable[[], dict[str, bytes]]
    weight_files: tuple[Path, ...]
    remarks: tuple[str, ...] = ()

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def format(self, name: str) -> Format:
        try:
            return self._tensor(name).format
        except CheckpointError as error:
            raise CheckpointError(f"{self.source}: {name}: {error}") from None

    def load(self, name: str, rows: slice = FULL, cols: slice = FULL) -> Array:
        """As in `Checkpoint`; C-contiguous, and possibly a read-only view of the file."""
        return self._tensor(name).load(rows, cols)

    def load_quantized(self, name: str, rows: slice = FULL, cols: slice = FULL) -> QuantTensor:
        return self._tensor(name).load_quantized(rows, cols)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} has no tensor {name}")
        return self.tensors[name]

    def notes(self) -> tuple[str, ...]:
        return self.remarks

    def files(self) -> tuple[Path, ...]:
        return self.weight_files

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.read_tokenizer()

    def close(self) -> None:
        """Nothing to do: a map goes with the last array over it."""


def require_readable(tensors: Mapping[str, StoredTensor], where: str, names: Iterable[str]) -> None:
    """CheckpointError for the first tensor whose type puna cannot read, so that opening tells."""
    for name in names:
        try:
            _ = tensors[name].format
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {name}: {error}") from None
