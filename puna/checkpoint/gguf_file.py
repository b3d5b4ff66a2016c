"""The GGUF container, versions 2 and 3: metadata and tensor descriptions, checked against the file.

Every length in the header is checked against the bytes that are left before anything is allocated.
Knows no model and no arithmetic; the block formats are in `gguf_blocks`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from puna.checkpoint.fields import brief
from puna.checkpoint.mapped_file import MappedFile, check_no_overlap
from puna.errors import CheckpointError

_SCALARS = MappingProxyType({  # value type -> struct code
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
})  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's description; `shape` is puna's order, GGUF's reversed (rows first)."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the data


@dataclass(frozen=True)
class GgufFile:
    file: MappedFile
    metadata: dict[
        str, Any
    ]  # str, int, float, bool, numeric numpy arrays, lists of str or of lists
    tensors: dict[str, GgufTensor]
    data_start: int

    def rows(self, tensor: GgufTensor, row_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, uint8 [N, row_bytes] over the file."""
        shape = (prod(tensor.shape[:-1]), row_bytes)
        return self.file.array(self.data_start + tensor.offset, np.dtype(np.uint8), shape)


def read_gguf(path: Path) -> GgufFile:
    """Parse a file's header. Raises CheckpointError when it is damaged or of another version."""
    file = MappedFile(path)
    cursor = _Cursor(file)
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file; download it again")
    version = cursor.scalar("I")
    if version not in (2, 3):
        is_big = version and version & 0xFFFF == 0
        what = "is a big-endian GGUF file" if is_big else f"is GGUF version {version}"
        raise CheckpointError(f"{path} {what}; puna reads versions 2 and 3, little endian")
    num_tensors, num_keys = cursor.count(24), cursor.count(12)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise file.damaged(f"{brief(key)} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    tensors = {}
    for _ in range(num_tensors):
        tensor = cursor.tensor()
        if tensor.name in tensors:
            raise file.damaged(f"tensor {brief(tensor.name)} occurs twice")
        tensors[tensor.name] = tensor
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise file.damaged(f"general.alignment is {brief(alignment)}, no power of two")
    return GgufFile(file, metadata, tensors, -(-cursor.at // alignment) * alignment)


def check_spans(gguf: GgufFile, num_bytes: dict[str, int]) -> None:
    """CheckpointError when tensors of these sizes overlap or reach beyond the file."""
    spans = []
    for name, size in num_bytes.items():
        start = gguf.data_start + gguf.tensors[name].offset
        if start + size > gguf.file.size:
            raise gguf.file.ends_early(start + size)
        spans.append((start, start + size, name))
    check_no_overlap(gguf.file.path, spans)


class _Cursor:
    """Reads little-endian values one after the other; CheckpointError at the end of the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0

    def take(self, size: int) -> bytes:
        data = self.file.bytes(self.at, self.at + size)
        self.at += size
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each, that fit in what is left."""
        count = self.scalar("Q")
        if count * smallest > self.file.size - self.at:
            raise self.file.ends_early(self.at + count * smallest)
        return count

    def string(self) -> str:
        return self.take(self.count(1)).decode("utf-8", "surrogateescape")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _FLOAT32:  # as it was written: 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(self.scalar("f"))))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise self.file.damaged(f"value type {kind} at byte {self.at}")
        kind = self.scalar("I")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            count = self.count(dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return [self.value(kind, depth + 1) for _ in range(self.count(8))]

    def tensor(self) -> GgufTensor:
        name = self.string()
        num_dims = self.scalar("I")
        if num_dims > _MAX_DIMS:
            raise self.file.damaged(f"{brief(name)} has {num_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(num_dims))[::-1]
        return GgufTensor(name, shape or (1,), self.scalar("I"), self.scalar("Q"))
