"""Kernels that take one token's row at a time: embedding, norm, RoPE with KV append, SiLU, bias.

All compute in float32 and round once when they store. What they read may be the parts of a product
(`puna.cuda.kernels.parts`), of PART_ROWS rows each.

OVERLAPS, here as in the other files: the kernel may start before those in front of it have ended,
and lets those behind it (programmatic dependent launch, from sm_90 on); what others wrote it reads
after gdc_wait.
"""

# Triton gives tensors their operators, and constants their values, when it compiles.
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from puna.cuda.kernels.parts import clipped, half_of_head, sum_parts


@triton.jit
def embed(
    ids_T,
    last_tokens_R,
    table_VD,
    residual_TD,
    partial_TD,
    V: tl.constexpr,
    D: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    CLEARS: tl.constexpr,
    SPLITS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """residual = row of the table, zeros where there is no such token. Grid: (T,).

    CLEARS: zeros to `partial`, which is one array or the parts of a product.

    An id below 0 stands for the last token that was sampled for row -1 - id of the mirror.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    token = tl.load(ids_T + t)
    last = tl.load(last_tokens_R + (-1 - token), mask=token < 0, other=0)
    token = tl.where(token < 0, last, token)
    num_here = tl.where((token >= 0) & (token < V), D, 0)
    at = token.to(tl.int64) * KP
    row = tl.load(table_VD + at + d, mask=d < num_here, other=0.0)
    tl.store(residual_TD + t * D + d, row.to(tl.float32), mask=d < D)
    if CLEARS:
        zero = tl.zeros((BLOCK,), partial_TD.dtype.element_ty)
        for split in tl.static_range(0, SPLITS):
            at = partial_TD + split * (PART_ROWS * D) + t * D + d
            tl.store(at, zero, mask=d < D)


@triton.jit
def norm(
    residual_TD,
    partial_TD,
    weight_D,
    out_TD,
    rows_L,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD_PARTIAL: tl.constexpr,
    PICK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out = RMSNorm(residual + partial). Grid: (T,), or (L,) with PICK_ROWS.

    `partial` is one array or the parts of a product. The sum is written back to
    the residual; with PICK_ROWS, where out has the picked rows only, the stream is left as it is.
    """
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_D + d, mask=d < D, other=0.0)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row = t
    if PICK_ROWS:
        row = tl.load(rows_L + t).to(tl.int64)
    x = tl.load(residual_TD + row * D + d, mask=d < D, other=0.0)
    if ADD_PARTIAL:
        at = partial_TD + row * D + d
        x += sum_parts(at, d < D, SPLITS, PART_ROWS * D).to(tl.float32)
        if not PICK_ROWS:
            tl.store(residual_TD + row * D + d, x, mask=d < D)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + EPS)
    y = x * scale * weight
    tl.store(out_TD + t * D + d, y.to(out_TD.dtype.element_ty), mask=d < D)


@triton.jit
def rope_append(
    qkv_TX,
    bias_N,
    cos_PE,
    sin_PE,
    positions_T,
    slots_T,
    q_TQ,
    keys_NKPE,
    values_NKPE,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    XS: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLIP: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Rotate q and k, store k and v in their slots. Grid: (T, ceil((H + 2 K) / HEADS)).

    Query heads, KV heads' keys and their values are numbered through: H + 2 K heads a token, of
    which a program takes HEADS. Keys begin at column K_AT of a row, values at V_AT. What is rotated
    may be the parts of a product.
    """
    t = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, HALF)[None, :]
    is_in = (head < H + 2 * K) & (i < E // 2)
    is_query = head < H
    is_value = head >= H + K
    kv_head = tl.where(is_value, head - H - K, head - H)
    column = tl.where(is_query, head * E, tl.where(is_value, V_AT, K_AT) + kv_head * E) + i
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    at = qkv_TX + t * XS + column
    dtype = q_TQ.dtype.element_ty
    stride: tl.constexpr = PART_ROWS * XS
    first = half_of_head(at, bias_N + head * E + i, is_in, dtype, SPLITS, stride, HAS_BIAS)
    at, bias_at = at + E // 2, bias_N + head * E + i + E // 2
    second = half_of_head(at, bias_at, is_in, dtype, SPLITS, stride, HAS_BIAS)

    position = tl.load(positions_T + t).to(tl.int64)
    cos = tl.load(cos_PE + position * (E // 2) + i, mask=i < E // 2, other=0.0)
    sin = tl.load(sin_PE + position * (E // 2) + i, mask=i < E // 2, other=0.0)
    cos = tl.where(is_value, 1.0, cos)
    sin = tl.where(is_value, 0.0, sin)
    left = first * cos - second * sin
    right = second * cos + first * sin

    q_at = t * (H * E) + head * E + i
    tl.store(q_TQ + q_at, left.to(dtype), mask=is_in & is_query)
    tl.store(q_TQ + q_at + E // 2, right.to(dtype), mask=is_in & is_query)
    left, right = clipped(left, CLIP), clipped(right, CLIP)
    slot = tl.load(slots_T + t).to(tl.int64)
    cache_at = ((slot // P * K + kv_head) * P + slot % P) * E + i
    dtype = keys_NKPE.dtype.element_ty
    is_key = is_in & (head >= H) & (head < H + K)
    tl.store(keys_NKPE + cache_at, left.to(dtype), mask=is_key)
    tl.store(keys_NKPE + cache_at + E // 2, right.to(dtype), mask=is_key)
    tl.store(values_NKPE + cache_at, left.to(dtype), mask=is_in & is_value)
    tl.store(values_NKPE + cache_at + E // 2, right.to(dtype), mask=is_in & is_value)


@triton.jit
def silu_mul(
    gate_up_TX,
    bias_N,
    act_TF,
    F: tl.constexpr,
    XS: tl.constexpr,
    UP_AT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """act = silu(gate) * up; `up` begins at column UP_AT. Grid: (T, ceil(F / BLOCK))."""
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    at = gate_up_TX + t * XS + f
    gate = tl.load(at, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(at + UP_AT, mask=f < F, other=0.0).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias_N + f, mask=f < F, other=0.0)
        up += tl.load(bias_N + F + f, mask=f < F, other=0.0)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(act_TF + t * F + f, y.to(act_TF.dtype.element_ty), mask=f < F)


@triton.jit
def add_bias(y_TN, bias_N, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """y += bias. Grid: (T, ceil(N / BLOCK))."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(y_TN + t * N + n, mask=n < N, other=0.0).to(tl.float32)
    y += tl.load(bias_N + n, mask=n < N, other=0.0)
    tl.store(y_TN + t * N + n, y.to(y_TN.dtype.element_ty), mask=n < N)
