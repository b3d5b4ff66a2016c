"""Attention of many tokens of a sequence over a paged KV cache, which has theirs too.

Softmax is accumulated block by block from position 0 on (online softmax, arXiv:1805.02867), in
powers of two. The query heads that share a KV head are rows of one product. A block that lies
wholly in a row's future changes nothing in that row, to the bit.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _attend_block(
    q_RE,
    keys_NKPE,
    values_NKPE,
    block,
    kv_head,
    num_context,
    first,
    position_R,
    largest_R,
    total_R,
    acc_RE,
    K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    SCALE: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take in the block whose first token has position `first`; a row sees up to its position."""
    p = tl.arange(0, P)
    e = tl.arange(0, EP)
    at = (block.to(tl.int64) * K + kv_head) * (P * E) + p[:, None] * E + e[None, :]
    if IS_MASKED:
        # What was never written may be NaN, and 0 * NaN is not 0.
        is_stored = (first + p < num_context)[:, None] & (e < E)[None, :]
        keys_PE = tl.load(keys_NKPE + at, mask=is_stored, other=0.0)
    elif E == EP:
        keys_PE = tl.load(keys_NKPE + at)
    else:
        keys_PE = tl.load(keys_NKPE + at, mask=(e < E)[None, :], other=0.0)
    scores_RP = tl.dot(q_RE, tl.trans(keys_PE))
    if IS_MASKED:
        is_seen = (first + p)[None, :] <= position_R[:, None]
        scores_RP = tl.where(is_seen, scores_RP, float("-inf"))
    new_R = tl.maximum(largest_R, tl.max(scores_RP, axis=1) * SCALE)
    # Fused by hand: were it left to the compiler, a masked block and another might differ in bits.
    weight_RP = tl.exp2(tl.fma(scores_RP, SCALE, -new_R[:, None]))
    shrink_R = tl.exp2(largest_R - new_R)
    total_R = tl.fma(total_R, shrink_R, tl.sum(weight_RP, axis=1))
    acc_RE = acc_RE * shrink_R[:, None]
    if IS_MASKED:
        is_stored = (first + p < num_context)[:, None] & (e < E)[None, :]
        values_PE = tl.load(values_NKPE + at, mask=is_stored, other=0.0)
    elif E == EP:
        values_PE = tl.load(values_NKPE + at)
    else:
        values_PE = tl.load(values_NKPE + at, mask=(e < E)[None, :], other=0.0)
    acc_RE = tl.dot(weight_RP.to(values_PE.dtype), values_PE, acc_RE)
    return new_R, total_R, acc_RE


