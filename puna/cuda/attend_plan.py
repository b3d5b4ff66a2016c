"""Attention of a decode step on sm_90 (csrc/attend_sm90.cu): which engines have it, its shared
memory, and what that leaves to the products beside it.

Pure, from `EngineConfig`.
"""

from __future__ import annotations

from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.engine import EngineConfig

NUM_WARPS = 4
MAX_SEQS = 64
STRETCH, EIGHT = 32, 8  # tokens of a copy; the latter where a context ends
MAX_SHARED = 227 * 1024  # of a CTA, bytes
OF_A_MULTIPROCESSOR, RESERVED = 228 * 1024, 1024  # reserved: of each CTA
_RING_BYTES = 16 * 1024  # of a warp
# Most registers of a thread, and of one of the products beside it: of each quarter of a
# multiprocessor one warp of attention and two of a product share 512 a lane.
REGISTERS, REGISTERS_BESIDE = 208, 152


def has_attend(config: EngineConfig) -> bool:
    if config.target != "sm_90" or config.world_size > 1:
        return False
    s = fused_shapes(config)
    return s.group <= 8 and s.head_dim in (64, 128) and config.limits.block_size % STRETCH == 0


def max_seqs(config: EngineConfig) -> int:
    """Sequences of a batch that it can attend for."""
    return min(config.limits.max_batch_size, MAX_SEQS)


def attend_shared_bytes(s: FusedShapes, seqs: int) -> int:
    """Rings and their barriers, what warps leave each other, and a table of the sequences."""
    pieces = (NUM_WARPS - 1) * _piece_numbers(s) * 4
    barriers = NUM_WARPS * (_num_eights(s) + 1) * 8
    return NUM_WARPS * _RING_BYTES + pieces + barriers + (seqs + 3) * 4


def room_beside(s: FusedShapes) -> int:
    """Bytes of shared memory that a CTA may have to be resident beside one of attention."""
    return OF_A_MULTIPROCESSOR - attend_shared_bytes(s, MAX_SEQS) - 2 * RESERVED


def attend_pieces(config: EngineConfig, num_ctas: int) -> tuple[int, ...]:
    """Shape of the parts of tasks that CTAs leave each other."""
    return num_ctas, 2, _piece_numbers(fused_shapes(config))


def attend_defines(config: EngineConfig) -> dict[str, int]:
    """Macros of the source."""
    s = fused_shapes(config)
    return {
        "BF16": int(config.dtype == "bfloat16"),
        "HEADS": s.num_heads,
        "KV_HEADS": s.num_kv_heads,
        "HEAD_DIM": s.head_dim,
        "KV_BLOCK": config.limits.block_size,
        "MAX_SEQS": max_seqs(config),
        "KV_EIGHTS": _num_eights(s),
        "SHARED": attend_shared_bytes(s, max_seqs(config)),
        "REGISTERS": REGISTERS,
    }


def _piece_numbers(s: FusedShapes) -> int:
    """Of a part of a task: weighted values, largest score and sum of each query."""
    return s.group * (s.head_dim + 2)


def _num_eights(s: FusedShapes) -> int:
    """Of a warp's ring: eight tokens of keys or of values."""
    return _RING_BYTES // (EIGHT * s.head_dim * 2)
