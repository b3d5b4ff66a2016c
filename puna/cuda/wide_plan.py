"""What the wide decode kernels of sm_90 (csrc/wide_sm90.cu) are compiled with, and need.

Pure, from `EngineConfig`, as `puna.cuda.fused_plan`, whose engines they are for.
"""

from __future__ import annotations

from puna.cuda.fused_plan import (
    CLUSTER,
    FUSED_ROWS,
    FusedShapes,
    fused_rows,
    fused_shapes,
    shape_defines,
    weight_box,
)
from puna.engine import EngineConfig

# Kernels are compiled for up to so many tokens.
WIDE_ROWS = (32, 64)
MAX_CTAS = 144  # of a product
PRODUCTS = ("qkv", "out", "gate_up", "down", "head")
PRODUCT_WARPS, ATTENTION_WARPS, ENTER_WARPS = 16, 8, 8
# Mirrors of constants in the source.
_COLUMNS, _STRIP = 64, 16
_STAGE_BYTES = 4 * _STRIP * _COLUMNS * 2
_MAX_STAGES, _MAX_RING = 24, 16
_MAX_SHARED = 227 * 1024
_KV_STAGE, _PARTIES = 8192, 8


def wide_rows(config: EngineConfig) -> tuple[int, ...]:
    """The numbers of rows for which the engine has wide kernels; () where it has none."""
    limit = config.limits.max_batch_size
    if not fused_rows(config):
        return ()
    all_rows = (FUSED_ROWS[-1], *WIDE_ROWS)
    return tuple(rows for before, rows in zip(all_rows, WIDE_ROWS, strict=False) if before < limit)


def wide_shared_bytes(s: FusedShapes, kernel: str, rows: int) -> int:
    """Bytes of dynamic shared memory: `Wide<...>::TOTAL` of the source, or attention's."""
    if kernel == "attention":
        merge = 2 * _PARTIES * s.group * (s.head_dim + 2) * 4
        stages = (_MAX_SHARED - merge - 1024) // (ATTENTION_WARPS * _KV_STAGE)
        return ATTENTION_WARPS * stages * (_KV_STAGE + 8) + merge + 16
    most = -(-s.num_cols(kernel) // (_COLUMNS * CLUSTER))
    x_stage = rows * _COLUMNS * 2

    def rest(x_stages: int) -> int:
        received = 8 * rows // 8 * 512
        return received + 1024 + rows * 4 + (2 * _MAX_STAGES + 2 * x_stages + 10) * 8

    is_resident = _MAX_SHARED - rest(most) - most * x_stage >= 8 * _STAGE_BYTES
    ring = min(_MAX_RING, (_MAX_SHARED - rest(_MAX_RING) - 10 * _STAGE_BYTES) // x_stage)
    x_stages = most if is_resident else ring
    room = _MAX_SHARED - rest(x_stages) - x_stages * x_stage
    return min(_MAX_STAGES, room // _STAGE_BYTES) * _STAGE_BYTES + _MAX_SHARED - room


def wide_box(
    s: FusedShapes, kernel: str, num_rows: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A kernel's matrix as in `puna.cuda.fused_plan.weight_box`, and the box that is one copy: 16
    rows, of which rows i and i + 8 belong together."""
    dims, _ = weight_box(s, kernel, num_rows)
    is_paired = kernel in ("qkv", "gate_up")
    return dims, (_COLUMNS, *((_STRIP // 2, 2) if is_paired else (_STRIP, 1)))


def input_box(
    num_tokens: int, num_cols: int, rows: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The same of a product's input: its tokens are followed by zeros."""
    return (num_cols, num_tokens, 1), (_COLUMNS, rows, 1)


def wide_defines(config: EngineConfig, rows: int) -> dict[str, int | str]:
    """Macros of the source."""
    s = fused_shapes(config)
    return shape_defines(config, rows) | {
        f"SHARED_{kernel}": wide_shared_bytes(s, kernel, rows)
        for kernel in (*PRODUCTS, "attention")
    }
