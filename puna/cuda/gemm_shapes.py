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


# Columns of W that a program reads before the kernel in front has ended; they come last in the sum.
EARLY_COLS = 128
# Columns are cut into stretches at multiples of this.
STRETCH_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class GemmShape:
    """Rows of W and columns of both that a program takes at a time (64 or 128 columns), and how
    many such blocks it has room for (versions of Triton use one less, or all)."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (target, N, K, epilogue, tokens of a tile) -> measured best. Empty: nothing was measured yet.
# Ways of one matrix have block_n below 64 or not below it in all tiles: see `kernels.gemm`.
_TUNED: MappingProxyType[tuple[str, int, int, str, int], GemmShape] = MappingProxyType({})


def gemm_shape(
    target: str, num_rows: int, num_cols: int, epilogue: str, tile: int, splits: int
) -> GemmShape:
    """`num_cols` are those of the stored matrix, of which a program takes one of `splits`
    stretches; with the epilogue "silu" it has rows of gate and as many of up."""
    if found := _TUNED.get((target, num_rows, num_cols, epilogue, tile)):
        return found
    pairs = 2 if epilogue == "silu" else 1
    block_n = _block_n(target) // pairs
    programs = -(-num_rows // block_n) * splits
    side_by_side = min(-(-programs // MULTIPROCESSORS[target]), 3)
    room = SHARED_LIMITS[target] // side_by_side - 2048
    if overlaps(target):
        room -= block_n * pairs * EARLY_COLS * 2
    for block_k in (128, 64):
        stages = room // ((block_n * pairs + tile) * block_k * 2)
        if stages >= 4 and num_cols % block_k == 0:
            return GemmShape(block_n, block_k, 4, min(stages, 6))
    return GemmShape(block_n, 64, 4, 3)


def early_columns(target: str, num_cols: int, splits: int) -> int:
    """The same for all ways to cut a matrix, since it says in which order a sum is taken."""
    shortest = num_cols - (splits - 1) * stretch(num_cols, splits)
    return min(EARLY_COLS, shortest) if overlaps(target) else 0


def stretch(num_cols: int, splits: int) -> int:
    """Columns of a stretch; the last may have fewer."""
    if splits == 1:
        return num_cols
    a_stretch = -(-num_cols // splits)
    return -(-a_stretch // STRETCH_MULTIPLE) * STRETCH_MULTIPLE


def num_splits(target: str, num_rows: int, all_num_cols: tuple[int, ...]) -> int:
    """Stretches of columns of a product with few rows, so that two programs a multiprocessor have
    work; one number for products that one consumer reads."""
    programs = -(-num_rows // _block_n(target))
    wanted = min(max(round(2 * MULTIPROCESSORS[target] / programs), 1), 4)
    for splits in range(wanted, 1, -1):
        if all((splits - 1) * stretch(num, splits) < num for num in all_num_cols):
            return splits
    return 1


def overlaps(target: str) -> bool:
    """Whether kernels of a target may start before those in front of them have ended."""
    return target in ("sm_90", "sm_100", "sm_120")


def _block_n(target: str) -> int:
    """Wide blocks read x less often. sm_100 has another instruction for them, which may not exist
    for every number of tokens."""
    return 32 if target == "sm_100" else 64
