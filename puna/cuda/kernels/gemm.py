"""The skinny product: y[M, N] = x[M, K] W[N, KP]^T for a few tokens, with what follows fused.

The rows of W are the rows of the tensor cores' tile and the tokens its columns, and BLOCK_N stays
below 64: the instruction, and so the order in which a token's sum is taken, is the same whatever
the number of tokens.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

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
def _sum_columns(
    x_at,
    w_at,
    up_at,
    k,
    first,
    stop,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    IS_PAIR: tl.constexpr,
    WAITS: tl.constexpr,
):
    """The product over columns first to stop, and that with the other matrix of a pair.

    The first EARLY (0 to 2) blocks of columns come last in the sum: their weights are read at once,
    before those in front have ended (WAITS), and stay in registers.
    """
    if EARLY > 0:
        w_0 = _columns(w_at, first, k, KP, BLOCK_K, 1)
        if IS_PAIR:
            up_0 = _columns(up_at, first, k, KP, BLOCK_K, 1)
    if EARLY > 1:
        w_1 = _columns(w_at, first + BLOCK_K, k, KP, BLOCK_K, 1)
        if IS_PAIR:
            up_1 = _columns(up_at, first + BLOCK_K, k, KP, BLOCK_K, 1)
    if WAITS:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in range(first + EARLY * BLOCK_K, stop, BLOCK_K):
        w = _columns(w_at, at, k, KP, BLOCK_K, 1)
        x = _columns(x_at, at, k, K, BLOCK_K, 0)
        acc = tl.dot(w, x, acc)
        if IS_PAIR:
            acc_up = tl.dot(_columns(up_at, at, k, KP, BLOCK_K, 1), x, acc_up)
    if EARLY > 0:
        x = _columns(x_at, first, k, K, BLOCK_K, 0)
        acc = tl.dot(w_0, x, acc)
        if IS_PAIR:
            acc_up = tl.dot(up_0, x, acc_up)
    if EARLY > 1:
        x = _columns(x_at, first + BLOCK_K, k, K, BLOCK_K, 0)
        acc = tl.dot(w_1, x, acc)
        if IS_PAIR:
            acc_up = tl.dot(up_1, x, acc_up)
    return acc, acc_up


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
    SPLITS: tl.constexpr,
    STRETCH: tl.constexpr,
    PART_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (ceil(M / BLOCK_M), ceil(N / BLOCK_N), SPLITS for "parts", else 1).

    EPILOGUE: "store" writes y, "add" adds to it. A row's sum is taken in SPLITS stretches of
    STRETCH columns, which are added in order; "parts" leaves that to the consumer, and writes y
    [SPLITS, PART_ROWS, YS]. "silu" writes silu(g) * u, where g is the product with row n of W and
    u that with row UP_AT + n. Biases are added first, to the first stretch.
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
    is_out = (n < N)[:, None] & (m < M)[None, :]
    y_at = y_MN + m.to(tl.int64)[None, :] * YS + n[:, None]

    IS_PAIR: tl.constexpr = EPILOGUE == "silu"
    first = 0
    if EPILOGUE == "parts":
        first = tl.program_id(2) * STRETCH
    stop = tl.minimum(first + STRETCH, KP)
    acc, acc_up = _sum_columns(
        x_at,
        w_at,
        up_at,
        k,
        first,
        stop,
        K,
        KP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EARLY,
        IS_PAIR,
        OVERLAPS,
    )
    if HAS_BIAS:
        bias = tl.load(bias_N + n, mask=n < N, other=0.0)
        if EPILOGUE == "parts":
            bias = tl.where(first + n * 0 == 0, bias, 0.0)
        acc += bias[:, None]
        if IS_PAIR:
            acc_up += tl.load(bias_N + N + n, mask=n < N, other=0.0)[:, None]
    if EPILOGUE != "parts":
        for split in range(1, SPLITS):
            part, _ = _sum_columns(
                x_at,
                w_at,
                up_at,
                k,
                split * STRETCH,
                tl.minimum((split + 1) * STRETCH, KP),
                K,
                KP,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                EARLY,
                IS_PAIR,
                False,
            )
            acc += part
    if EPILOGUE == "add":
        acc += tl.load(y_at, mask=is_out, other=0.0)
    if EPILOGUE == "parts":
        y_at += tl.program_id(2) * (PART_ROWS * YS)
    if EPILOGUE == "silu":
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    tl.store(y_at, acc.to(y_MN.dtype.element_ty), mask=is_out)
