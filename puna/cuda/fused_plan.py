"""What the fused decode kernels of sm_90 for one token are compiled with, and need
(csrc/decode_sm90.cu).

Pure, from `EngineConfig`: which engines have them, their constants, shared memory and scratch. The
kernels check the bytes of shared memory against their own layout when they are compiled.
"""

from __future__ import annotations

from puna.cuda.attend_plan import MAX_SHARED
from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.engine import EngineConfig

KERNELS = ("qkv", "out", "gate_up", "down", "head")
MAX_SPLITS = 16  # parts of a context in attention
TILE = 16  # rows of a matrix that a CTA takes at a time
# Mirrors of constants in the sources.
_WARPS, _CHUNK = 8, 256
_STAGE_BYTES = TILE * _CHUNK * 2


def has_fused(config: EngineConfig) -> bool:
    """Whether the engine's target and its sizes have them."""
    if config.target != "sm_90" or config.world_size > 1:
        return False
    s = fused_shapes(config)
    # Whole chunks, and at least one for every warp.
    least = _CHUNK * _WARPS
    sizes_fit = all(size % _CHUNK == 0 and size >= least for size in (s.hidden, s.q_size, s.ffn))
    if not sizes_fit or s.head_dim not in (64, 128) or s.group > 8:
        return False
    return all(num_stages(s, kernel) >= 2 for kernel in KERNELS)


def num_stages(s: FusedShapes, kernel: str) -> int:
    """Stages of a warp's ring."""
    # Three are 1.5 % of a step faster than two, but not where few heads of keys leave attention to
    # few CTAs: there qkv of two is 1 % faster (H200, 2026-11-26).
    room = MAX_SHARED - _other_bytes(s, kernel)
    most = 2 if kernel == "qkv" and s.group > 1 else 3
    return min(room // (_WARPS * (_STAGE_BYTES + 8)), most)


def shared_bytes(s: FusedShapes, kernel: str) -> int:
    """Bytes of dynamic shared memory: `Shared<...>::TOTAL` of the source."""
    return _WARPS * num_stages(s, kernel) * (_STAGE_BYTES + 8) + _other_bytes(s, kernel)


def _other_bytes(s: FusedShapes, kernel: str) -> int:
    """Shared memory beside the rings and their barriers."""
    buffers = 2 * _WARPS
    parts = buffers * _WARPS * TILE * 4
    work = max(s.num_cols(kernel) * 2 + parts, _merge_bytes(s, kernel))
    return work + buffers * 8 + (_WARPS + 8) * 4


def _merge_bytes(s: FusedShapes, kernel: str) -> int:
    """What two teams of warps add up in, of a task of attention each."""
    return 2 * _WARPS * s.group * (s.head_dim + 2) * 4 if kernel == "qkv" else 0


def weight_box(
    s: FusedShapes, kernel: str, num_rows: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A kernel's matrix of `num_rows` rows as a tensor of three dimensions, the innermost first,
    and the box of it that is one copy: a chunk of the rows that belong together."""
    num_cols = s.num_cols(kernel)
    if kernel == "qkv":
        half = s.head_dim // 2
        return (num_cols, half, num_rows // half), (_CHUNK, TILE // 2, 2)
    if kernel == "gate_up":
        return (num_cols, s.ffn, 2), (_CHUNK, TILE // 2, 2)
    return (num_cols, num_rows, 1), (_CHUNK, TILE, 1)


def fused_defines(config: EngineConfig) -> dict[str, int | str]:
    """Macros of the source."""
    s = fused_shapes(config)
    return {
        **layer_defines(config),
        "ROWS": 1,
        **{f"SHARED_{kernel}": shared_bytes(s, kernel) for kernel in KERNELS},
        **{f"STAGES_{kernel}": num_stages(s, kernel) for kernel in KERNELS},
    }


def layer_defines(config: EngineConfig) -> dict[str, int | str]:
    """Macros of a layer's sizes, for whichever number of tokens."""
    s, spec = fused_shapes(config), config.spec
    return {
        "BF16": int(config.dtype == "bfloat16"),
        "HIDDEN": s.hidden,
        "HEADS": s.num_heads,
        "KV_HEADS": s.num_kv_heads,
        "HEAD_DIM": s.head_dim,
        "FFN": s.ffn,
        "VOCAB": spec.vocab_size,
        "KV_BLOCK": config.limits.block_size,
        "EPS": f"{spec.rms_norm_eps!r}f",
        "ATTENTION_BIAS": int(spec.attention_bias),
        "MLP_BIAS": int(spec.mlp_bias),
    }
