"""Reading a product of which there may be several parts."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_parts(at, is_in, SPLITS: tl.constexpr, STRIDE: tl.constexpr):
    """The parts of a product, added in order."""
    total = tl.load(at, mask=is_in, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(at + split * STRIDE, mask=is_in, other=0.0)
    return total


@triton.jit
def half_of_head(
    at,
    bias_at,
    is_in,
    dtype,
    SPLITS: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Numbers of queries, keys or values in float32, rounded as where the product was stored."""
    x = sum_parts(at, is_in, SPLITS, STRIDE).to(dtype).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_at, mask=is_in, other=0.0)
    return x


@triton.jit
def clipped(x, CLIP: tl.constexpr):
    """To the range of float16."""
    if CLIP:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x
