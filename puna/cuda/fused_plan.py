"""What the fused decode kernels of sm_90 are compiled with, and need: csrc/decode_sm90.cu for one
token, csrc/few_sm90.cu for a few.

Pure, from `EngineConfig`: which engines have them, for how many tokens, their constants, shared
memory and scratch. The kernels check the bytes of shared memory against their own layout when they
are compiled.
"""

from __future__ import annotations

from puna.cuda.attend_plan import MAX_SHARED, REGISTERS_BESIDE, room_beside
from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.engine import EngineConfig

# Kernels are compiled for up to so many tokens.
FUSED_ROWS = (1, 8, 16)
KERNELS = ("qkv", "out", "gate_up", "down", "head")
MAX_SPLITS = 16  # parts of a context in attention
TILE = 16  # rows of a matrix that a CTA takes at a time
CLUSTER = 2  # CTAs that share a tile where there are several tokens
# Mirrors of constants in the sources.
_WARPS, _CHUNK = 8, 256
_STAGE_BYTES = TILE * _CHUNK * 2
# Most 16-byte pieces of the input that a lane keeps in registers, and how many it should.
_MOST_PIECES, _USUAL_PIECES = 48, 32


def fused_rows(config: EngineConfig) -> tuple[int, ...]:
    """The numbers of rows for which the engine has fused kernels; () where its target or its sizes
    have none."""
    if config.target != "sm_90" or config.world_size > 1:
        return ()
    s = fused_shapes(config)
    # Whole chunks, and at least one for every warp.
    least = _CHUNK * _WARPS
    sizes_fit = all(size % _CHUNK == 0 and size >= least for size in (s.hidden, s.q_size, s.ffn))
    if not sizes_fit or s.head_dim not in (64, 128) or s.group > 8:
        return ()
    limit = config.limits.max_batch_size
    return tuple(
        rows
        for before, rows in zip((0, *FUSED_ROWS), FUSED_ROWS, strict=False)
        if before < limit and all(num_stages(s, kernel, rows) >= 2 for kernel in KERNELS)
    )


def num_stages(s: FusedShapes, kernel: str, rows: int) -> int:
    """Stages of a warp's ring."""
    # Three are 1.5 % of a step faster than two, but not where few heads of keys leave attention to
    # few CTAs: there qkv of two is 1 % faster (one token; H200, 2026-11-26).
    room = _room(s, kernel, rows) - _other_bytes(s, kernel, rows)
    most = 2 if kernel == "qkv" and s.group > 1 and rows == 1 else 3
    return min(room // (_WARPS * (_STAGE_BYTES + 8)), most)


def _room(s: FusedShapes, kernel: str, rows: int) -> int:
    """What a kernel may have of shared memory: attention of several tokens is resident beside the
    products in front of it and behind it."""
    return room_beside(s) if rows > 1 and kernel in ("qkv", "out") else MAX_SHARED


def shared_bytes(s: FusedShapes, kernel: str, rows: int) -> int:
    """Bytes of dynamic shared memory: `Shared<...>::TOTAL` of the source."""
    stages = num_stages(s, kernel, rows)
    return _WARPS * stages * (_STAGE_BYTES + 8) + _other_bytes(s, kernel, rows)


def register_units(s: FusedShapes, kernel: str, rows: int) -> int:
    """Units of 32 columns of a warp's input that it keeps in registers; of several tokens."""
    units, blocks = _units(s, kernel), rows // 8
    fewest = min(units, _USUAL_PIECES // blocks)
    room = _room(s, kernel, rows) - 2 * _WARPS * (_STAGE_BYTES + 8)
    for found in range(fewest, min(units, _MOST_PIECES // blocks)):
        if _few_bytes(s, kernel, rows, units - found) <= room:
            return found
    return min(units, _MOST_PIECES // blocks)


def _most_tiles(s: FusedShapes) -> int:
    """Whose sums `down` of several tokens keeps: all that two of 132 CTAs have, if not too many."""
    return min(-(-s.hidden // (TILE * (132 // CLUSTER))), 6)


def _registers(s: FusedShapes, kernel: str, rows: int) -> int:
    """Most registers of a thread; of several tokens. Where the input takes more there is no room
    for attention beside the kernel, which then begins when this one ends."""
    is_beside = kernel in ("qkv", "out")
    pieces = register_units(s, kernel, rows) * rows // 8
    return REGISTERS_BESIDE if is_beside and pieces <= _USUAL_PIECES // 2 else 255


def _units(s: FusedShapes, kernel: str) -> int:
    """Units of 32 columns that a warp has at a time of one of several tokens."""
    if kernel == "down":  # one chunk
        return _CHUNK // 32
    of_a_cta = -(-s.num_cols(kernel) // (_CHUNK * CLUSTER))
    return -(-of_a_cta // _WARPS) * (_CHUNK // 32)


def _other_bytes(s: FusedShapes, kernel: str, rows: int) -> int:
    """Shared memory beside the rings and their barriers."""
    if rows > 1:
        return _few_bytes(s, kernel, rows, _units(s, kernel) - register_units(s, kernel, rows))
    buffers = 2 * _WARPS
    parts = buffers * _WARPS * TILE * 4
    work = max(s.num_cols(kernel) * 2 + parts, _merge_bytes(s, kernel))
    return work + buffers * 8 + (_WARPS + 8) * 4


def _few_bytes(s: FusedShapes, kernel: str, rows: int, units_in_shared: int) -> int:
    sums, buffers = rows // 8 * 512, 32 // rows
    work = _WARPS * sums * (units_in_shared + buffers)
    barriers = (2 * buffers + 2 * _WARPS) * 8
    return work + _WARPS * sums + barriers + (_WARPS * rows * 2 + rows) * 4


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


def fused_defines(config: EngineConfig, rows: int) -> dict[str, int | str]:
    """Macros of the source."""
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
        "ROWS": rows,
        "ATTENTION_BIAS": int(spec.attention_bias),
        "MLP_BIAS": int(spec.mlp_bias),
        **{f"SHARED_{kernel}": shared_bytes(s, kernel, rows) for kernel in KERNELS},
        **{f"STAGES_{kernel}": num_stages(s, kernel, rows) for kernel in KERNELS},
        **{f"UNITS_{kernel}": register_units(s, kernel, rows) for kernel in KERNELS if rows > 1},
        **({"MOST_TILES": _most_tiles(s)} if rows > 1 else {}),
        **{f"REGISTERS_{kernel}": _registers(s, kernel, rows) for kernel in KERNELS if rows > 1},
    }
