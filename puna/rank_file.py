"""A rank's file: which tensors it holds, at which size and byte. Pure; follows from `EngineConfig`.

Files are safetensors (docs/engine-format.md). This file knows offsets and dtypes, not values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from puna.engine import CONFIG_FILE, EngineConfig
from puna.errors import EngineError
from puna.layout import ArraySpec, LayoutName, array_specs, check_layout
from puna.quant import DTYPES, Format
from puna.weights import EngineWeight, Extent, engine_weights, extent, on_rank

# Every array starts at a multiple of this many bytes of its file: a memory map can be read with
# aligned vector loads, and a copy on a GPU in whole cache lines.
ALIGNMENT = 128

_SAFETENSORS_DTYPES = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": DTYPES["bfloat16"],
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
    }
)


@dataclass(frozen=True)
class RankWeight:
    """One engine tensor as a rank holds it: padded size, and where each part's rows come from."""

    weight: EngineWeight
    format: Format
    layout: LayoutName
    rows: tuple[Extent, ...]  # one a part, in this order; a matrix has one
    cols: Extent

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def num_rows(self) -> int:
        return sum(rows.size for rows in self.rows)

    @property
    def num_cols(self) -> int:
        return self.cols.size

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, self.num_cols) if self.weight.is_matrix else (self.num_rows,)

    def array_specs(self) -> dict[str, ArraySpec]:
        """Stored arrays by full name. Vectors are one float32 array."""
        if not self.weight.is_matrix:
            return {self.name: (np.dtype(np.float32), self.shape)}
        specs = array_specs(self.layout, self.format, self.num_rows, self.num_cols)
        return {f"{self.name}.{suffix}": spec for suffix, spec in specs.items()}


def rank_weights(config: EngineConfig, rank: int) -> list[RankWeight]:
    """The schema of one rank: its tensors in the order of execution, which is also file order."""
    return list(_rank_weights(config, rank))


def _rank_weights(config: EngineConfig, rank: int) -> Iterator[RankWeight]:
    spec, mapping = config.spec, config.mapping(rank)
    multiples = {"ffn": config.ffn_multiple, "vocab": config.vocab_multiple}

    def held(axis: Any, size: int) -> Extent:
        return extent(axis, size, spec, mapping, multiples.get(axis, 1))

    for weight in on_rank(engine_weights(spec), spec, mapping):
        stored = config.weights.get(weight.name)
        if stored is None:
            raise EngineError(f"config.json declares no weight {weight.name}: rebuild the engine")
        rows = tuple(held(part.axes[0], part.shape[0]) for part in weight.parts)
        first = weight.parts[0]
        cols = held(first.axes[1], first.shape[1]) if weight.is_matrix else Extent(0, 1, 1)
        fmt, layout = Format.parse(stored.format), check_layout(stored.layout)
        yield RankWeight(weight, fmt, layout, rows, cols)


def rank_file_name(rank: int) -> str:
    return f"rank{rank}.safetensors"


@dataclass(frozen=True)
class StoredArray:
    """Where one array lies in a rank's file, in bytes from its start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class RankFile:
    """The exact bytes of a rank's file but for the arrays: header and offsets."""

    header: bytes
    arrays: dict[str, StoredArray]
    num_bytes: int


def rank_file(config: EngineConfig, rank: int, config_digest: str) -> RankFile:
    """Lay out a rank's safetensors file. Pure: the digest has a fixed length, so sizes never
    change.

    Gaps before aligned arrays are declared as U8 tensors named `_pad.N`, since safetensors allows
    none.
    """
    entries: dict[str, Any] = {
        "__metadata__": {
            "config_digest": config_digest,
            "format_version": str(config.format_version),
            "rank": str(rank),
        }
    }
    names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
    relative: dict[str, StoredArray] = {}
    end = 0
    for weight in rank_weights(config, rank):
        for name, (dtype, shape) in weight.array_specs().items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if start > end:
                pad = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
                entries[f"_pad.{len(entries)}"] = pad
            relative[name] = array = StoredArray(dtype, shape, start)
            end = start + array.num_bytes
            offsets = [start, end]
            entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    base = 8 + len(header)
    arrays = {
        name: StoredArray(array.dtype, array.shape, base + array.offset)
        for name, array in relative.items()
    }
    return RankFile(len(header).to_bytes(8, "little") + header, arrays, base + end)


def check_rank_file(path: Path, layout: RankFile) -> None:
    """Raise EngineError unless the file has the size and the header that its config asks for."""
    with path.open("rb") as file:
        is_right = file.read(len(layout.header)) == layout.header
    size = path.stat().st_size
    if not is_right or size != layout.num_bytes:
        raise EngineError(
            f"{path} ({size:,} bytes) does not fit {CONFIG_FILE} beside it, which asks for "
            f"{layout.num_bytes:,} bytes: build the engine again"
        )
