"""Every operation against a naive one in float64, written here in loops and without a cache.

The operations run as the session runs them: recorded once over fixed arrays, then replayed. Unused
cache slots, blocks and outputs hold NaN, so that reading or leaving one shows. A new backend joins
by adding its factory to BACKENDS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from puna.batch import ForwardBatch
from puna.layout import array_specs, pack_rows
from puna.ops import LayerCache, Linear, Norm, Ops, RopeTable, Stream
from puna.ops.reference import ReferenceOps
from puna.quant import DTYPES, Array, Format, quantize

BACKENDS: list[tuple[str, Callable[[], Ops]]] = [("reference", ReferenceOps)]
# Relative L2 to the float64 result; a wrong term anywhere is larger by orders of magnitude.
TOLERANCE = 2e-6
BLOCK = 16


@pytest.fixture(params=[make for _, make in BACKENDS], ids=[name for name, _ in BACKENDS])
def ops(request: pytest.FixtureRequest) -> Ops:
    return request.param()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def poisoned(*shape: int, dtype: str = "float32") -> Array:
    return np.full(shape, np.nan, DTYPES[dtype])


def run(ops: Ops, emit: Callable[[], None]) -> None:
    ops.record(emit).run()


def assert_close(found: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found.astype(np.float64)).all(), "NaN leaked in, or an output is missing"
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error <= tolerance, error


def load(ops: Ops, rng: np.random.Generator, num_rows: int, num_cols: int) -> tuple[object, Array]:
    """A float32 matrix as the backend wants it, and its values in float64."""
    x_NK = floats(rng, num_rows, num_cols) / np.float32(num_cols**0.5)
    out_NK = poisoned(num_rows, num_cols)
    return ops.load_matrix({"data": x_NK}, "float32", out_NK), x_NK.astype(np.float64)


def stream(rng: np.random.Generator, num_tokens: int, hidden: int) -> tuple[Stream, Array]:
    """A stream, and residual + partial in float64."""
    x = Stream(floats(rng, num_tokens, hidden), floats(rng, num_tokens, hidden))
    return x, (x.residual_TD + x.partial_TD).astype(np.float64)


def naive_norm(x_D: Array, norm: Norm) -> Array:
    mean = sum(float(v) ** 2 for v in x_D) / len(x_D)
    return x_D / (mean + norm.eps) ** 0.5 * norm.weight_D.astype(np.float64)


def naive_rotate(x_E: Array, position: int, rope: RopeTable) -> Array:
    half, out = len(x_E) // 2, np.empty(len(x_E))
    for i in range(half):
        cos, sin = float(rope.cos_PE[position, i]), float(rope.sin_PE[position, i])
        out[i] = x_E[i] * cos - x_E[i + half] * sin
        out[i + half] = x_E[i + half] * cos + x_E[i] * sin
    return out


@dataclass(frozen=True)
class Sequence:
    """`num_new` tokens of a step, the last of `num_context`."""

    num_new: int
    num_context: int


@dataclass(frozen=True)
class Paged:
    """A step over random blocks of a poisoned cache."""

    batch: ForwardBatch
    cache: LayerCache

    def slot(self, seq: int, position: int) -> tuple[int, int]:
        return int(self.batch.block_table_SM[seq, position // BLOCK]), position % BLOCK


def paged(
    rng: np.random.Generator,
    sequences: list[Sequence],
    num_kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
) -> Paged:
    """Blocks are dealt out of order; the context before the step's tokens holds random numbers."""
    num_blocks = [-(-seq.num_context // BLOCK) for seq in sequences]
    total = sum(num_blocks) + 3
    dealt = iter(rng.permutation(np.arange(1, total)).tolist())
    table_SM = np.zeros((len(sequences), max(num_blocks) + 2), np.int32)
    shape = (total, BLOCK, num_kv_heads, head_dim)
    cache = LayerCache(poisoned(*shape, dtype=dtype), poisoned(*shape, dtype=dtype))
    positions: list[int] = []
    slots: list[int] = []
    for s, seq in enumerate(sequences):
        for m in range(num_blocks[s]):
            table_SM[s, m] = next(dealt)
        for position in range(seq.num_context):
            block, offset = int(table_SM[s, position // BLOCK]), position % BLOCK
            if position >= seq.num_context - seq.num_new:
                positions.append(position)
                slots.append(block * BLOCK + offset)
                continue
            for array in (cache.keys_NPKE, cache.values_NPKE):
                array[block, offset] = floats(rng, num_kv_heads, head_dim).astype(array.dtype)
    starts = np.cumsum([0, *(seq.num_new for seq in sequences)])
    batch = ForwardBatch(
        token_ids_T=np.zeros(len(positions), np.int32),
        positions_T=np.array(positions, np.int32),
        slots_T=np.array(slots, np.int32),
        query_start_S1=starts.astype(np.int32),
        seq_lens_S=np.array([seq.num_context for seq in sequences], np.int32),
        block_table_SM=table_SM,
        logits_rows_L=(starts[1:] - 1).astype(np.int32),
    )
    return Paged(batch, cache)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33])
def test_embed(ops: Ops, rng: np.random.Generator, num_tokens: int) -> None:
    matrix, table_VD = load(ops, rng, 37, 20)
    ids_T = rng.integers(0, 37, num_tokens).astype(np.int32)
    x = Stream(poisoned(num_tokens, 20), poisoned(num_tokens, 20))
    run(ops, lambda: ops.embed(ids_T, Linear((matrix,)), x))
    assert not x.residual_TD.any()
    assert np.array_equal(x.partial_TD, table_VD[ids_T])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim"),
    [(1, 2, 1, 6), (15, 4, 4, 36), (16, 6, 2, 8), (17, 3, 1, 6), (33, 2, 2, 36)],
)
def test_qkv(
    ops: Ops,
    rng: np.random.Generator,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> None:
    hidden = 28
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    x, sum_TD = stream(rng, num_tokens, hidden)
    norm = Norm(floats(rng, hidden), 1e-5)
    # q in a part of its own, as where GGUF stores v finer than q and k.
    parts = [load(ops, rng, q_size + kv_size, hidden), load(ops, rng, kv_size, hidden)]
    weight_NK = np.concatenate([values for _, values in parts])
    bias_N = floats(rng, q_size + 2 * kv_size)
    linear = Linear(tuple(matrix for matrix, _ in parts), bias_N)
    first = num_tokens // 3
    sequences = [Sequence(n, n + 5) for n in (first, num_tokens - first) if n]
    step = paged(rng, sequences, num_kv_heads, head_dim, dtype)
    before = [a.astype(np.float64) for a in (step.cache.keys_NPKE, step.cache.values_NPKE)]
    angles = rng.uniform(0, 6, (40, head_dim // 2))
    rope = RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    q_TQ = poisoned(num_tokens, q_size)
    run(ops, lambda: ops.qkv(x, norm, linear, rope, step.batch, step.cache, q_TQ))

    assert np.array_equal(x.residual_TD, sum_TD.astype(np.float32))
    expected_TQ = np.empty((num_tokens, q_size))
    keys_NPKE, values_NPKE = before
    for t in range(num_tokens):
        y_N = weight_NK @ naive_norm(sum_TD[t], norm) + bias_N
        position, slot = int(step.batch.positions_T[t]), int(step.batch.slots_T[t])
        at = (slot // BLOCK, slot % BLOCK)
        for h in range(num_heads + num_kv_heads):
            rotated = naive_rotate(y_N[h * head_dim : (h + 1) * head_dim], position, rope)
            if h < num_heads:
                expected_TQ[t, h * head_dim : (h + 1) * head_dim] = rotated
            else:
                keys_NPKE[at][h - num_heads] = rotated
        values_NPKE[at] = y_N[q_size + kv_size :].reshape(num_kv_heads, head_dim)
    assert_close(q_TQ, expected_TQ)
    rounding = {"float32": TOLERANCE, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    for found, expected in (
        (step.cache.keys_NPKE, keys_NPKE),
        (step.cache.values_NPKE, values_NPKE),
    ):
        is_set = ~np.isnan(expected)
        assert np.array_equal(~np.isnan(found.astype(np.float32)), is_set), "wrong slots"
        assert_close(found[is_set], expected[is_set], rounding)


@pytest.mark.parametrize("head_dim", [6, 36])
@pytest.mark.parametrize(
    "sequences",
    [
        [Sequence(1, 1)],
        [Sequence(1, 255)],
        [Sequence(1, 256)],
        [Sequence(1, 257)],
        [Sequence(15, 15), Sequence(1, 40)],
        [Sequence(16, 256)],
        [Sequence(17, 257), Sequence(1, 1), Sequence(33, 33)],
        [Sequence(33, 270), Sequence(2, 513)],
    ],
    ids=lambda sequences: "+".join(f"{s.num_new}of{s.num_context}" for s in sequences),
)
def test_attention(
    ops: Ops, rng: np.random.Generator, sequences: list[Sequence], head_dim: int
) -> None:
    num_heads, num_kv_heads, hidden = 6, 2, 20
    step = paged(rng, sequences, num_kv_heads, head_dim)
    batch, cache = step.batch, step.cache
    num_tokens = batch.num_tokens
    # What qkv would have stored for the step's own tokens; the rest of their blocks stays NaN.
    at = (batch.slots_T // BLOCK, batch.slots_T % BLOCK)
    for array in (cache.keys_NPKE, cache.values_NPKE):
        array[at] = floats(rng, num_tokens, num_kv_heads, head_dim)
    q_TQ = floats(rng, num_tokens, num_heads * head_dim) * np.float32(1.5)
    matrix, weight_NK = load(ops, rng, hidden, num_heads * head_dim)
    bias_N = floats(rng, hidden)
    x = Stream(floats(rng, num_tokens, hidden), poisoned(num_tokens, hidden))
    residual_TD = x.residual_TD.copy()
    run(ops, lambda: ops.attention(q_TQ, batch, cache, Linear((matrix,), bias_N), x))

    expected_TD = np.empty((num_tokens, hidden))
    for s in range(batch.num_seqs):
        for t in range(batch.query_start_S1[s], batch.query_start_S1[s + 1]):
            heads = []
            context = [step.slot(s, p) for p in range(batch.positions_T[t] + 1)]
            for h in range(num_heads):
                kv = h // (num_heads // num_kv_heads)
                q_E = q_TQ[t, h * head_dim : (h + 1) * head_dim].astype(np.float64)
                keys = np.array([cache.keys_NPKE[p][kv] for p in context], np.float64)
                values = np.array([cache.values_NPKE[p][kv] for p in context], np.float64)
                weights = np.exp(keys @ q_E / head_dim**0.5)
                heads.append(weights @ values / weights.sum())
            expected_TD[t] = weight_NK @ np.concatenate(heads) + bias_N
    assert_close(x.partial_TD, expected_TD)
    assert np.array_equal(x.residual_TD, residual_TD)


def test_attention_survives_scores_beyond_exp(ops: Ops, rng: np.random.Generator) -> None:
    """Softmax must subtract the largest score, also when a later chunk holds it."""
    step = paged(rng, [Sequence(1, 300)], 1, 6)
    cache, batch = step.cache, step.batch
    at = (batch.slots_T // BLOCK, batch.slots_T % BLOCK)
    cache.keys_NPKE[at] = cache.values_NPKE[at] = 1.0
    cache.keys_NPKE[step.slot(0, 290)] = 400.0
    q_TQ = np.full((1, 6), 100.0, np.float32)
    matrix = ops.load_matrix({"data": np.eye(6, dtype=np.float32)}, "float32", poisoned(6, 6))
    x = Stream(poisoned(1, 6), poisoned(1, 6))
    run(ops, lambda: ops.attention(q_TQ, batch, cache, Linear((matrix,)), x))
    assert np.array_equal(x.partial_TD[0], cache.values_NPKE[step.slot(0, 290)][0])


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33])
def test_gate_up(ops: Ops, rng: np.random.Generator, num_tokens: int) -> None:
    hidden, ffn = 28, 43
    x, sum_TD = stream(rng, num_tokens, hidden)
    norm = Norm(floats(rng, hidden) * np.float32(30), 1e-5)
    gate, up = load(ops, rng, ffn, hidden), load(ops, rng, ffn, hidden)
    bias_N = floats(rng, 2 * ffn)
    act_TF = poisoned(num_tokens, ffn)
    run(ops, lambda: ops.gate_up(x, norm, Linear((gate[0], up[0]), bias_N), act_TF))

    expected_TF = np.empty((num_tokens, ffn))
    for t in range(num_tokens):
        y_D = naive_norm(sum_TD[t], norm)
        gate_F, up_F = gate[1] @ y_D + bias_N[:ffn], up[1] @ y_D + bias_N[ffn:]
        expected_TF[t] = gate_F / (1 + np.exp(-gate_F)) * up_F
    assert_close(act_TF, expected_TF)
    assert np.array_equal(x.residual_TD, sum_TD.astype(np.float32))


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33])
def test_down(ops: Ops, rng: np.random.Generator, num_tokens: int) -> None:
    act_TF, bias_N = floats(rng, num_tokens, 43), floats(rng, 28)
    matrix, weight_NK = load(ops, rng, 28, 43)
    x = Stream(floats(rng, num_tokens, 28), poisoned(num_tokens, 28))
    residual_TD = x.residual_TD.copy()
    run(ops, lambda: ops.down(act_TF, Linear((matrix,), bias_N), x))
    assert_close(x.partial_TD, act_TF.astype(np.float64) @ weight_NK.T + bias_N)
    assert np.array_equal(x.residual_TD, residual_TD)


@pytest.mark.parametrize("rows", [[0], [16], [0, 3, 4, 15, 16], list(range(17))])
def test_head(ops: Ops, rng: np.random.Generator, rows: list[int]) -> None:
    x, sum_TD = stream(rng, 17, 28)
    norm = Norm(floats(rng, 28), 1e-6)
    matrix, weight_NK = load(ops, rng, 51, 28)
    before = Stream(x.residual_TD.copy(), x.partial_TD.copy())
    rows_L, logits_LV = np.array(rows, np.int32), poisoned(len(rows), 51)
    run(ops, lambda: ops.head(x, rows_L, norm, Linear((matrix,)), logits_LV))
    assert_close(logits_LV, np.array([weight_NK @ naive_norm(sum_TD[r], norm) for r in rows]))
    assert np.array_equal(x.residual_TD, before.residual_TD), "head must leave the stream alone"
    assert np.array_equal(x.partial_TD, before.partial_TD), "head must leave the stream alone"


def test_copy_blocks_reads_everything_before_it_writes(ops: Ops, rng: np.random.Generator) -> None:
    kv_cache = floats(rng, 3, 2, 6, BLOCK, 2, 4)
    before = kv_cache.copy()
    ops.copy_blocks(kv_cache, np.array([[1, 2], [2, 3], [4, 1]], np.int32))
    for destination, source in ((2, 1), (3, 2), (1, 4), (4, 4), (5, 5), (0, 0)):
        assert np.array_equal(kv_cache[:, :, destination], before[:, :, source])


@pytest.mark.parametrize("num_cols", [33, 64])
@pytest.mark.parametrize(
    "name", ["float32", "float16", "bfloat16", "int8", "int8-g16", "int4-g32", "int4"]
)
def test_loaded_formats_multiply_as_their_values(
    ops: Ops, rng: np.random.Generator, name: str, num_cols: int
) -> None:
    fmt, values_NK = Format.parse(name), floats(rng, 21, num_cols)
    if fmt.is_dense:
        arrays = {"data": values_NK.astype(DTYPES[name])}
        exact_NK = arrays["data"].astype(np.float64)
    else:
        tensor = quantize(values_NK, fmt)
        arrays = pack_rows(tensor)
        exact_NK = naive_dequantize(tensor.q_NK, tensor.scale_NG, fmt)
    specs = array_specs(fmt, 21, num_cols)
    assert {key: (a.dtype, a.shape) for key, a in arrays.items()} == specs
    matrix = ops.load_matrix(arrays, name, poisoned(21, num_cols))
    act_TF = floats(rng, 17, num_cols)
    x = Stream(poisoned(17, 21), poisoned(17, 21))
    run(ops, lambda: ops.down(act_TF, Linear((matrix,)), x))
    assert_close(x.partial_TD, act_TF.astype(np.float64) @ exact_NK.T)


def naive_dequantize(q_NK: Array, scale_NG: Array, fmt: Format) -> Array:
    out = np.empty(q_NK.shape)
    for n, k in np.ndindex(*q_NK.shape):
        group = k // fmt.group_size if fmt.group_size else 0
        out[n, k] = float(q_NK[n, k]) * float(scale_NG[n, group])
    return out


def test_a_program_reads_its_arrays_when_it_runs(ops: Ops, rng: np.random.Generator) -> None:
    matrix, weight_NK = load(ops, rng, 8, 12)
    act_TF = poisoned(2, 12)
    x = Stream(poisoned(2, 8), poisoned(2, 8))
    program = ops.record(lambda: ops.down(act_TF, Linear((matrix,)), x))
    assert np.isnan(x.partial_TD).all(), "recording must compute nothing"
    for _ in range(2):
        act_TF[:] = floats(rng, 2, 12)
        program.run()
        assert_close(x.partial_TD, act_TF.astype(np.float64) @ weight_NK.T)


def test_a_row_does_not_depend_on_its_company(ops: Ops, rng: np.random.Generator) -> None:
    """Bit for bit: any subset of rows gives the same results as all of them."""
    matrix, _ = load(ops, rng, 53, 75)
    act_TF = floats(rng, 40, 75)

    def down(rows: slice) -> Array:
        x = Stream(poisoned(40, 53)[rows], poisoned(40, 53)[rows])
        run(ops, lambda: ops.down(act_TF[rows], Linear((matrix,)), x))
        return x.partial_TD

    together = down(slice(0, 40))
    for rows in (slice(0, 1), slice(3, 4), slice(5, 20), slice(16, 17), slice(17, 40)):
        assert np.array_equal(down(rows), together[rows])
