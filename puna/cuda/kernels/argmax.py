"""Greedy sampling: the largest of each row of logits, the lowest id where several are equal."""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def argmax_chunks(
    logits_LV,
    value_LC,
    index_LC,
    VS: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The largest number of each BLOCK of a row's first V, and where. Grid: (L, C)."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_LV + row * VS + v, mask=v < V, other=float("-inf"))
    x = tl.where(x == x, x, float("-inf"))  # NaN is never the largest
    largest = tl.max(x, axis=0)
    index = tl.min(tl.where((x == largest) & (v < V), v, V), axis=0)
    num_chunks = tl.num_programs(1)
    tl.store(value_LC + row * num_chunks + chunk, largest)
    tl.store(index_LC + row * num_chunks + chunk, index)


@triton.jit
def argmax_rows(
    value_LC,
    index_LC,
    rows_L,
    last_tokens_R,
    out_tokens_L,
    C: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The largest of a row's chunks is its token; `rows` says whose last token it becomes, below 0
    nobody's. Grid: (L,)."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(value_LC + row * C + c, mask=c < C, other=float("-inf"))
    index = tl.load(index_LC + row * C + c, mask=c < C, other=V)
    token = tl.min(tl.where(x == tl.max(x, axis=0), index, V), axis=0)
    tl.store(out_tokens_L + row, token)
    owner = tl.load(rows_L + row)
    tl.store(last_tokens_R + owner, token, mask=owner >= 0)
