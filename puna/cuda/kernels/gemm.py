"""The skinny product: y[M, N] = x[M, K] W[N, KP]^T for a few tokens, with what follows fused.

The rows of W are the rows of the tensor cores' tile and the tokens its columns, and BLOCK_N stays
below 64: the instruction, and so the order in which a token's sum is taken, is the same whatever
the number of tokens.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _columns(at, first, k, NUM: tl.constexpr, BLOCK_K: tl.constexpr, AXIS: tl.constexpr):
    """BLOCK_K columns from `first` on, those from NUM on as zeros; they lie along AXIS."""
    if NUM % BLOCK_K == 0:
        block = tl.load(at + first)
    elif AXIS == 0:
        block = tl.load(at + first, mask=(first + k < NUM)[:, None], other=0.0)
    else:
        block = tl.load(at + first, mask=(first + k < NUM)[None, :], other=0.0)
    return block


@triton.jit
def gemm(
    x_MK,
    w_NK,
    bias_N,
    y_MN,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    YS: tl.constexpr,
    UP_AT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (ceil(M / BLOCK_M), ceil(N / BLOCK_N)).

    EPILOGUE: "store" writes y; "add" adds to y, which is float32; "silu" writes silu(g) * u, where
    g is the product with row n of W and u that with row UP_AT + n. Biases are added first, and are
    for "add" and "silu" only.

    The first EARLY (0 to 2) blocks of columns come last in the sum: their weights are read at once,
    where OVERLAPS before the kernels in front have ended, and wait in registers.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the last are read as the last: nothing of theirs is stored.
    row_m = tl.minimum(m, M - 1).to(tl.int64)
    row_n = tl.minimum(n, N - 1).to(tl.int64)
    x_at = x_MK + row_m[None, :] * K + k[:, None]
    w_at = w_NK + row_n[:, None] * KP + k[None, :]
    up_at = w_at + UP_AT * KP
    if EARLY > 0:
        w_0 = _columns(w_at, 0, k, KP, BLOCK_K, 1)
        if EPILOGUE == "silu":
            up_0 = _columns(up_at, 0, k, KP, BLOCK_K, 1)
    if EARLY > 1:
        w_1 = _columns(w_at, BLOCK_K, k, KP, BLOCK_K, 1)
        if EPILOGUE == "silu":
            up_1 = _columns(up_at, BLOCK_K, k, KP, BLOCK_K, 1)
    if OVERLAPS:
        gdc_wait()

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(EARLY * BLOCK_K, KP, BLOCK_K):
        w = _columns(w_at, first, k, KP, BLOCK_K, 1)
        x = _columns(x_at, first, k, K, BLOCK_K, 0)
        acc = tl.dot(w, x, acc)
        if EPILOGUE == "silu":
            acc_up = tl.dot(_columns(up_at, first, k, KP, BLOCK_K, 1), x, acc_up)
    if EARLY > 0:
        x = _columns(x_at, 0, k, K, BLOCK_K, 0)
        acc = tl.dot(w_0, x, acc)
        if EPILOGUE == "silu":
            acc_up = tl.dot(up_0, x, acc_up)
    if EARLY > 1:
        x = _columns(x_at, BLOCK_K, k, K, BLOCK_K, 0)
        acc = tl.dot(w_1, x, acc)
        if EPILOGUE == "silu":
            acc_up = tl.dot(up_1, x, acc_up)

    is_out = (n < N)[:, None] & (m < M)[None, :]
    y_at = y_MN + m.to(tl.int64)[None, :] * YS + n[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_N + n, mask=n < N, other=0.0)[:, None]
        if EPILOGUE == "silu":
            acc_up += tl.load(bias_N + N + n, mask=n < N, other=0.0)[:, None]
    if EPILOGUE == "add":
        acc += tl.load(y_at, mask=is_out, other=0.0)
    if EPILOGUE == "silu":
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    tl.store(y_at, acc.to(y_MN.dtype.element_ty), mask=is_out)
