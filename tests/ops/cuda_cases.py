"""Every operation of CudaOps but attention against float64, and its error against what torch makes
in the same dtype. `test_triton_kernels` runs them under Triton's interpreter, `tests/gpu` on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_bench import (
    PLAIN,
    SPEC,
    WIDE,
    Bench,
    TestDevice,
    activated,
    assert_near,
    both_dtypes,
    every_way,
    norm_of,
    project,
    weight_of,
)
from cuda_configs import BLOCK

from puna.batch import ForwardBatch
from puna.ops import LayerCache, Norm, RopeTable, Stream
from puna.spec import ModelSpec


@both_dtypes
@every_way
def test_embed(device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int) -> None:
    spec = replace(spec, vocab_size=SPEC.vocab_size)
    bench = Bench(device, spec, dtype)
    table = bench.linear([SPEC.vocab_size], spec.hidden_size)
    bench.arrays["last_tokens_R"][:] = bench.integers([11, 22, 33, 44, 55, 66, 77, 2499])
    ids = np.arange(num_tokens) * 119 % SPEC.vocab_size
    expected_ids = ids.copy()
    if num_tokens > 4:
        ids[2], expected_ids[2] = -1 - 5, 66
        ids[4], expected_ids[4] = -1 - 7, 2499
    x = Stream(
        bench.poisoned(num_tokens, spec.hidden_size),
        bench.poisoned(num_tokens, spec.hidden_size, dtype=bench.dtype),
    )
    ids_T = bench.integers(ids)
    bench.run(lambda: bench.ops.embed(ids_T, table, x))
    assert torch.equal(x.residual_TD, weight_of(table)[expected_ids].float())
    found = bench.beside(x)
    if found:
        beside = x.partial_TD if found == "_partial" else bench.parts(num_tokens)
        assert not beside.any()


def test_embed_of_no_token_is_zeros(device: TestDevice) -> None:
    """A last token that was never sampled may be any number."""
    bench = Bench(device, SPEC, "float16")
    table = bench.linear([SPEC.vocab_size], SPEC.hidden_size)
    bench.arrays["last_tokens_R"][:] = 2**30
    x = Stream(bench.poisoned(2, SPEC.hidden_size), bench.poisoned(2, SPEC.hidden_size))
    ids_T = bench.integers([-1, 2500])
    bench.run(lambda: bench.ops.embed(ids_T, table, x))
    assert not x.residual_TD.any()


@both_dtypes
@every_way
def test_qkv(device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int) -> None:
    bench = Bench(device, spec, dtype)
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    x, sum_TD = bench.stream(num_tokens)
    norm = Norm(bench.floats(spec.hidden_size), 1e-5)
    sizes = [spec.q_size, spec.kv_size, spec.kv_size]
    linear = bench.linear(sizes, spec.hidden_size, spec.attention_bias)
    angles = bench.floats(1024, size // 2) * 3
    rope = RopeTable(torch.cos(angles), torch.sin(angles))
    positions = np.arange(num_tokens) * 13 % 1000
    slots = (np.arange(num_tokens) * 7 % 190) + BLOCK  # block 0 is not used
    shape = (4, kv_heads, BLOCK, size)
    cache = LayerCache(
        bench.poisoned(*shape, dtype=bench.dtype), bench.poisoned(*shape, dtype=bench.dtype)
    )
    batch = batch_of(bench, positions, slots)
    q_TQ = bench.poisoned(num_tokens, spec.q_size, dtype=bench.dtype)
    bench.run(lambda: bench.ops.qkv(x, norm, linear, rope, batch, cache, q_TQ))
    assert torch.equal(x.residual_TD, sum_TD)

    def rotated(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y_TN = project(norm_of(sum_TD.to(dtype), norm), linear, dtype)
        q, k, v = y_TN.view(num_tokens, -1, size).split([heads, kv_heads, kv_heads], dim=1)
        at = torch.as_tensor(positions, device=bench.device)
        cos, sin = (table[at][:, None].to(dtype) for table in (rope.cos_PE, rope.sin_PE))

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return rotate(q).reshape(num_tokens, -1), rotate(k), v

    expected, same = rotated(torch.float64), rotated(bench.dtype)
    assert_near(q_TQ, expected[0], same[0])
    block, offset = slots // BLOCK, slots % BLOCK
    for stored, right, rounded in zip(
        (cache.keys_NKEP, cache.values_NKPE), expected[1:], same[1:], strict=True
    ):
        assert_near(stored[block, :, offset], right, rounded)
        is_set = torch.zeros(shape[0], BLOCK, dtype=torch.bool)
        is_set[block, offset] = True
        others = stored.permute(0, 2, 1, 3)[~is_set.to(bench.device)]
        assert torch.isnan(others).all(), "slots of nobody were written"


def batch_of(bench: Bench, positions: Any, slots: Any) -> ForwardBatch:
    """What qkv reads of a batch."""
    nothing = bench.integers([])
    return ForwardBatch(
        token_ids_T=bench.integers(np.zeros(len(positions))),
        positions_T=bench.integers(positions),
        slots_T=bench.integers(slots),
        query_start_S1=nothing,
        seq_lens_S=nothing,
        block_table_SM=nothing,
        logits_rows_L=nothing,
    )


def test_a_float16_cache_is_clipped_to_its_range(device: TestDevice) -> None:
    bench = Bench(device, SPEC, "float16")
    x, _ = bench.stream(1)
    norm = Norm(bench.floats(SPEC.hidden_size), 1e-5)
    linear = bench.linear([SPEC.q_size, SPEC.kv_size, SPEC.kv_size], SPEC.hidden_size, True)
    bias_N = torch.as_tensor(linear.bias_N)
    bias_N[SPEC.q_size :] = 1e6
    bias_N[-1] = -1e6
    flat = torch.zeros(8, SPEC.head_dim // 2, device=bench.device)
    cache = LayerCache(*(bench.poisoned(2, 2, BLOCK, 24, dtype=bench.dtype) for _ in range(2)))
    q_TQ = bench.poisoned(1, SPEC.q_size, dtype=bench.dtype)
    batch = batch_of(bench, [0], [BLOCK])
    rope = RopeTable(flat + 1, flat)
    bench.run(lambda: bench.ops.qkv(x, norm, linear, rope, batch, cache, q_TQ))
    assert (cache.keys_NKEP[1, :, 0] == 65504).all()
    assert cache.values_NKPE[1, 1, 0, -1] == -65504 and cache.values_NKPE[1, 0, 0, 0] == 65504


@both_dtypes
@every_way
def test_gate_up(device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int) -> None:
    bench = Bench(device, spec, dtype)
    x, sum_TD = bench.stream(num_tokens)
    norm = Norm(bench.floats(spec.hidden_size), 1e-5)
    ffn = spec.intermediate_size
    linear = bench.linear([ffn, ffn], spec.hidden_size, spec.mlp_bias)
    act_TF = bench.poisoned(num_tokens, ffn, dtype=bench.dtype)
    bench.run(lambda: bench.ops.gate_up(x, norm, linear, act_TF))
    assert torch.equal(x.residual_TD, sum_TD)
    right, same = (activated(sum_TD, norm, linear, kind) for kind in (torch.float64, bench.dtype))
    assert_near(act_TF, right, same)


@both_dtypes
def test_gate_up_of_many_tokens(device: TestDevice, dtype: str) -> None:
    bench = Bench(device, WIDE, dtype, max_num_tokens=160)
    x, sum_TD = bench.stream(150)
    norm = Norm(bench.floats(WIDE.hidden_size), 1e-5)
    ffn = WIDE.intermediate_size
    linear = bench.linear([ffn, ffn], WIDE.hidden_size, True)
    act_TF = bench.poisoned(150, ffn, dtype=bench.dtype)
    bench.run(lambda: bench.ops.gate_up(x, norm, linear, act_TF))
    right, same = (activated(sum_TD, norm, linear, kind) for kind in (torch.float64, bench.dtype))
    assert_near(act_TF, right, same)


@both_dtypes
@every_way
def test_down(device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int) -> None:
    bench = Bench(device, spec, dtype)
    act_TF = bench.rounded(num_tokens, spec.intermediate_size)
    linear = bench.linear([spec.hidden_size], spec.intermediate_size, spec.mlp_bias)
    x, _ = bench.stream(num_tokens)
    found_TD = bench.added_by(lambda: bench.ops.down(act_TF, linear, x), x)
    product_TD = project(act_TF, linear, torch.float64)
    assert_near(found_TD, product_TD, project(act_TF, linear, bench.dtype))


def test_down_of_many_tokens_where_deterministic(device: TestDevice) -> None:
    """Skinny, though beyond the tokens whose parts are left to the consumer."""
    bench = Bench(device, SPEC, "float16", deterministic=True)
    act_TF = bench.rounded(70, SPEC.intermediate_size)
    linear = bench.linear([SPEC.hidden_size], SPEC.intermediate_size, True)
    x, _ = bench.stream(70)
    assert not bench.beside(x)
    found_TD = bench.added_by(lambda: bench.ops.down(act_TF, linear, x), x)
    same_TD = project(act_TF, linear, bench.dtype)
    assert_near(found_TD, project(act_TF, linear, torch.float64), same_TD)
    few, _ = bench.stream(40)
    parts_TD = bench.added_by(lambda: bench.ops.down(act_TF[:40], linear, few), few)
    assert bench.beside(few) == "_parts"
    assert_near(parts_TD, project(act_TF[:40], linear, torch.float64), same_TD[:40])


@both_dtypes
@pytest.mark.parametrize("spec", [SPEC, WIDE], ids=["skinny", "wide"])
@pytest.mark.parametrize(
    ("num_tokens", "rows"), [(1, [0]), (18, [0, 3, 17]), (30, [29, 0, 5, 5, 28])]
)
def test_head(
    device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int, rows: list[int]
) -> None:
    bench = Bench(device, spec, dtype)
    x, sum_TD = bench.stream(num_tokens)
    before_TD = x.residual_TD.clone()
    norm = Norm(bench.floats(spec.hidden_size), 1e-5)
    linear = bench.linear([spec.vocab_size], spec.hidden_size)
    logits_LV = bench.poisoned(len(rows), spec.vocab_size)
    rows_L = bench.integers(rows)
    bench.run(lambda: bench.ops.head(x, rows_L, norm, linear, logits_LV))
    assert torch.equal(x.residual_TD, before_TD), "the stream is left as it is"

    def logits(dtype: torch.dtype) -> torch.Tensor:
        return project(norm_of(sum_TD[rows].to(dtype), norm), linear, dtype)

    assert_near(logits_LV, logits(torch.float64), logits(bench.dtype))


def test_sample_greedy(device: TestDevice) -> None:
    bench = Bench(device, SPEC, "float16")
    logits_LV = bench.floats(5, SPEC.vocab_size)
    logits_LV[0, [7, 2300]] = 99.0  # in two chunks
    logits_LV[1, [2498, 2499]] = 99.0
    logits_LV[2] = float("-inf")
    logits_LV[3] = -5.0
    logits_LV[4, 3] = float("nan")
    logits_LV[4, 2048] = 98.0
    last_R = bench.integers([-7] * 8)
    out_L = bench.integers([-7] * 5)
    rows_L = bench.integers([3, -1, 0, 7, 2])
    bench.run(lambda: bench.ops.sample_greedy(logits_LV, rows_L, last_R, out_L))
    assert out_L.tolist() == [7, 2498, 0, 0, 2048]
    assert last_R.tolist() == [0, -7, 2048, 7, -7, -7, -7, 0]


def test_copy_blocks(device: TestDevice) -> None:
    """All sources are read before anything is written."""
    bench = Bench(device, PLAIN, "float16")
    kv = bench.rounded(1, 2, 5, 4, BLOCK, 16)
    before = kv.clone()
    bench.ops.copy_blocks((kv,), np.array([[1, 2], [2, 3]], np.int32))
    assert torch.equal(kv[:, :, 2], before[:, :, 1]) and torch.equal(kv[:, :, 3], before[:, :, 2])
    assert torch.equal(kv[:, :, [0, 1, 4]], before[:, :, [0, 1, 4]])
