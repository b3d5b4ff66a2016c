"""Reading a product of which there may be several parts.

There are SPLITS of them; or, where a product was cut into BLOCKS blocks of `num_chunks` chunks for
`num_ctas` CTAs (`puna.cuda.stream_k_plan`), at most SPLITS.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def num_parts_at(column, num_ctas, num_chunks, SPLITS: tl.constexpr, BLOCKS: tl.constexpr):
    """How many parts a product has at a column: SPLITS, or (BLOCKS over 0) as many as
    `puna.cuda.stream_k_plan.Cut.num_parts` says of the column's block of 256."""
    num = column * 0 + SPLITS
    if BLOCKS > 0:
        block = column // 256
        chunks = BLOCKS * num_chunks
        first = ((block * num_chunks + 1) * num_ctas - 1) // chunks
        num = ((block + 1) * num_chunks * num_ctas - 1) // chunks - first + 1
    return num


@triton.jit
def sum_parts(at, is_in, num_parts, SPLITS: tl.constexpr, STRIDE: tl.constexpr):
    """The parts of a product, added in order: at most SPLITS."""
    total = tl.load(at, mask=is_in, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(at + split * STRIDE, mask=is_in & (split < num_parts), other=0.0)
    return total


@triton.jit
def half_of_head(
    at,
    bias_at,
    is_in,
    num_parts,
    dtype,
    SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Numbers of queries, keys or values in float32, rounded as where the product was stored."""
    x = sum_parts(at, is_in, num_parts, SPLITS, STRIDE).to(dtype).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_at, mask=is_in, other=0.0)
    return x


@triton.jit
def clipped(x, CLIP: tl.constexpr):
    """To the range of float16."""
    if CLIP:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x
