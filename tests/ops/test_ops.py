"""Every operation against a naive one in float64, written here in loops and without a cache.

The operations run as the session runs them: recorded once over fixed arrays, then replayed. Unused
cache slots, blocks and outputs hold NaN (the scales of an int8 cache; its numbers -128, which no
operation writes), so that reading or leaving one shows. Which backends there are is in `backends`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from backends import Backend, as_multiplied, backends, multiplies_bfloat16, to_bfloat16
from paged import BLOCK, Sequence, cache_arrays, contents, floats, paged, poisoned, store

from puna.layout import array_specs, pack_dense, pack_quantised
from puna.ops import LayerCache, Linear, Norm, RopeTable, Stream
from puna.ops.reference import ReferenceOps
from puna.quant import DTYPES, Array, Format, QuantTensor, quantize

# Relative L2 to the float64 result; a wrong term anywhere is larger by orders of magnitude.
TOLERANCE = 2e-6


@pytest.fixture(params=backends().values(), ids=backends().keys())
def ops(request: pytest.FixtureRequest) -> Backend:
    return request.param()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def run(ops: Backend, emit: Callable[[], None]) -> None:
    ops.record(emit).run()


def assert_close(found: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found.astype(np.float64)).all(), "NaN leaked in, or an output is missing"
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error <= tolerance, error


def load(
    ops: Backend, rng: np.random.Generator, num_rows: int, num_cols: int
) -> tuple[object, Array]:
    """A float32 matrix as the backend wants it, and its values in float64."""
    x_NK = floats(rng, num_rows, num_cols) / np.float32(num_cols**0.5)
    return load_float32(ops, x_NK), x_NK.astype(np.float64)


def load_float32(ops: Backend, x_NK: Array) -> object:
    return load_packed(ops, pack_dense("tiles", x_NK), "float32", x_NK.shape)


def load_packed(
    ops: Backend, arrays: dict[str, Array], name: str, shape: tuple[int, ...]
) -> object:
    num_rows, num_cols = shape
    out_NK = poisoned(num_rows, num_cols) if isinstance(ops, ReferenceOps) else None
    return ops.load_matrix(arrays, name, (num_rows, num_cols), out_NK)


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


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33])
def test_embed(ops: Backend, rng: np.random.Generator, num_tokens: int) -> None:
    matrix, table_VD = load(ops, rng, 37, 20)
    ids_T = rng.integers(0, 37, num_tokens).astype(np.int32)
    x = Stream(poisoned(num_tokens, 20), poisoned(num_tokens, 20))
    run(ops, lambda: ops.embed(ids_T, Linear((matrix,)), x))
    assert not x.residual_TD.any()
    assert np.array_equal(x.partial_TD, table_VD[ids_T])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim"),
    [(1, 2, 1, 6), (15, 4, 4, 36), (16, 6, 2, 8), (17, 3, 1, 6), (33, 2, 2, 36)],
)
def test_qkv(
    ops: Backend,
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
    parts = [load(ops, rng, size, hidden) for size in (q_size, kv_size, kv_size)]
    weight_NK = np.concatenate([values for _, values in parts])
    bias_N = floats(rng, q_size + 2 * kv_size)
    linear = Linear(tuple(matrix for matrix, _ in parts), bias_N)
    first = num_tokens // 3
    sequences = [Sequence(n, n + 5) for n in (first, num_tokens - first) if n]
    step = paged(rng, sequences, num_kv_heads, head_dim, dtype)
    keys_NPKE, values_NPKE = contents(step.cache)
    angles = rng.uniform(0, 6, (40, head_dim // 2))
    rope = RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    q_TQ = poisoned(num_tokens, q_size)
    run(ops, lambda: ops.qkv(x, norm, linear, rope, step.batch, step.cache, q_TQ))

    assert np.array_equal(x.residual_TD, sum_TD.astype(np.float32))
    expected_TQ = np.empty((num_tokens, q_size))
    for t in range(num_tokens):
        y_N = weight_NK @ naive_norm(sum_TD[t], norm) + bias_N
        position, at = int(step.batch.positions_T[t]), step.new_slots()[t]
        for h in range(num_heads + num_kv_heads):
            rotated = naive_rotate(y_N[h * head_dim : (h + 1) * head_dim], position, rope)
            if h < num_heads:
                expected_TQ[t, h * head_dim : (h + 1) * head_dim] = rotated
            else:
                keys_NPKE[at][h - num_heads] = rotated
        values_NPKE[at] = y_N[q_size + kv_size :].reshape(num_kv_heads, head_dim)
    assert_close(q_TQ, expected_TQ)
    rounding = {"float32": TOLERANCE, "float16": 5e-4, "bfloat16": 4e-3, "int8": 8e-3}[dtype]
    for found, expected in zip(contents(step.cache), (keys_NPKE, values_NPKE), strict=True):
        is_set = ~np.isnan(expected)
        assert np.array_equal(~np.isnan(found), is_set), "wrong slots"
        assert_close(found[is_set], expected[is_set], rounding)


def test_an_int8_cache_holds_the_rounded_numbers_and_scales_to_the_bit(
    ops: Backend, rng: np.random.Generator
) -> None:
    """Weights of zero, so that k and v are the bias: rotated by nothing, and exact."""
    num_kv_heads, head_dim, hidden = 3, 10, 12
    kv_size = num_kv_heads * head_dim
    keys_KE, values_KE = floats(rng, 2, num_kv_heads, head_dim) * np.float32(7)
    keys_KE[1] = 0.0
    values_KE[2, :5] = [127.0, -127.0, 0.5, 1.5, -2.5]  # ties go to even numbers
    values_KE[2, 5:] = 0.25
    bias_N = np.concatenate([np.zeros(head_dim), keys_KE.ravel(), values_KE.ravel()])
    sizes = (head_dim, kv_size, kv_size)
    matrices = tuple(load_float32(ops, np.zeros((n, hidden), np.float32)) for n in sizes)
    x, _ = stream(rng, 2, hidden)
    step = paged(rng, [Sequence(2, 17)], num_kv_heads, head_dim, "int8")
    rope = RopeTable(np.ones((17, 5), np.float32), np.zeros((17, 5), np.float32))
    expected = LayerCache(*(array.copy() for array in cache_arrays(step.cache)))
    for at in step.new_slots():
        store(expected, at, keys_KE, values_KE)
    q_TQ = poisoned(2, head_dim)
    norm, linear = Norm(floats(rng, hidden), 1e-5), Linear(matrices, bias_N.astype(np.float32))
    run(ops, lambda: ops.qkv(x, norm, linear, rope, step.batch, step.cache, q_TQ))
    for found, right in zip(cache_arrays(step.cache), cache_arrays(expected), strict=True):
        assert np.array_equal(found, right, equal_nan=True)
    assert expected.key_scales_NKP is not None and 0.0 in expected.key_scales_NKP


@pytest.mark.parametrize(("size", "dtype"), [(1e6, "float16"), (1e-36, "int8"), (0, "int8")])
def test_qkv_of_extreme_sizes(
    ops: Backend, rng: np.random.Generator, size: float, dtype: str
) -> None:
    """A float16 cache holds its largest number in place of infinity, an int8 one zeros."""
    head_dim, step = 6, paged(rng, [Sequence(1, 1)], 1, 6, dtype)
    norm = Norm(np.ones(6, np.float32), 1e-5)
    eye = load_float32(ops, np.eye(6, dtype=np.float32) * np.float32(size))
    x = Stream(np.ones((1, 6), np.float32), np.zeros((1, 6), np.float32))
    rope = RopeTable(np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32))
    q_TQ = poisoned(1, head_dim)
    linear = Linear((eye, eye, eye))
    run(ops, lambda: ops.qkv(x, norm, linear, rope, step.batch, step.cache, q_TQ))
    at = step.new_slots()[0]
    expected = 65504.0 if dtype == "float16" else 0.0
    for found in contents(step.cache):
        assert np.array_equal(found[at], np.full((1, 6), expected)), found[at]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
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
    ops: Backend, rng: np.random.Generator, sequences: list[Sequence], head_dim: int, dtype: str
) -> None:
    num_heads, num_kv_heads, hidden = 6, 2, 20
    step = paged(rng, sequences, num_kv_heads, head_dim, dtype)
    batch, cache = step.batch, step.cache
    num_tokens = batch.num_tokens
    # What qkv would have stored for the step's own tokens; the rest of their blocks stays NaN.
    for at in step.new_slots():
        keys_KE, values_KE = floats(rng, 2, num_kv_heads, head_dim)
        store(cache, at, keys_KE, values_KE)
    keys_NPKE, values_NPKE = contents(cache)
    q_TQ = floats(rng, num_tokens, num_heads * head_dim) * np.float32(1.5)
    matrix, weight_NK = load(ops, rng, hidden, num_heads * head_dim)
    bias_N = floats(rng, hidden)
    x = Stream(floats(rng, num_tokens, hidden), poisoned(num_tokens, hidden))
    residual_TD = x.residual_TD.copy()
    run(ops, lambda: ops.attention(q_TQ, batch, cache, Linear((matrix,), bias_N), x))

    is_rounded = dtype == "bfloat16" and multiplies_bfloat16(ops)
    expected_TD = np.empty((num_tokens, hidden))
    for s in range(batch.num_seqs):
        for t in range(batch.query_start_S1[s], batch.query_start_S1[s + 1]):
            heads = []
            context = [step.slot(s, p) for p in range(batch.positions_T[t] + 1)]
            for h in range(num_heads):
                kv = h // (num_heads // num_kv_heads)
                q_E = q_TQ[t, h * head_dim : (h + 1) * head_dim].astype(np.float64)
                keys = np.array([keys_NPKE[p][kv] for p in context])
                values = np.array([values_NPKE[p][kv] for p in context])
                if is_rounded:
                    q_E = to_bfloat16(q_E.astype(np.float32))
                scores = keys @ q_E / head_dim**0.5
                weights = rounded_softmax(scores) if is_rounded else np.exp(scores)
                heads.append(weights @ values / weights.sum())
            expected_TD[t] = weight_NK @ np.concatenate(heads) + bias_N
    # A weight next to a rounding boundary may fall to either side.
    assert_close(x.partial_TD, expected_TD, 1e-4 if is_rounded else TOLERANCE)
    assert np.array_equal(x.residual_TD, residual_TD)


def rounded_softmax(scores: Array) -> Array:
    """Weights as the cpu device multiplies them by a bfloat16 cache: each rounded to bfloat16 as a
    multiple of the largest in its stretch of 128 positions."""
    weights = np.empty(len(scores))
    for start in range(0, len(scores), 128):
        part = scores[start : start + 128]
        rounded = to_bfloat16(np.exp(part - part.max()).astype(np.float32))
        weights[start : start + 128] = rounded * np.exp(part.max())
    return weights


def test_attention_survives_scores_beyond_exp(ops: Backend, rng: np.random.Generator) -> None:
    """Softmax must subtract the largest score, also when a later chunk holds it."""
    step = paged(rng, [Sequence(1, 300)], 1, 6)
    cache, batch = step.cache, step.batch
    ones_KE = np.ones((1, 6), np.float32)
    store(cache, step.new_slots()[0], ones_KE, ones_KE)
    values_KE = contents(cache)[1][step.slot(0, 290)].astype(np.float32)
    store(cache, step.slot(0, 290), 400 * ones_KE, values_KE)
    q_TQ = np.full((1, 6), 100.0, np.float32)
    matrix = load_float32(ops, np.eye(6, dtype=np.float32))
    x = Stream(poisoned(1, 6), poisoned(1, 6))
    run(ops, lambda: ops.attention(q_TQ, batch, cache, Linear((matrix,)), x))
    assert np.array_equal(x.partial_TD[0], values_KE[0])


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33])
def test_gate_up(ops: Backend, rng: np.random.Generator, num_tokens: int) -> None:
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
def test_down(ops: Backend, rng: np.random.Generator, num_tokens: int) -> None:
    act_TF, bias_N = floats(rng, num_tokens, 43), floats(rng, 28)
    matrix, weight_NK = load(ops, rng, 28, 43)
    x = Stream(floats(rng, num_tokens, 28), poisoned(num_tokens, 28))
    residual_TD = x.residual_TD.copy()
    run(ops, lambda: ops.down(act_TF, Linear((matrix,), bias_N), x))
    assert_close(x.partial_TD, act_TF.astype(np.float64) @ weight_NK.T + bias_N)
    assert np.array_equal(x.residual_TD, residual_TD)


@pytest.mark.parametrize("rows", [[0], [16], [0, 3, 4, 15, 16], list(range(17))])
def test_head(ops: Backend, rng: np.random.Generator, rows: list[int]) -> None:
    x, sum_TD = stream(rng, 17, 28)
    norm = Norm(floats(rng, 28), 1e-6)
    matrix, weight_NK = load(ops, rng, 51, 28)
    before = Stream(x.residual_TD.copy(), x.partial_TD.copy())
    rows_L, logits_LV = np.array(rows, np.int32), poisoned(len(rows), 51)
    run(ops, lambda: ops.head(x, rows_L, norm, Linear((matrix,)), logits_LV))
    assert_close(logits_LV, np.array([weight_NK @ naive_norm(sum_TD[r], norm) for r in rows]))
    assert np.array_equal(x.residual_TD, before.residual_TD), "head must leave the stream alone"
    assert np.array_equal(x.partial_TD, before.partial_TD), "head must leave the stream alone"


def test_copy_blocks_reads_everything_before_it_writes(
    ops: Backend, rng: np.random.Generator
) -> None:
    kv_cache = rng.integers(-128, 128, (3, 2, 6, 2, BLOCK, 4)).astype(np.int8)
    arrays = (kv_cache, floats(rng, 3, 2, 6, 2, BLOCK))
    before = [array.copy() for array in arrays]
    ops.copy_blocks(arrays, np.array([[1, 2], [2, 3], [4, 1]], np.int32))
    for array, old in zip(arrays, before, strict=True):
        for destination, source in ((2, 1), (3, 2), (1, 4), (4, 4), (5, 5), (0, 0)):
            assert np.array_equal(array[:, :, destination], old[:, :, source])


@pytest.mark.parametrize("num_cols", [33, 64])
@pytest.mark.parametrize(
    "name",
    [
        *("float32", "float16", "bfloat16"),
        *("int8", "int8-g16", "int8-g48", "int8-g32-min", "int8-g16-f32"),
        *("int4", "int4-g16", "int4-g32", "int4-g32-min", "int4-g32-min-f32", "int4-g128"),
        *("int4-min", "int8-min", "int4-g64-f32", "int4-g128-min-f32", "int8-g64-min-f32"),
    ],
)
def test_loaded_formats_multiply_as_their_values(
    ops: Backend, rng: np.random.Generator, name: str, num_cols: int
) -> None:
    fmt, values_NK = Format.parse(name), floats(rng, 21, num_cols)
    if fmt.is_dense:
        values_NK = values_NK.astype(DTYPES[name])
        arrays, exact_NK = pack_dense("tiles", values_NK), values_NK.astype(np.float64)
    else:
        tensor = quantised(values_NK, fmt)
        arrays, exact_NK = pack_quantised("tiles", tensor), naive_dequantize(tensor)
    specs = array_specs("tiles", fmt, 21, num_cols)
    assert {key: (a.dtype, a.shape) for key, a in arrays.items()} == specs
    matrix = load_packed(ops, arrays, name, (21, num_cols))
    act_TF = floats(rng, 17, num_cols)
    x = Stream(np.zeros((17, 21), np.float32), poisoned(17, 21))
    run(ops, lambda: ops.down(act_TF, Linear((matrix,)), x))
    assert_close(x.partial_TD, as_multiplied(act_TF, fmt, ops) @ exact_NK.T)
    ids_T = np.array([20, 0, 15, 16], np.int32)
    x = Stream(poisoned(4, num_cols), poisoned(4, num_cols))
    run(ops, lambda: ops.embed(ids_T, Linear((matrix,)), x))
    assert_close(x.partial_TD, exact_NK[ids_T], 1e-7)


def quantised(x_NK: Array, fmt: Format) -> QuantTensor:
    """Rounded to the format; with a minimum, which puna never makes itself, some integers."""
    if not fmt.has_min:
        return quantize(x_NK, fmt)
    q_NK = (np.abs(x_NK) * 1000).astype(np.int64) % (fmt.q_range[1] + 1)
    scale_NG = np.abs(x_NK[:, : fmt.num_groups(x_NK.shape[1])]).astype(DTYPES[fmt.scale_dtype])
    return QuantTensor(fmt, q_NK.astype(np.uint8), scale_NG, -scale_NG * scale_NG)


def naive_dequantize(tensor: QuantTensor) -> Array:
    fmt, out = tensor.format, np.empty(tensor.q_NK.shape)
    for n, k in np.ndindex(*out.shape):
        group = k // fmt.group_size if fmt.group_size else 0
        out[n, k] = float(tensor.q_NK[n, k]) * float(tensor.scale_NG[n, group])
        if tensor.min_NG is not None:
            out[n, k] += float(tensor.min_NG[n, group])
    return out


def test_a_program_reads_its_arrays_when_it_runs(ops: Backend, rng: np.random.Generator) -> None:
    matrix, weight_NK = load(ops, rng, 8, 12)
    act_TF = poisoned(2, 12)
    x = Stream(poisoned(2, 8), poisoned(2, 8))
    program = ops.record(lambda: ops.down(act_TF, Linear((matrix,)), x))
    assert np.isnan(x.partial_TD).all(), "recording must compute nothing"
    for _ in range(2):
        act_TF[:] = floats(rng, 2, 12)
        program.run()
        assert_close(x.partial_TD, act_TF.astype(np.float64) @ weight_NK.T)


def test_a_row_does_not_depend_on_its_company(ops: Backend, rng: np.random.Generator) -> None:
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