@triton.jit
def _attend_blocks(
    q_RE,
    keys_NKPE,
    values_NKPE,
    table_M,
    kv_head,
    num_context,
    first_block,
    stop_block,
    position_R,
    largest_R,
    total_R,
    acc_RE,
    K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    SCALE: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take in the blocks of a table from `first_block` to `stop_block`.

    A warp holds 32 entries of the table at a time: were each read when it is needed, the compiler
    could not fetch a block's keys and values before the block in front is done.
    """
    j = tl.arange(0, 32)
    for chunk in range(first_block, stop_block, 32):
        blocks_J = tl.load(table_M + chunk + j, mask=chunk + j < stop_block, other=0)
        for b in range(chunk, tl.minimum(chunk + 32, stop_block)):
            largest_R, total_R, acc_RE = _attend_block(
                q_RE,
                keys_NKPE,
                values_NKPE,
                tl.sum(tl.where(j == b - chunk, blocks_J, 0), axis=0),
                kv_head,
                num_context,
                b * P,
                position_R,
                largest_R,
                total_R,
                acc_RE,
                K,
                E,
                EP,
                P,
                SCALE,
                IS_MASKED,
            )
    return largest_R, total_R, acc_RE


@triton.jit
def _prefill_tile(
    q_TQ,
    keys_NKPE,
    values_NKPE,
    table_M,
    query_start,
    num_context,
    out_TQ,
    first_token,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    JP: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """TOKENS tokens of a sequence, from its token `first_token` of the step on."""
    J: tl.constexpr = H // K
    kv_head = tl.program_id(0)
    start = tl.load(query_start)
    num_new = tl.load(query_start + 1) - start
    r = tl.arange(0, TOKENS * JP)
    e = tl.arange(0, EP)
    token_R = first_token + r // JP
    head_R = kv_head * J + r % JP
    is_row = (token_R < num_new) & (r % JP < J)
    at_RE = ((start + token_R).to(tl.int64) * H + head_R)[:, None] * E + e[None, :]
    is_in = is_row[:, None] & (e < E)[None, :]
    q_RE = tl.load(q_TQ + at_RE, mask=is_in, other=0.0)

    position_R = num_context - num_new + token_R
    first_position = num_context - num_new + first_token
    stop = num_context - num_new + tl.minimum(first_token + TOKENS, num_new)
    largest_R = tl.full((TOKENS * JP,), float("-inf"), tl.float32)
    total_R = tl.zeros((TOKENS * JP,), tl.float32)
    acc_RE = tl.zeros((TOKENS * JP, EP), tl.float32)
    num_seen = (first_position + 1) // P  # blocks that all rows see
    largest_R, total_R, acc_RE = _attend_blocks(
        q_RE,
        keys_NKPE,
        values_NKPE,
        table_M,
        kv_head,
        num_context,
        0,
        num_seen,
        position_R,
        largest_R,
        total_R,
        acc_RE,
        K,
        E,
        EP,
        P,
        SCALE,
        False,
    )
    largest_R, total_R, acc_RE = _attend_blocks(
        q_RE,
        keys_NKPE,
        values_NKPE,
        table_M,
        kv_head,
        num_context,
        num_seen,
        tl.cdiv(stop, P),
        position_R,
        largest_R,
        total_R,
        acc_RE,
        K,
        E,
        EP,
        P,
        SCALE,
        True,
    )
    out_RE = acc_RE / total_R[:, None]
    tl.store(out_TQ + at_RE, out_RE.to(out_TQ.dtype.element_ty), mask=is_in)


@triton.jit
def prefill(
    q_TQ,
    keys_NKPE,
    values_NKPE,
    block_table_SM,
    query_start_S1,
    seq_lens_S,
    out_TQ,
    num_seqs,
    max_blocks,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    JP: tl.constexpr,
    TOKENS: tl.constexpr,
    SEQS: tl.constexpr,
    SCALE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (K, G). A program takes TOKENS tokens of a sequence and one KV head at a time.

    Tiles of TOKENS are numbered through over the sequences, which the host need not know: the
    programs take them in turn, and those with most context first, of all heads, so that none of
    the long ones is left for the end. SEQS is the power of two from S on.
    """
    i = tl.arange(0, SEQS)
    start_S = tl.load(query_start_S1 + i, mask=i < num_seqs, other=0)
    stop_S = tl.load(query_start_S1 + i + 1, mask=i < num_seqs, other=0)
    tiles_S = tl.cdiv(stop_S - start_S, TOKENS)
    end_S = tl.cumsum(tiles_S, axis=0)
    num_tiles = tl.sum(tiles_S, axis=0)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    for turn in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        tile = num_tiles - 1 - turn
        seq = tl.sum((end_S <= tile).to(tl.int32), axis=0)
        first_tile = tl.sum(tl.where(i == seq, end_S - tiles_S, 0), axis=0)
        _prefill_tile(
            q_TQ,
            keys_NKPE,
            values_NKPE,
            block_table_SM + seq.to(tl.int64) * max_blocks,
            query_start_S1 + seq,
            tl.load(seq_lens_S + seq),
            out_TQ,
            (tile - first_tile) * TOKENS,
            H,
            K,
            E,
            EP,
            P,
            JP,
            TOKENS,
            SCALE,
        )
