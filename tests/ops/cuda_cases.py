"""Every operation of CudaOps against float64, and its error against what torch makes in the same
dtype. Run by `test_triton_kernels` under Triton's interpreter and by `tests/gpu` on a GPU.

Outputs, unused slots of the cache and padding of scratch hold NaN, so that reading or leaving one
shows. Shapes are odd on purpose; suffixes as in `puna.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_configs import BLOCK, cuda_config

from puna.batch import ForwardBatch
from puna.cuda.choices import Choices
from puna.cuda.ops import CudaOps
from puna.cuda_memory import PART_ROWS, padded_cols, padded_rows, product_splits
from puna.engine import EngineConfig
from puna.memory import workspace_specs
from puna.models.llama.model import Activations, Layer, Llama
from puna.ops import LayerCache, Linear, Norm, RopeTable, Stream
from puna.ops.reference import ReferenceOps
from puna.spec import ModelSpec

# Of a device of tests: (config, arrays, choices, deterministic) -> CudaOps.
MakeOps = Callable[[EngineConfig, dict[str, torch.Tensor], Choices, bool], CudaOps]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# A row beyond this takes the way of many tokens: few are enough to see both.
DIRECT = 20


@dataclass(frozen=True)
class TestDevice:
    """Where the operations run, and how they are made there."""

    __test__ = False
    name: str
    make_ops: MakeOps


SPEC = ModelSpec(
    hidden_size=72,
    intermediate_size=200,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=2500,
    max_position_embeddings=1024,
    attention_bias=True,
    mlp_bias=True,
)
# Its product of q, k and v is one in parts, as those of o and down are above.
PLAIN = ModelSpec(160, 128, 1, 4, 4, 16, 300, 1024)


def arrays_of(config: EngineConfig, device: str) -> dict[str, torch.Tensor]:
    """The workspace, full of NaN (integers: -1)."""
    made = {}
    for name, (dtype, shape) in workspace_specs(config, 0, "cuda").items():
        kind = {"float32": torch.float32, "int32": torch.int32, **DTYPES}[dtype.name]
        fill = -1 if kind == torch.int32 else float("nan")
        made[name] = torch.full(shape, fill, dtype=kind, device=device)
    return made


class Bench:
    """One configuration on a device, with random matrices in its dtype."""

    def __init__(
        self,
        device: TestDevice,
        spec: ModelSpec,
        dtype: str,
        *,
        deterministic: bool = False,
        max_num_tokens: int = 128,
        max_batch_size: int = 8,
        max_seq_len: int = 1024,
        overlaps: bool = True,
    ) -> None:
        self.config = cuda_config(
            spec,
            dtype,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            max_batch_size=max_batch_size,
        )
        self.spec, self.dtype, self.device = spec, DTYPES[dtype], device.name
        self.arrays = arrays_of(self.config, device.name)
        choices = Choices(direct_tokens=DIRECT, overlaps=overlaps)
        self.ops = device.make_ops(self.config, self.arrays, choices, deterministic)
        self.rng = torch.Generator(self.device).manual_seed(5)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device)

    def rounded(self, *shape: int) -> torch.Tensor:
        return self.floats(*shape).to(self.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def integers(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.int32)).to(self.device)

    def linear(self, sizes: list[int], num_cols: int, has_bias: bool = False) -> Linear:
        """Matrices one after the other as in a rank's file, and their bias."""
        total = sum(map(padded_rows, sizes))
        stored = torch.zeros((total, padded_cols(num_cols)), dtype=self.dtype, device=self.device)
        matrices, at = [], 0
        for size in sizes:
            weight_NK = self.floats(size, num_cols) / num_cols**0.5
            stored[at : at + size, :num_cols] = weight_NK.to(self.dtype)
            data = stored[at : at + padded_rows(size)]
            name = "float16" if self.dtype == torch.float16 else "bfloat16"
            matrices.append(self.ops.load_matrix({"data": data}, name, (size, num_cols), None))
            at += padded_rows(size)
        return Linear(tuple(matrices), self.floats(sum(sizes)) if has_bias else None)

    def stream(self, num_tokens: int) -> tuple[Stream, torch.Tensor]:
        """A stream, and the residual that its consumer should see, in float32."""
        residual_TD = self.floats(num_tokens, self.spec.hidden_size)
        partial_TD = self.poisoned(*residual_TD.shape, dtype=self.dtype)
        x, sum_TD = Stream(residual_TD.clone(), partial_TD), residual_TD
        beside = self.beside(x)
        if beside == "_partial":
            partial_TD[:] = self.rounded(*residual_TD.shape)
            sum_TD = residual_TD + partial_TD.float()
        if beside == "_parts":
            parts = self.parts(num_tokens)
            parts[:] = self.floats(*parts.shape)
            sum_TD = residual_TD + added(parts)
        return x, sum_TD

    def beside(self, x: Stream) -> str:
        """How the operations hold what is not in the residual yet."""
        return self.ops._beside(x)[0]

    def parts(self, num_tokens: int) -> torch.Tensor:
        """The parts of products of o and down, [SPLITS, T, D]."""
        splits, hidden = product_splits(self.config)[1], self.spec.hidden_size
        flat = self.arrays["product_parts"][: splits * PART_ROWS * hidden]
        return flat.view(splits, PART_ROWS, hidden)[:, :num_tokens]

    def added_by(self, emit: Callable[[], None], x: Stream) -> torch.Tensor:
        """What an operation adds to a stream, wherever it leaves it; as near as float32 is."""
        before_TD = x.residual_TD.clone()
        self.arrays["product_parts"][:] = float("nan")
        self.run(emit)
        beside = self.beside(x)
        if beside:
            assert torch.equal(x.residual_TD, before_TD)
        if beside == "_parts":
            return added(self.parts(len(x.residual_TD)))
        return x.partial_TD if beside else x.residual_TD - before_TD

    def run(self, emit: Callable[[], None]) -> None:
        self.ops.record(emit).run()
        if self.device != "cpu":
            torch.cuda.synchronize()


