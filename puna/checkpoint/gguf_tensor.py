"""Tensors of a GGUF file as `StoredTensor`s: floats, blocks that puna holds exactly, other blocks.

Decides which of the three a type is. Blocks that no puna format holds (Q2_K, Q3_K, IQ, ...) are
dequantised by the `gguf` package, imported only for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from puna.checkpoint.fields import brief
from puna.checkpoint.gguf_blocks import BLOCK_FORMATS, BlockFormat, unpack_rows
from puna.checkpoint.gguf_file import GgufFile, GgufTensor
from puna.checkpoint.stored import (
    DenseTensor,
    StoredTensor,
    interleaved_rows,
    load_half_split,
    span,
)
from puna.errors import CheckpointError
from puna.quant import Array, Format, QuantTensor

_FLOATS: MappingProxyType[int, tuple[str, np.dtype[Any]]] = MappingProxyType(
    {
        0: ("F32", np.dtype(np.float32)),
        1: ("F16", np.dtype(np.float16)),
        28: ("F64", np.dtype(np.float64)),
        30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
    }
)
_BLOCKS = MappingProxyType(dict(BLOCK_FORMATS))
_CHUNK = 1 << 20  # numbers dequantised at a time


@dataclass(frozen=True)
class BlockTensor:
    """Rows of blocks. `unpack` gives a QuantTensor, or is None and `dequantize` gives floats."""

    rows_NR: Array  # uint8 [N, bytes a row], over the file
    num_cols: int
    name: str
    block_size: int
    block_bytes: int
    kind: BlockFormat | None
    dequantize: Callable[[Array], Array] | None
    head_dim: int = 0  # rows are interleaved RoPE pairs of heads that long (0: as they should be)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows_NR.shape[0], self.num_cols)

    @property
    def format(self) -> Format:
        return self.kind.format if self.kind else Format.dense("float32")

    def load(self, rows: slice, cols: slice) -> Array:
        if self.head_dim:
            return load_half_split(self._floats, self.shape[0], self.head_dim, rows, cols)
        return self._floats(rows, cols)

    def _floats(self, rows: slice, cols: slice) -> Array:
        start, stop = span(rows, self.shape[0])
        first, last = span(cols, self.num_cols)
        out = np.empty((stop - start, last - first), np.float32)
        step = max(1, _CHUNK // max(1, last - first))
        for at in range(start, stop, step):
            end = min(at + step, stop)
            blocks, skip = self._blocks(self.rows_NR[at:end], first, last)
            if not blocks.size:
                break
            with np.errstate(invalid="ignore"):  # whoever streams the values looks for NaN
                if self.kind:
                    values = unpack_rows(blocks, self.kind).dequantize()
                else:
                    assert self.dequantize is not None
                    values = self.dequantize(np.ascontiguousarray(blocks))
            out[at - start : end - start] = values[:, skip : skip + last - first]
        return out

    def _blocks(self, rows_NR: Array, first: int, last: int) -> tuple[Array, int]:
        """The whole blocks around columns first..last, and how many numbers come before `first`."""
        block = first // self.block_size
        end = -(-last // self.block_size)
        return rows_NR[
            :, block * self.block_bytes : end * self.block_bytes
        ], first % self.block_size

    def load_quantized(self, rows: slice, cols: slice) -> QuantTensor:
        """As in `Checkpoint`. Rows are taken whole, so un-permuting them touches no block."""
        assert self.kind is not None, f"{self.name} blocks have no exact format; use load"
        group = self.kind.format.group_size
        start, stop = span(rows, self.shape[0])
        first, last = span(cols, self.num_cols)
        assert first % group == 0, (cols, group)
        assert last % group == 0 or last == self.num_cols, (cols, group)
        if self.head_dim:
            rows_NR = self.rows_NR[interleaved_rows(start, stop, self.head_dim)]
        else:
            rows_NR = self.rows_NR[start:stop]
        blocks, skip = self._blocks(rows_NR, first, last)
        whole = unpack_rows(blocks, self.kind)
        by_group = slice(skip // group, skip // group + -(-(last - first) // group))
        return QuantTensor(
            whole.format,
            np.ascontiguousarray(whole.q_NK[:, skip : skip + last - first]),
            np.ascontiguousarray(whole.scale_NG[:, by_group]),
            None if whole.min_NG is None else np.ascontiguousarray(whole.min_NG[:, by_group]),
        )


def num_bytes(path: object, tensor: GgufTensor) -> int:
    """Size of a tensor in its file; CheckpointError for a type that puna cannot read."""
    size = 1
    for n in tensor.shape:
        size *= n
    if tensor.type in _FLOATS:
        return size * _FLOATS[tensor.type][1].itemsize
    name, block_size, block_bytes = block_type(path, tensor)
    if tensor.shape[-1] % block_size:
        raise CheckpointError(
            f"{path} is damaged: {brief(tensor.name)} has {tensor.shape[-1]} columns, {name} needs "
            f"a multiple of {block_size}; download it again"
        )
    return size // block_size * block_bytes


def block_type(path: object, tensor: GgufTensor) -> tuple[str, int, int]:
    """(name, numbers a block, bytes a block)."""
    if kind := _BLOCKS.get(tensor.type):
        return kind.name, kind.block_size, kind.block_bytes
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        number = GGMLQuantizationType(tensor.type)
        return number.name, *GGML_QUANT_SIZES[number]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path}: {brief(tensor.name)} has GGML type {tensor.type}, which is unknown; update "
            "the gguf package, or use another quantisation of the model (Q8_0, Q4_K_M, ...)"
        ) from None


def stored_tensor(gguf: GgufFile, tensor: GgufTensor, head_dim: int) -> StoredTensor:
    """The tensor, ready to load. Raises CheckpointError for blocks that nothing can dequantise."""
    path = gguf.file.path
    if tensor.type in _FLOATS:
        label, dtype = _FLOATS[tensor.type]
        array = gguf.file.array(gguf.data_start + tensor.offset, dtype, tensor.shape)
        return DenseTensor((array,), label, head_dim=head_dim)
    name, block_size, block_bytes = block_type(path, tensor)
    kind = _BLOCKS.get(tensor.type)
    rows_NR = gguf.rows(tensor, tensor.shape[-1] // block_size * block_bytes)
    dequantize = None if kind else _dequantizer(path, tensor, name, block_bytes)
    return BlockTensor(
        rows_NR, tensor.shape[-1], name, block_size, block_bytes, kind, dequantize, head_dim
    )


def _dequantizer(
    path: object, tensor: GgufTensor, name: str, block_bytes: int
) -> Callable[[Array], Array]:
    from gguf import GGMLQuantizationType, dequantize

    number = GGMLQuantizationType(tensor.type)
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), number)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: {brief(tensor.name)} has type {name}, which the gguf package cannot "
            "dequantise; use another quantisation of the model (Q8_0, Q4_K_M, ...)"
        ) from None
    return lambda rows_NR: dequantize(rows_NR, number)
