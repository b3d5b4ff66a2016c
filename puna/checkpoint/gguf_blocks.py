"""GGUF's block formats unpacked exactly: bytes to `QuantTensor`, with no requantisation.

`QuantTensor.dequantize` of the result equals the `gguf` package's float32 values bit for bit. For
the K formats a scale is d * sc in float32, which is how ggml computes it on the fly. Knows nothing
of files and names.

Shape suffixes: B blocks, R bytes a block, G groups a block, E numbers a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from puna.quant import Array, Format, QuantTensor

Parts = tuple[Array, Array, Array | None]  # q [B, block_size], scale [B, G], min [B, G] or None


@dataclass(frozen=True)
class BlockFormat:
    """One block type: `block_size` numbers in `block_bytes` bytes, held exactly by `format`."""

    name: str
    block_size: int
    block_bytes: int
    format: Format
    unpack: Callable[[Array], Parts]  # uint8 [B, block_bytes]


def unpack_rows(rows_NR: Array, kind: BlockFormat) -> QuantTensor:
    """uint8 [N, bytes a row] -> QuantTensor [N, K]."""
    num_rows, blocks_a_row = rows_NR.shape[0], rows_NR.shape[1] // kind.block_bytes
    with np.errstate(
        invalid="ignore"
    ):  # infinite scales: whoever streams the values looks for them
        blocks = np.ascontiguousarray(rows_NR).reshape(-1, kind.block_bytes)
        q, scale, minimum = kind.unpack(blocks)

    def by_row(x: Array) -> Array:
        return np.ascontiguousarray(x).reshape(num_rows, blocks_a_row * x.shape[1])

    return QuantTensor(
        kind.format, by_row(q), by_row(scale), None if minimum is None else by_row(minimum)
    )


def _half(blocks_BR: Array, at: int) -> Array:
    """The float16 at byte `at` of each block: [B, 1]."""
    return np.ascontiguousarray(blocks_BR[:, at : at + 2]).view(np.float16)


def _nibbles(packed_BR: Array, run: int) -> Array:
    """Runs of `run` bytes: the low nibbles are `run` numbers, the high ones the next `run`."""
    num_blocks, num_bytes = packed_BR.shape
    runs = packed_BR.reshape(num_blocks, num_bytes // run, run)
    return np.stack((runs & 15, runs >> 4), axis=2).reshape(num_blocks, 2 * num_bytes)


def _fifth_bits(packed_BR: Array) -> Array:
    """32 bits, one a number: uint8 [B, 32] of 0 or 16."""
    return np.unpackbits(packed_BR, axis=1, bitorder="little") << 4


def _q4_0(x: Array) -> Parts:
    return _nibbles(x[:, 2:], 16).view(np.int8) - np.int8(8), _half(x, 0), None


def _q4_1(x: Array) -> Parts:
    return _nibbles(x[:, 4:], 16), _half(x, 0), _half(x, 2)


def _q5_0(x: Array) -> Parts:
    q = _nibbles(x[:, 6:], 16) | _fifth_bits(x[:, 2:6])
    return q.view(np.int8) - np.int8(16), _half(x, 0), None


def _q5_1(x: Array) -> Parts:
    return _nibbles(x[:, 8:], 16) | _fifth_bits(x[:, 4:8]), _half(x, 0), _half(x, 2)


def _q8_0(x: Array) -> Parts:
    return x[:, 2:].view(np.int8), _half(x, 0), None


def _k_scales(x: Array) -> tuple[Array, Array]:
    """Scale and minimum of the 8 groups of a Q4_K or Q5_K block: float32 [B, 8] each.

    Twelve bytes hold 8 + 8 six-bit numbers: the first four of each whole in bytes 0-3 and 4-7, the
    last four as a nibble in bytes 8-11 with their upper two bits on top of bytes 0-3 and 4-7.
    """
    low, mid, high = x[:, 4:8], x[:, 8:12], x[:, 12:16]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    minima = np.concatenate((mid & 63, (high >> 4) | (mid >> 6 << 4)), axis=1)
    return (
        _half(x, 0).astype(np.float32) * scales.astype(np.float32),
        -(_half(x, 2).astype(np.float32) * minima.astype(np.float32)),
    )


def _q4_k(x: Array) -> Parts:
    return _nibbles(x[:, 16:], 32), *_k_scales(x)


def _q5_k(x: Array) -> Parts:
    # Byte i of the 32 upper-bit bytes holds number i of all 8 groups, group g in bit g.
    groups = np.arange(8, dtype=np.uint8)[:, None]
    upper = (x[:, None, 16:48] >> groups & 1) << 4
    return _nibbles(x[:, 48:], 32) | upper.reshape(len(x), 256), *_k_scales(x)


def _q6_k(x: Array) -> Parts:
    # Two halves of 128 numbers; in each, 32 bytes hold the upper two bits of four runs of 32.
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    upper = (x[:, 128:192].reshape(len(x), 2, 1, 32) >> shifts & 3) << 4
    q = _nibbles(x[:, :128], 64) | upper.reshape(len(x), 256)
    scale = _half(x, 208).astype(np.float32) * x[:, 192:208].view(np.int8).astype(np.float32)
    return q.view(np.int8) - np.int8(32), scale, None


BLOCK_FORMATS: tuple[tuple[int, BlockFormat], ...] = tuple(  # by GGML type number
    (number, BlockFormat(name, size, num_bytes, Format.parse(fmt), unpack))
    for number, name, size, num_bytes, fmt, unpack in (
        (2, "Q4_0", 32, 18, "int4-g32", _q4_0),
        (3, "Q4_1", 32, 20, "int4-g32-min", _q4_1),
        (6, "Q5_0", 32, 22, "int8-g32", _q5_0),
        (7, "Q5_1", 32, 24, "int8-g32-min", _q5_1),
        (8, "Q8_0", 32, 34, "int8-g32", _q8_0),
        (12, "Q4_K", 256, 144, "int4-g32-min-f32", _q4_k),
        (13, "Q5_K", 256, 176, "int8-g32-min-f32", _q5_k),
        (14, "Q6_K", 256, 210, "int8-g16-f32", _q6_k),
    )
)