def added(parts_STD: torch.Tensor) -> torch.Tensor:
    """In order."""
    total_TD = parts_STD[0].clone()
    for part_TD in parts_STD[1:]:
        total_TD += part_TD
    return total_TD


def weight_of(linear: Linear) -> torch.Tensor:
    return torch.cat([part.data_NK[: part.num_rows, : part.num_cols] for part in linear.weights])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found.double()).all(), "NaN leaked in, or an output is missing"
    return float((found.double() - expected).norm() / expected.norm())


def assert_near(found: torch.Tensor, expected: torch.Tensor, same: torch.Tensor) -> None:
    """`found` is at most twice as far from the float64 result as torch in the same dtype is."""
    assert error(found, expected) <= 2 * error(same, expected) + 1e-6, (
        error(found, expected),
        error(same, expected),
    )


def norm_of(x_TD: torch.Tensor, norm: Norm) -> torch.Tensor:
    scale = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + norm.eps)
    return x_TD * scale * torch.as_tensor(norm.weight_D).to(x_TD.dtype)


def project(x_TK: torch.Tensor, linear: Linear, dtype: torch.dtype) -> torch.Tensor:
    """x W^T + b in a dtype: float64 for what is right, the engine's for what torch makes of it."""
    y_TN = x_TK.to(dtype) @ weight_of(linear).to(dtype).T
    return y_TN if linear.bias_N is None else y_TN + torch.as_tensor(linear.bias_N).to(dtype)


def activated(sum_TD: torch.Tensor, norm: Norm, linear: Linear, dtype: torch.dtype) -> torch.Tensor:
    """What gate_up makes of a residual, in a dtype."""
    gate_TF, up_TF = project(norm_of(sum_TD.to(dtype), norm), linear, dtype).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF) * up_TF


both_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
# One token, a tile's edge, both sides of the bound, and two tiles.
both_ways = pytest.mark.parametrize("num_tokens", [1, 16, 17, 20, 21, 37])


