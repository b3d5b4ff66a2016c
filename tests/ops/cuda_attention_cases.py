"""Attention of CudaOps, as `cuda_cases` has the other operations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cuda_bench import (
    PLAIN,
    SPEC,
    WIDE,
    Bench,
    TestDevice,
    assert_near,
    both_dtypes,
    error,
    norm_of,
    project,
)
from cuda_configs import BLOCK

from puna.batch import ForwardBatch
from puna.ops import LayerCache, Linear, Norm, RopeTable, Stream
from puna.spec import ModelSpec


@dataclass(frozen=True)
class Attention:
    """A step of attention over a random paged cache, and what should come of it."""

    q_TQ: torch.Tensor
    batch: ForwardBatch
    cache: LayerCache
    num_real: int  # tokens, the others are padding
    keys: list[torch.Tensor]  # by sequence [C, K, E]
    values: list[torch.Tensor]


def attention_step(
    bench: Bench, sequences: list[tuple[int, int]], num_tokens: int, num_seqs: int, decode: bool
) -> Attention:
    """`sequences` are (tokens of the step, tokens of context); padded to num_tokens, num_seqs."""
    spec = bench.spec
    heads, size = spec.num_kv_heads, spec.head_dim
    max_blocks = -(-bench.config.limits.max_seq_len // BLOCK)
    counts = [-(-context // BLOCK) for _, context in sequences]
    shape = (sum(counts) + 2, heads, BLOCK, size)
    stored = [bench.poisoned(*shape, dtype=bench.dtype) for _ in range(2)]
    order = torch.randperm(sum(counts), generator=bench.rng, device=bench.device)
    dealt = iter((order + 1).tolist())
    table = np.zeros((num_seqs, max_blocks), np.int32)
    contexts: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for s, (_, context) in enumerate(sequences):
        table[s, : counts[s]] = [next(dealt) for _ in range(counts[s])]
        where = np.arange(context)
        for cache, found in zip(stored, contexts, strict=True):
            x_CKE = bench.rounded(context, heads, size)
            cache[table[s, where // BLOCK], :, where % BLOCK] = x_CKE
            found.append(x_CKE)
    new = [num_new for num_new, _ in sequences]
    num_real = sum(new)
    starts = np.full(num_seqs + 1, num_real, np.int32)
    starts[: len(new) + 1] = np.cumsum([0, *new])
    lens = np.zeros(num_seqs, np.int32)
    lens[: len(new)] = [context for _, context in sequences]
    batch = ForwardBatch(
        token_ids_T=bench.integers(np.zeros(num_tokens)),
        positions_T=bench.integers(np.zeros(num_tokens)),
        slots_T=bench.integers(np.zeros(num_tokens)),
        query_start_S1=bench.integers(starts),
        seq_lens_S=bench.integers(lens),
        block_table_SM=bench.integers(table),
        logits_rows_L=bench.integers([]),
        is_decode=decode,
    )
    q_TQ = bench.poisoned(num_tokens, spec.q_size, dtype=bench.dtype)
    q_TQ[:num_real] = bench.rounded(num_real, spec.q_size)
    return Attention(q_TQ, batch, LayerCache(*stored), num_real, *contexts)


def naive_attention(bench: Bench, step: Attention, dtype: torch.dtype) -> torch.Tensor:
    """Attended rows [tokens, Q], sequence by sequence, without a cache, in a dtype."""
    spec, rows = bench.spec, []
    starts = step.batch.query_start_S1.tolist()
    for s, (keys, values) in enumerate(zip(step.keys, step.values, strict=True)):
        q_THE = step.q_TQ[starts[s] : starts[s + 1]].view(-1, spec.num_heads, spec.head_dim)
        shared = spec.num_heads // spec.num_kv_heads
        k_HCE, v_HCE = (
            x.transpose(0, 1).repeat_interleave(shared, dim=0).to(dtype) for x in (keys, values)
        )
        scores_HTC = q_THE.transpose(0, 1).to(dtype) @ k_HCE.mT * spec.head_dim**-0.5
        num_new, context = len(q_THE), len(keys)
        seen = torch.arange(context)[None] <= torch.arange(context - num_new, context)[:, None]
        scores_HTC = scores_HTC.masked_fill(~seen.to(bench.device), float("-inf"))
        attended_HTE = torch.softmax(scores_HTC, dim=-1) @ v_HCE
        rows.append(attended_HTE.transpose(0, 1).reshape(num_new, -1))
    return torch.cat(rows)


def check_attention(
    bench: Bench, sequences: list[tuple[int, int]], num_tokens: int, num_seqs: int, decode: bool
) -> None:
    """Of prefill, which is that of a deterministic decode step too."""
    spec = bench.spec
    step = attention_step(bench, sequences, num_tokens, num_seqs, decode)
    linear = bench.linear([spec.hidden_size], spec.q_size, spec.attention_bias)
    x, _ = bench.stream(num_tokens)
    found_TD = bench.added_by(
        lambda: bench.ops.attention(step.q_TQ, step.batch, step.cache, linear, x), x
    )
    real = slice(step.num_real)
    right_TQ = naive_attention(bench, step, torch.float64)
    same_TQ = naive_attention(bench, step, bench.dtype)
    assert_near(bench.arrays["attended_TQ"][real], right_TQ, same_TQ)
    expected_TD = project(right_TQ, linear, torch.float64)
    assert_near(found_TD[real], expected_TD, project(same_TQ, linear, bench.dtype))


@dataclass(frozen=True)
class Decode:
    """A decode step before its product of q, k and v; attention's q_TQ and newest tokens are not
    used."""

    attention: Attention
    x: Stream
    sum_TD: torch.Tensor
    norm: Norm
    linear: Linear
    rope: RopeTable
    out: Linear

    def emit(self, bench: Bench) -> None:
        step, num_tokens = self.attention, len(self.sum_TD)
        q_TQ = bench.arrays["q_TQ"][:num_tokens]
        given = self.x, self.norm, self.linear, self.rope, step.batch, step.cache, q_TQ
        bench.ops.qkv(*given)
        bench.ops.attention(q_TQ, step.batch, step.cache, self.out, self.x)


def decode_step(bench: Bench, contexts: list[int], num_seqs: int) -> Decode:
    """A token for each context, which has it as its last; padded to num_seqs."""
    spec = bench.spec
    step = attention_step(bench, [(1, context) for context in contexts], num_seqs, num_seqs, True)
    lens = np.zeros(num_seqs, int)
    lens[: len(contexts)] = contexts
    last, blocks = np.maximum(lens - 1, 0), step.batch.block_table_SM.cpu().numpy()
    block = blocks[np.arange(num_seqs), last // BLOCK]
    for cache in (step.cache.keys_NKEP, step.cache.values_NKPE):
        cache[block, :, last % BLOCK] = float("nan")
    batch = replace(
        step.batch,
        positions_T=bench.integers(last),
        slots_T=bench.integers(block * BLOCK + last % BLOCK),
    )
    x, sum_TD = bench.stream(num_seqs)
    norm = Norm(1 + bench.floats(spec.hidden_size) / 4, 1e-5)
    sizes = [spec.q_size, spec.kv_size, spec.kv_size]
    linear = bench.linear(sizes, spec.hidden_size, spec.attention_bias)
    angles = bench.floats(bench.config.limits.max_seq_len, spec.head_dim // 2) * 3
    rope = RopeTable(torch.cos(angles), torch.sin(angles))
    out = bench.linear([spec.hidden_size], spec.q_size, spec.attention_bias)
    return Decode(replace(step, batch=batch), x, sum_TD, norm, linear, rope, out)


def naive_decode(bench: Bench, step: Decode, dtype: torch.dtype) -> Attention:
    """What the new tokens' queries, keys and values are, in a dtype, in place of what was there."""
    spec, attention = bench.spec, step.attention
    num, size = attention.num_real, spec.head_dim
    y_TN = project(norm_of(step.sum_TD[:num].to(dtype), step.norm), step.linear, dtype)
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    q_TH, k_TH, v_TH = y_TN.view(num, -1, size).split(heads, dim=1)
    at = attention.batch.positions_T[:num].long()
    tables = step.rope.cos_PE, step.rope.sin_PE
    cos, sin = (torch.as_tensor(table)[at][:, None].to(dtype) for table in tables)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def with_new(old: list[torch.Tensor], new_TH: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(old, new_TH, strict=True)
        return [torch.cat([cached[:-1].to(dtype), new[None]]) for cached, new in pairs]

    return replace(
        attention,
        q_TQ=rotate(q_TH).reshape(num, -1),
        keys=with_new(attention.keys, rotate(k_TH)),
        values=with_new(attention.values, v_TH),
    )


def check_decode(bench: Bench, contexts: list[int], num_seqs: int) -> None:
    step = decode_step(bench, contexts, num_seqs)
    before = [x.clone() for x in (step.attention.cache.keys_NKEP, step.attention.cache.values_NKPE)]
    partial_TD = step.x.partial_TD.clone()
    program = bench.ops.record(lambda: step.emit(bench))
    step.x.partial_TD.copy_(partial_TD)  # preparing may have written to it
    program.run()
    right, same = (naive_decode(bench, step, kind) for kind in (torch.float64, bench.dtype))
    real = slice(len(contexts))
    right_TQ = naive_attention(bench, right, torch.float64)
    same_TQ = naive_attention(bench, same, bench.dtype)
    assert_near(bench.arrays["attended_TQ"][real], right_TQ, same_TQ)
    slots = step.attention.batch.slots_T[real].cpu().numpy()
    after = step.attention.cache.keys_NKEP, step.attention.cache.values_NKPE
    for was, stored, exact, near in zip(
        before, after, (right.keys, right.values), (same.keys, same.values), strict=True
    ):
        newest = stored[slots // BLOCK, :, slots % BLOCK]
        exact, near = (torch.stack([x[-1] for x in it]) for it in (exact, near))
        assert_near(newest, exact, near)
        was[slots // BLOCK, :, slots % BLOCK] = newest
        # Block 0 belongs to nobody: what is beside the batch may be written there.
        was, stored = (it[1:].nan_to_num(7.0) for it in (was, stored))
        assert torch.equal(was, stored), "others were written"


def check_company(bench: Bench, contexts: list[int], alone: tuple[int, ...]) -> None:
    """Parts of a context follow from its length: alone or among others, the same bits. The products
    before must be the same for any number of tokens, too."""
    num_seqs = len(contexts)
    step = decode_step(bench, contexts, num_seqs)
    held, attended_TQ = step.attention.batch, bench.arrays["attended_TQ"]

    def attended(rows: slice) -> torch.Tensor:
        """Of some of the sequences; the sum of the stream is all in its residual."""
        num = rows.stop - rows.start
        batch = ForwardBatch(
            held.token_ids_T[rows],
            held.positions_T[rows].clone(),
            held.slots_T[rows].clone(),
            bench.integers(range(num + 1)),
            held.seq_lens_S[rows].clone(),
            held.block_table_SM[rows].clone(),
            bench.integers([]),
            is_decode=True,
        )
        residual_TD = step.sum_TD[rows].clone()
        x = Stream(residual_TD, bench.poisoned(*residual_TD.shape, dtype=bench.dtype))
        bench.arrays["product_parts"][:] = 0.0
        attended_TQ[:] = float("nan")
        attention = replace(step.attention, batch=batch)
        part = replace(step, attention=attention, x=x, sum_TD=residual_TD)
        bench.run(lambda: part.emit(bench))
        return attended_TQ[:num].clone()

    expected_TQ = attended(slice(0, num_seqs))
    right = naive_attention(bench, naive_decode(bench, step, torch.float64), torch.float64)
    assert error(expected_TQ, right) < 1e-2
    for i in alone:
        assert torch.equal(attended(slice(i, i + 1)), expected_TQ[i : i + 1]), contexts[i]


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(6, 2, 24), (4, 4, 16), (3, 1, 80), (8, 1, 64)],
    ids=["grouped", "all", "wide", "eight"],
)


def attention_spec(heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    return ModelSpec(40, 64, 1, heads, kv_heads, head_dim, 300, 4096, attention_bias=True)


@both_dtypes
@SHAPES
def test_prefill_attention(
    device: TestDevice, dtype: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Whole prompts, the last part of one, single tokens, and room for more sequences."""
    bench = Bench(device, attention_spec(heads, kv_heads, head_dim), dtype)
    check_attention(bench, [(70, 70), (1, 130), (20, 201), (1, 1)], 96, 7, False)


@pytest.mark.parametrize("num_tokens", [1, 16, 20])
def test_prefill_attention_of_a_few_tokens(device: TestDevice, num_tokens: int) -> None:
    bench = Bench(device, attention_spec(6, 2, 24), "float16")
    check_attention(bench, [(num_tokens, num_tokens + 64)], num_tokens, 8, False)


@both_dtypes
@SHAPES
def test_decode_attention(
    device: TestDevice, dtype: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    """One part of the context and several, their edges, and sequences of padding."""
    bench = Bench(device, attention_spec(heads, kv_heads, head_dim), dtype)
    check_decode(bench, [1, 64, 128, 129, 257, 700], 8)
    assert not bench.arrays["attended_TQ"][6:8].any(), "padding is zeros"


def test_decode_attention_of_a_long_context(device: TestDevice) -> None:
    """More blocks than parts: each part has several, the last one fewer."""
    bench = Bench(device, attention_spec(2, 1, 16), "float16", max_seq_len=4500)
    check_decode(bench, [4321, 2049], 2)


@pytest.mark.parametrize(("spec", "num_seqs"), [(PLAIN, 9), (SPEC, 21), (WIDE, 17)])
def test_decode_attention_of_every_product(
    device: TestDevice, spec: ModelSpec, num_seqs: int
) -> None:
    """In parts, by cuBLAS, and the target's own."""
    bench = Bench(device, spec, "float16", max_batch_size=num_seqs)
    check_decode(bench, [1 + 37 * i % 150 for i in range(num_seqs)], num_seqs)


def test_decode_attention_does_not_depend_on_the_batch(device: TestDevice) -> None:
    """That of all targets: its parts."""
    bench = Bench(device, SPEC, "float16", max_batch_size=6)
    check_company(bench, [300, 1, 64, 513, 65, 700], (0, 2, 5))


def test_deterministic_decode_attention_is_that_of_prefill(device: TestDevice) -> None:
    bench = Bench(device, attention_spec(6, 2, 24), "float16", deterministic=True)
    check_attention(bench, [(1, 300), (1, 31)], 2, 2, True)
