"""Attention of a decode step on sm_90 (csrc/attend_sm90.cu): which engines have it, its shared
memory, and what that leaves to the products beside it.

Pure, from `EngineConfig`.
"""

from __future__ import annotations

from puna.engine import EngineConfig
from puna.weights import extent

NUM_WARPS = 4
MAX_SEQS = 64
# Of keys or values, the innermost dimension first: half a stage or all of one.
CACHE_BOX = (64, 32, 1)
MAX_SHARED = 227 * 1024  # of a CTA, bytes
_OF_A_MULTIPROCESSOR, _RESERVED = 228 * 1024, 1024  # reserved: of each CTA
_RING_BYTES = 16 * 1024  # of a warp
# Most registers of a thread, and of one of the products beside it: of each quarter of a
# multiprocessor one warp of attention and two of a product share 512 a lane.
REGISTERS, REGISTERS_BESIDE = 200, 152


def has_attend(config: EngineConfig) -> bool:
    if config.target != "sm_90" or config.world_size > 1:
        return False
    group, head_dim, _ = _sizes(config)
    return group <= 8 and head_dim in (64, 128) and config.limits.block_size % CACHE_BOX[1] == 0


def max_seqs(config: EngineConfig) -> int:
    """Sequences of a batch that it can attend for."""
    return min(config.limits.max_batch_size, MAX_SEQS)


def attend_shared_bytes(group: int, head_dim: int, seqs: int) -> int:
    """Rings and their barriers, what warps leave each other, and a table of the sequences."""
    pieces = (NUM_WARPS - 1) * piece_numbers(group, head_dim) * 4
    barriers = NUM_WARPS * (_num_stages(head_dim) + 1) * 8
    return NUM_WARPS * _RING_BYTES + pieces + barriers + (seqs + 3) * 4


def room_beside(group: int, head_dim: int) -> int:
    """Bytes of shared memory that a CTA may have to be resident beside one of attention."""
    taken = attend_shared_bytes(group, head_dim, MAX_SEQS)
    return _OF_A_MULTIPROCESSOR - taken - 2 * _RESERVED


def room_beside_attend(config: EngineConfig) -> int:
    """`room_beside` of an engine."""
    group, head_dim, _ = _sizes(config)
    return room_beside(group, head_dim)


def piece_numbers(group: int, head_dim: int) -> int:
    """Of a part of a task: weighted values, largest score and sum of each query."""
    return group * (head_dim + 2)


def attend_pieces(config: EngineConfig, num_ctas: int) -> tuple[int, ...]:
    """Shape of the parts of tasks that CTAs leave each other."""
    group, head_dim, _ = _sizes(config)
    return num_ctas, 2, piece_numbers(group, head_dim)


def attend_defines(config: EngineConfig) -> dict[str, int]:
    """Macros of the source."""
    group, head_dim, num_heads = _sizes(config)
    return {
        "BF16": int(config.dtype == "bfloat16"),
        "HEADS": num_heads,
        "KV_HEADS": num_heads // group,
        "HEAD_DIM": head_dim,
        "KV_BLOCK": config.limits.block_size,
        "MAX_SEQS": max_seqs(config),
        "KV_STAGES": _num_stages(head_dim),
        "SHARED": attend_shared(config),
        "REGISTERS": REGISTERS,
    }


def attend_shared(config: EngineConfig) -> int:
    """Bytes of dynamic shared memory of the engine's kernel."""
    group, head_dim, _ = _sizes(config)
    return attend_shared_bytes(group, head_dim, max_seqs(config))


def _num_stages(head_dim: int) -> int:
    """Of a warp's ring: a stage is 32 tokens of keys or of values."""
    return _RING_BYTES // (CACHE_BOX[1] * head_dim * 2)


def _sizes(config: EngineConfig) -> tuple[int, int, int]:
    """Query heads of a KV head, head_dim, query heads; of rank 0."""
    spec, mapping = config.spec, config.mapping(0)
    num_heads = extent("heads", spec.q_size, spec, mapping).size // spec.head_dim
    num_kv_heads = extent("kv_heads", spec.kv_size, spec, mapping).size // spec.head_dim
    return num_heads // num_kv_heads, spec.head_dim, num_heads