@both_dtypes
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["parts", "whole"])
@pytest.mark.parametrize("num_tokens", [1, 7, 21])
def test_embed(device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int) -> None:
    spec = replace(spec, vocab_size=SPEC.vocab_size)
    bench = Bench(device, spec, dtype)
    table = bench.linear([SPEC.vocab_size], spec.hidden_size)
    bench.arrays["last_tokens_R"][:] = bench.integers([11, 22, 33, 44, 55, 66, 77, 2499])
    ids = np.arange(num_tokens) * 119
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
    if bench.beside(x):
        beside = x.partial_TD if bench.beside(x) == "_partial" else bench.parts(num_tokens)
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
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["biased", "plain"])
@both_ways
def test_qkv(device: TestDevice, dtype: str, spec: ModelSpec, num_tokens: int) -> None:
    bench = Bench(device, spec, dtype)
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    x, sum_TD = bench.stream(num_tokens)
    norm = Norm(bench.floats(spec.hidden_size), 1e-5)
    sizes = [spec.q_size, spec.kv_size, spec.kv_size]
    linear = bench.linear(sizes, spec.hidden_size, spec.attention_bias)
    angles = bench.floats(1024, size // 2) * 3
    rope = RopeTable(torch.cos(angles), torch.sin(angles))
    positions = np.arange(num_tokens) * 13
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
    sequences = [(1, context) for context in (1, 64, 128, 129, 257, 700)]
    check_attention(bench, sequences, 8, 8, True)
    assert not bench.arrays["attended_TQ"][6:8].any(), "padding is zeros"


def test_decode_attention_of_a_long_context(device: TestDevice) -> None:
    """More blocks than parts: each part has several, the last one fewer."""
    bench = Bench(device, attention_spec(2, 1, 16), "float16", max_seq_len=4500)
    check_attention(bench, [(1, 4321), (1, 2049)], 2, 2, True)


def test_deterministic_decode_attention_is_that_of_prefill(device: TestDevice) -> None:
    bench = Bench(device, attention_spec(6, 2, 24), "float16", deterministic=True)
    check_attention(bench, [(1, 300), (1, 31)], 2, 2, True)


@both_dtypes
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["biased", "plain"])
@both_ways
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
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["biased", "plain"])
@both_ways
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
@pytest.mark.parametrize(
    ("num_tokens", "rows"), [(1, [0]), (18, [0, 3, 17]), (30, [29, 0, 5, 5, 28])]
)
def test_head(device: TestDevice, dtype: str, num_tokens: int, rows: list[int]) -> None:
    bench = Bench(device, SPEC, dtype)
    x, sum_TD = bench.stream(num_tokens)
    before_TD = x.residual_TD.clone()
    norm = Norm(bench.floats(SPEC.hidden_size), 1e-5)
    linear = bench.linear([SPEC.vocab_size], SPEC.hidden_size)
    logits_LV = bench.poisoned(len(rows), SPEC.vocab_size)
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


MODEL = ModelSpec(
    hidden_size=72,
    intermediate_size=200,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=300,
    max_position_embeddings=256,
    attention_bias=True,
    mlp_bias=True,
)


