"""The safetensors container: its header checked against the file, its tensors as arrays over it.

Knows nothing of models. Layout: 8 bytes header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from puna.checkpoint.fields import brief
from puna.checkpoint.mapped_file import MappedFile, check_no_overlap
from puna.checkpoint.stored import DenseTensor
from puna.errors import CheckpointError

_LARGEST_HEADER = 100 << 20  # the reference implementation's limit

# The types that are no floats are listed for their size: such a tensor can be named, not loaded.
_DTYPES: MappingProxyType[str, np.dtype[Any]] = MappingProxyType(
    {
        name: np.dtype(dtype)
        for name, dtype in {
            "F64": np.float64,
            "F32": np.float32,
            "F16": np.float16,
            "BF16": ml_dtypes.bfloat16,
            "BOOL": np.bool_,
            "U8": np.uint8,
            "I8": np.int8,
            "F8_E4M3": np.uint8,
            "F8_E5M2": np.uint8,
            "F8_E8M0": np.uint8,
            "U16": np.uint16,
            "I16": np.int16,
            "U32": np.uint32,
            "I32": np.int32,
            "U64": np.uint64,
            "I64": np.int64,
        }.items()
    }
)


def read_safetensors(path: Path) -> dict[str, DenseTensor]:
    """Tensors of one file by their own names; CheckpointError when the file is damaged."""
    file = MappedFile(path)
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > _LARGEST_HEADER:
        raise CheckpointError(
            f"{path} is no safetensors file: its header would be {length} bytes long"
        )
    try:
        header = json.loads(file.bytes(8, 8 + length).decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its header is not valid JSON; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is {brief(header)}; it must be an object")
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, start, stop = _tensor(file, 8 + length, name, entry)
        tensors[name] = tensor
        spans.append((start, stop, name))
    check_no_overlap(path, spans)
    return tensors


def _tensor(file: MappedFile, base: int, name: str, entry: Any) -> tuple[DenseTensor, int, int]:
    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)

    def wrong(what: str) -> CheckpointError:
        return file.damaged(f"{brief(name)}: {what}")

    if not isinstance(entry, dict):
        raise wrong("its header entry is no object")
    label: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(label, str) or not is_sizes(shape) or not is_sizes(offsets):
        raise wrong("dtype, shape or data_offsets are missing or malformed")
    if len(offsets) != 2 or len(shape) > 8:
        raise wrong(f"shape {brief(shape)} and offsets {brief(offsets)} make no tensor")
    if label not in _DTYPES:
        raise CheckpointError(
            f"{file.path}: {brief(name)} has type {brief(label)}; puna reads F32, F16, BF16 and F64"
        )
    dtype = _DTYPES[label]
    needed = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise wrong(f"{label} {brief(shape)} is {needed} bytes, found {offsets[1] - offsets[0]}")
    array = file.array(base + offsets[0], dtype, tuple(shape))
    return DenseTensor((array,), label), base + offsets[0], base + offsets[1]
