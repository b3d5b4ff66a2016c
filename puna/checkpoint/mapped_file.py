"""MappedFile: a file in the address space, and bounds-checked arrays over it.

The one place where offsets and shapes from a file's header become arrays; knows no file format.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.quant import Array


class MappedFile:
    """A read-only memory map of `path`; its pages belong to the file, not to this process.

    The map lives as long as an array over it does, so there is nothing to close.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                self.data: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
                )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot read {path}: {reason}") from None
        if not size:
            raise CheckpointError(f"{path} is empty; download it again")
        self.size = size

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of the bytes [start, stop); CheckpointError when the file ends before."""
        if not 0 <= start <= stop <= self.size:
            raise self.ends_early(stop)
        return self.data[start:stop]

    def array(
        self,
        start: int,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> Array:
        """An array over the file from byte `start`; `strides` in elements, C order without."""
        num_bytes = prod(shape) * dtype.itemsize
        if strides is not None and num_bytes:
            span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            num_bytes = (span + 1) * dtype.itemsize
        if start < 0 or start + num_bytes > self.size:
            raise self.ends_early(start + num_bytes)
        if not num_bytes:
            if max(shape) >= 2**31:  # NumPy cannot describe every empty shape that a header can
                raise self.damaged(f"it declares a tensor of shape {shape}")
            return np.zeros(shape, dtype)
        byte_strides = None if strides is None else tuple(step * dtype.itemsize for step in strides)
        return np.ndarray(shape, dtype, self.data, start, byte_strides)

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; download it again")

    def ends_early(self, needed: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is cut short or damaged: it has {self.size} bytes, its header needs "
            f"{needed}; download it again"
        )


def check_no_overlap(path: Path, spans: Iterable[tuple[int, int, str]]) -> None:
    """CheckpointError when two tensors (start, stop, name) share bytes: a header entry is wrong."""
    end, owner = 0, ""
    for start, stop, name in sorted(span for span in spans if span[0] < span[1]):
        if start < end:
            raise CheckpointError(
                f"{path} is damaged: {owner} and {name} share bytes; download it again"
            )
        end, owner = stop, name
