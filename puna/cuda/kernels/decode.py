"""Attention of one token of each sequence over a paged KV cache, with RoPE and KV append.

Softmax as in `puna.cuda.kernels.prefill`, but for the new token, which comes first. A context is
shared out in parts that follow from its length alone, so a sequence's result does not depend on its
company.
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from puna.cuda.kernels.parts import clipped, half_of_head


@triton.jit
def _parts(num_context, P: tl.constexpr, MIN_BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """Blocks of the context, blocks a part, parts: these follow from the context's length alone."""
    num_blocks = tl.cdiv(num_context, P)
    part_blocks = tl.maximum(tl.cdiv(num_blocks, PARTS), MIN_BLOCKS)
    return num_blocks, part_blocks, tl.cdiv(num_blocks, part_blocks)


@triton.jit
def _attend_cached(
    q_RH,
    other_RH,
    keys_NKPE,
    values_NKPE,
    block,
    kv_head,
    num_cached,
    first,
    largest_R,
    total_R,
    acc_RH,
    other_acc_RH,
    K: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Take in the first `num_cached` tokens of a context, as far as they are in the block whose
    first token is `first`. Both halves of a head's dimensions are apart."""
    p = tl.arange(0, P)
    i = tl.arange(0, HALF)
    at = (block.to(tl.int64) * K + kv_head) * (P * E) + p[:, None] * E + i[None, :]
    # What was never written may be NaN, and 0 * NaN is not 0.
    is_stored = (first + p < num_cached)[:, None] & (i < E // 2)[None, :]
    keys_PH = tl.load(keys_NKPE + at, mask=is_stored, other=0.0)
    other_keys_PH = tl.load(keys_NKPE + at + E // 2, mask=is_stored, other=0.0)
    scores_RP = tl.dot(q_RH, tl.trans(keys_PH))
    scores_RP = tl.dot(other_RH, tl.trans(other_keys_PH), scores_RP)
    scores_RP = tl.where((first + p < num_cached)[None, :], scores_RP, float("-inf"))
    new_R = tl.maximum(largest_R, tl.max(scores_RP, axis=1) * SCALE)
    weight_RP = tl.exp2(tl.fma(scores_RP, SCALE, -new_R[:, None]))
    shrink_R = tl.exp2(largest_R - new_R)
    total_R = tl.fma(total_R, shrink_R, tl.sum(weight_RP, axis=1))
    values_PH = tl.load(values_NKPE + at, mask=is_stored, other=0.0)
    other_values_PH = tl.load(values_NKPE + at + E // 2, mask=is_stored, other=0.0)
    weight_RP = weight_RP.to(values_PH.dtype)
    acc_RH = tl.dot(weight_RP, values_PH, acc_RH * shrink_R[:, None])
    other_acc_RH = tl.dot(weight_RP, other_values_PH, other_acc_RH * shrink_R[:, None])
    return new_R, total_R, acc_RH, other_acc_RH


@triton.jit
def decode(
    qkv_SX,
    bias_N,
    cos_PE,
    sin_PE,
    positions_S,
    slots_S,
    keys_NKPE,
    values_NKPE,
    block_table_SM,
    seq_lens_S,
    part_SBHE,
    scale_SBH2,
    out_SQ,
    max_blocks,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    XS: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """RoPE, KV append and attention of a token a sequence. Grid: (S, K, G).

    `qkv` is the product of q, k and v, as `puna.cuda.kernels.rows.rope_append` takes it. The G
    programs of a sequence and KV head share out the context's parts. The last part has the new
    token: its program stores the key and the value, and takes them in first, from registers.

    Where there is one part it is written to out, else each part's sum to `part`, with its largest
    score and its total to `scale`, for `combine`.
    """
    J: tl.constexpr = H // K
    STRIDE: tl.constexpr = PART_ROWS * XS
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_context = tl.load(seq_lens_S + seq)
    num_blocks, part_blocks, num_parts = _parts(num_context, P, MIN_BLOCKS, PARTS)
    r = tl.arange(0, ROWS)
    i = tl.arange(0, HALF)
    head_R = kv_head * J + r
    is_half = i < E // 2
    is_in = (r < J)[:, None] & is_half[None, :]
    q_at, k_at = head_R[:, None] * E + i[None, :], K_AT + kv_head * E + i
    v_at = V_AT + kv_head * E + i
    position = tl.load(positions_S + seq).to(tl.int64)
    cos = tl.load(cos_PE + position * (E // 2) + i, mask=is_half, other=0.0)
    sin = tl.load(sin_PE + position * (E // 2) + i, mask=is_half, other=0.0)
    slot = tl.load(slots_S + seq).to(tl.int64)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()

    row = qkv_SX + seq.to(tl.int64) * XS
    dtype = out_SQ.dtype.element_ty
    other: tl.constexpr = E // 2
    at, bias_at = row + q_at, bias_N + q_at
    left = half_of_head(at, bias_at, is_in, dtype, SPLITS, STRIDE, HAS_BIAS)
    at, bias_at = at + other, bias_at + other
    right = half_of_head(at, bias_at, is_in, dtype, SPLITS, STRIDE, HAS_BIAS)
    q_RH = (left * cos[None, :] - right * sin[None, :]).to(dtype)
    other_RH = (right * cos[None, :] + left * sin[None, :]).to(dtype)
    at, bias_at = row + k_at, bias_N + (H + kv_head) * E + i
    left = half_of_head(at, bias_at, is_half, dtype, SPLITS, STRIDE, HAS_BIAS)
    at, bias_at = at + other, bias_at + other
    right = half_of_head(at, bias_at, is_half, dtype, SPLITS, STRIDE, HAS_BIAS)
    cached = keys_NKPE.dtype.element_ty
    key_H = clipped(left * cos - right * sin, CLIP).to(cached)
    other_key_H = clipped(right * cos + left * sin, CLIP).to(cached)
    at, bias_at = row + v_at, bias_N + (H + K + kv_head) * E + i
    left = half_of_head(at, bias_at, is_half, dtype, SPLITS, STRIDE, HAS_BIAS)
    value_H = clipped(left, CLIP).to(cached)
    at, bias_at = at + other, bias_at + other
    right = half_of_head(at, bias_at, is_half, dtype, SPLITS, STRIDE, HAS_BIAS)
    other_value_H = clipped(right, CLIP).to(cached)
    score_RH = q_RH.to(tl.float32) * key_H.to(tl.float32)[None, :]
    score_RH += other_RH.to(tl.float32) * other_key_H.to(tl.float32)[None, :]
    score_R = tl.sum(score_RH, axis=1) * SCALE

    out_at = (seq.to(tl.int64) * H + head_R)[:, None] * E + i[None, :]
    table_M = block_table_SM + seq.to(tl.int64) * max_blocks
    j = tl.arange(0, 32)
    for part in range(tl.program_id(2), num_parts, tl.num_programs(2)):
        is_last = part == num_parts - 1
        if is_last:
            slot_at = ((slot // P * K + kv_head) * P + slot % P) * E + i
            tl.store(keys_NKPE + slot_at, key_H, mask=is_half)
            tl.store(keys_NKPE + slot_at + other, other_key_H, mask=is_half)
            tl.store(values_NKPE + slot_at, value_H, mask=is_half)
            tl.store(values_NKPE + slot_at + other, other_value_H, mask=is_half)
        largest_R = tl.where(is_last, score_R, float("-inf"))
        total_R = tl.zeros((ROWS,), tl.float32) + tl.where(is_last, 1.0, 0.0)
        acc_RH = tl.zeros((ROWS, HALF), tl.float32)
        other_acc_RH = tl.zeros((ROWS, HALF), tl.float32)
        acc_RH += tl.where(is_last, value_H.to(tl.float32), 0.0)[None, :]
        other_acc_RH += tl.where(is_last, other_value_H.to(tl.float32), 0.0)[None, :]
        first_block = part * part_blocks
        stop_block = tl.minimum(first_block + part_blocks, num_blocks)
        # As in _attend_blocks.
        for chunk in range(first_block, stop_block, 32):
            blocks_J = tl.load(table_M + chunk + j, mask=chunk + j < stop_block, other=0)
            for b in range(chunk, tl.minimum(chunk + 32, stop_block)):
                largest_R, total_R, acc_RH, other_acc_RH = _attend_cached(
                    q_RH,
                    other_RH,
                    keys_NKPE,
                    values_NKPE,
                    tl.sum(tl.where(j == b - chunk, blocks_J, 0), axis=0),
                    kv_head,
                    num_context - 1,
                    b * P,
                    largest_R,
                    total_R,
                    acc_RH,
                    other_acc_RH,
                    K,
                    E,
                    HALF,
                    P,
                    SCALE,
                )
        if num_parts == 1:
            out_RH = acc_RH / total_R[:, None]
            tl.store(out_SQ + out_at, out_RH.to(dtype), mask=is_in)
            out_RH = other_acc_RH / total_R[:, None]
            tl.store(out_SQ + out_at + other, out_RH.to(dtype), mask=is_in)
        else:
            row_R = (seq.to(tl.int64) * PARTS + part) * H + head_R
            part_at = part_SBHE + row_R[:, None] * E + i[None, :]
            tl.store(part_at, acc_RH, mask=is_in)
            tl.store(part_at + other, other_acc_RH, mask=is_in)
            tl.store(scale_SBH2 + row_R * 2, largest_R, mask=r < J)
            tl.store(scale_SBH2 + row_R * 2 + 1, total_R, mask=r < J)


@triton.jit
def combine(
    seq_lens_S,
    part_SBHE,
    scale_SBH2,
    out_SQ,
    H: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Sum the parts of `decode` in order; zeros for a sequence without context. Grid: (S, H)."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    _, _, num_parts = _parts(tl.load(seq_lens_S + seq), P, MIN_BLOCKS, PARTS)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    if num_parts == 1:
        return
    e = tl.arange(0, EP)
    first_row = seq.to(tl.int64) * (PARTS * H) + head
    all_B = tl.arange(0, PARTS)
    scores_B = tl.load(
        scale_SBH2 + (first_row + all_B * H) * 2, mask=all_B < num_parts, other=float("-inf")
    )
    largest = tl.max(scores_B, axis=0)
    total = 0.0
    acc_E = tl.zeros((EP,), tl.float32)
    for part in range(0, num_parts):
        row = first_row + part * H
        weight = tl.exp2(tl.load(scale_SBH2 + row * 2) - largest)
        total += weight * tl.load(scale_SBH2 + row * 2 + 1)
        acc_E += weight * tl.load(part_SBHE + row * E + e, mask=e < E, other=0.0)
    out_E = acc_E / tl.where(num_parts > 0, total, 1.0)
    at_E = out_SQ + (seq.to(tl.int64) * H + head) * E + e
    tl.store(at_E, out_E.to(out_SQ.dtype.element_ty), mask=e < E)
