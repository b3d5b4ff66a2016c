"""How the skinny product of a matrix is cut into programs: tuned by hand, or by a rule.

Pure numbers; `benchmarks/cuda_gemm.py` measures them. The runtime never tunes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

# Bytes of shared memory that one block of threads may have (CUDA C++ programming guide, table of
# compute capabilities). A multiprocessor has 1 KB more, which each block on it takes for itself.
SHARED_LIMITS = MappingProxyType(
    {
        "sm_80": 163 * 1024,
        "sm_86": 99 * 1024,
        "sm_89": 99 * 1024,
        "sm_90": 227 * 1024,
        "sm_100": 227 * 1024,
        "sm_120": 99 * 1024,
    }
)
# Of a usual card of the target: A100, A10, L4 to RTX 4090, H100 and H200, B200, RTX 5090.
MULTIPROCESSORS = MappingProxyType(
    {"sm_80": 108, "sm_86": 72, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
)
_MAX_STAGES = 7


@dataclass(frozen=True, slots=True)
class GemmShape:
    """Rows of W and columns of both a program takes at a time; how many such blocks it has room for
    (versions of Triton use one less, or all), and how many are read before the kernel in front has
    ended."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    early: int


# (target, N, K, epilogue, tokens of a tile) -> measured best. Empty: nothing was measured yet.
_TUNED: MappingProxyType[tuple[str, int, int, str, int], GemmShape] = MappingProxyType({})


def gemm_shape(
    target: str, num_rows: int, num_cols: int, epilogue: str, tile: int, overlaps: bool
) -> GemmShape:
    """`num_cols` are those of the stored matrix; a program of epilogue "silu" has rows of gate and
    as many of up."""
    if found := _TUNED.get((target, num_rows, num_cols, epilogue, tile)):
        return found
    is_pair = epilogue == "silu"
    # 32 rows halve what is read of x; 16 put more programs to work where there are few rows.
    block_n = 16 if is_pair or (num_rows <= 8192 and tile == 16) else 32
    block_k = 128 if num_cols % 128 == 0 else 64
    block_bytes = (block_n * (2 if is_pair else 1) + tile) * block_k * 2
    limit = SHARED_LIMITS[target]
    programs = -(-num_rows // block_n)
    side_by_side = min(max(round(programs / MULTIPROCESSORS[target]), 1), 4)
    stages = (limit // side_by_side - 2048) // block_bytes
    early = min(1 if is_pair else 2, -(-num_cols // block_k)) if overlaps else 0
    return GemmShape(block_n, block_k, 4, min(max(stages, 3), _MAX_STAGES), early)