class TwoModels:
    """The same random model on the device and in the reference, each with a cache of its own."""

    def __init__(self, bench: Bench, num_blocks: int) -> None:
        self.bench, spec = bench, bench.spec
        shape = (num_blocks, spec.num_kv_heads, BLOCK, spec.head_dim)
        angles = bench.floats(256, spec.head_dim // 2) * 3
        rope = RopeTable(torch.cos(angles), torch.sin(angles))
        q, kv, d, f = spec.q_size, spec.kv_size, spec.hidden_size, spec.intermediate_size

        def norm() -> Norm:
            return Norm(1 + bench.floats(d) / 4, 1e-5)

        def layer() -> Layer:
            caches = [bench.poisoned(*shape, dtype=bench.dtype) for _ in range(2)]
            return Layer(
                norm(),
                bench.linear([q, kv, kv], d, spec.attention_bias),
                bench.linear([d], q, spec.attention_bias),
                norm(),
                bench.linear([f, f], d, spec.mlp_bias),
                bench.linear([d], f, spec.mlp_bias),
                LayerCache(*caches),
            )

        layers = tuple(layer() for _ in range(spec.num_layers))
        vocab = [spec.vocab_size]
        embed, head = bench.linear(vocab, d), bench.linear(vocab, d)
        self.model = Llama(layers, rope, embed, norm(), head)
        self.reference = _reference_of(self.model, num_blocks, bench.spec)

    def step(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the device, of the reference, and the tokens the device chose."""
        bench, arrays, ops = self.bench, self.bench.arrays, self.bench.ops
        act = Activations(*(arrays[n] for n in ("residual_TD", "partial_TD", "q_TQ", "act_TF")))
        num_rows = len(batch.logits_rows_L)
        logits_LV = arrays["logits_LV"][:num_rows]
        tokens_L = bench.integers([-7] * num_rows)
        rows_L = bench.integers(range(num_rows))

        def emit() -> None:
            self.model.forward(ops, batch, act)
            self.model.logits(ops, batch.logits_rows_L, batch.num_tokens, act, logits_LV)
            ops.sample_greedy(logits_LV, rows_L, arrays["last_tokens_R"], tokens_L)

        expected_LV = self._expected(batch)  # before the last tokens are others
        bench.run(emit)
        return logits_LV, expected_LV, tokens_L

    def _expected(self, batch: ForwardBatch) -> torch.Tensor:
        spec, num_tokens = self.bench.spec, batch.num_tokens
        sizes = (spec.hidden_size, spec.hidden_size, spec.q_size, spec.intermediate_size)
        act = Activations(*(np.zeros((num_tokens, size), np.float32) for size in sizes))
        on_host = ForwardBatch(
            *(
                torch.as_tensor(getattr(batch, field.name)).cpu().numpy()
                for field in fields(batch)
                if field.name != "is_decode"
            )
        )
        ids_T, last_R = on_host.token_ids_T, self.bench.arrays["last_tokens_R"].cpu().numpy()
        known_T = np.where(ids_T < 0, last_R[-1 - np.minimum(ids_T, -1)], ids_T)
        on_host = replace(on_host, token_ids_T=known_T)
        ops = ReferenceOps()
        logits_LV = np.zeros((len(on_host.logits_rows_L), spec.vocab_size), np.float32)
        ops.record(lambda: self.reference.forward(ops, on_host, act)).run()
        rows_L = on_host.logits_rows_L
        ops.record(lambda: self.reference.logits(ops, rows_L, num_tokens, act, logits_LV)).run()
        return torch.as_tensor(logits_LV, device=self.bench.device).double()


def _reference_of(model: Llama, num_blocks: int, spec: ModelSpec) -> Llama:
    """The model in float32 NumPy, with its keys as the reference has them."""

    def array(x: Any) -> Any:
        return x.float().cpu().numpy()

    def linear(linear: Linear) -> Linear:
        bias = None if linear.bias_N is None else array(linear.bias_N)
        parts = [part.data_NK[: part.num_rows, : part.num_cols] for part in linear.weights]
        return Linear(tuple(array(part) for part in parts), bias)

    def norm(norm: Norm) -> Norm:
        return Norm(array(norm.weight_D), norm.eps)

    def cache() -> LayerCache:
        keys = (num_blocks, spec.num_kv_heads, spec.head_dim, BLOCK)
        values = (num_blocks, spec.num_kv_heads, BLOCK, spec.head_dim)
        return LayerCache(np.zeros(keys, np.float32), np.zeros(values, np.float32))

    layers = tuple(
        Layer(
            norm(layer.attn_norm),
            linear(layer.qkv),
            linear(layer.o),
            norm(layer.mlp_norm),
            linear(layer.gate_up),
            linear(layer.down),
            cache(),
        )
        for layer in model.layers
    )
    rope = RopeTable(array(model.rope.cos_PE), array(model.rope.sin_PE))
    assert model.embed is not None and model.norm is not None and model.head is not None
    return Llama(layers, rope, linear(model.embed), norm(model.norm), linear(model.head))


@pytest.mark.parametrize(
    ("dtype", "deterministic"), [("float16", False), ("bfloat16", False), ("float16", True)]
)
def test_model_against_the_reference(device: TestDevice, dtype: str, deterministic: bool) -> None:
    """A padded step of many tokens with two prompts, then tokens that only the device knows, with a
    sequence of padding."""
    bench = Bench(device, MODEL, dtype, deterministic=deterministic, max_seq_len=256)
    models = TwoModels(bench, 5)
    table = np.zeros((8, 4), np.int32)
    table[0, :2], table[1, :2] = [3, 1], [4, 2]
    lens, padded = [70, 9], 96
    positions = [*range(70), *range(9)]
    slots = [
        int(table[s, p // BLOCK]) * BLOCK + p % BLOCK for s, n in enumerate(lens) for p in range(n)
    ]
    ids = torch.arange(79).mul(37).remainder(300).tolist()
    rest = padded - 79
    batch = ForwardBatch(
        bench.integers([*ids, *[0] * rest]),
        bench.integers([*positions, *[0] * rest]),
        bench.integers([*slots, *range(rest)]),
        bench.integers([0, 70, *[79] * 7]),
        bench.integers([*lens, *[0] * 6]),
        bench.integers(table),
        bench.integers([69, 78]),
    )
    tolerance = 4e-3 if dtype == "float16" else 3e-2
    found_LV, expected_LV, tokens_L = models.step(batch)
    assert error(found_LV, expected_LV) < tolerance
    assert torch.equal(tokens_L.long(), found_LV.argmax(dim=1))
    for step in range(3):
        lens = [n + 1 for n in lens]
        at = [int(table[s, (n - 1) // BLOCK]) * BLOCK + (n - 1) % BLOCK for s, n in enumerate(lens)]
        batch = ForwardBatch(
            bench.integers([-1, -2, 0]),
            bench.integers([*(n - 1 for n in lens), 0]),
            bench.integers([*at, step]),
            bench.integers([0, 1, 2, 2]),
            bench.integers([*lens, 0]),
            bench.integers(table[:3]),
            bench.integers([0, 1]),
            is_decode=True,
        )
        found_LV, expected_LV, tokens_L = models.step(batch)
        assert error(found_LV, expected_LV) < tolerance, step
        assert bench.arrays["last_tokens_R"][:2].tolist() == tokens_L.tolist()
