"""ReferenceOps: every operation in plain NumPy float32. The specification, and the oracle of all
kernels.

Slow and exactly right. The contract that a row's result depends on nothing but the row is kept by
one device: every matrix product has the same shape whatever the step. Rows are taken in tiles of
TILE, padded with zeros, and attention reads its context in chunks of CONTEXT; BLAS then sums in the
same order each time. (One product of all rows would not do: BLAS picks its kernel by the number of
rows.)

Shape suffixes as in `puna.ops`; R = TILE rows, C = CONTEXT positions, J = query heads of one KV
head.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import numpy as np

from puna.batch import ForwardBatch
from puna.layout import TILE as WEIGHT_TILE
from puna.layout import LayoutName, axis_rows, to_dense
from puna.ops import LayerCache, Linear, Norm, Program, Reduce, RopeTable, Stream
from puna.ops.kv_blocks import copy_blocks
from puna.quant import Array, Format, to_float32

# 16 rows: a decode step costs 1.3 times what it does with 4, a prefill has a quarter of the passes
# over the weights (OpenBLAS 0.3.31, 2 cores of a Xeon with AVX-512, 2026-11; benchmarks/NOTES.md).
TILE = 16
CONTEXT = 256
FLOAT16_MAX = np.float32(65504)
TINY = np.float32(1e-30)  # the inverse of a smaller number's scale would overflow


class ReferenceProgram:
    """A list of calls, and how many threads BLAS may use for them (None: as many as it likes)."""

    def __init__(self, calls: tuple[Callable[[], None], ...], threads: int | None) -> None:
        self._calls = calls
        self._threads = threads

    def run(self) -> None:
        if self._threads is None:
            self._run()
            return
        from threadpoolctl import threadpool_limits

        with threadpool_limits(self._threads, user_api="blas"):
            self._run()

    def _run(self) -> None:
        for call in self._calls:
            call()


class ReferenceOps:
    """NumPy operations; weights are float32 matrices [N, K], unpacked when loaded.

    `reduce` sums over tensor-parallel ranks (None: there is one); `layout` is how the engine's
    matrices are stored.
    """

    def __init__(
        self,
        threads: int | None = None,
        reduce: Reduce | None = None,
        layout: LayoutName = "tiles",
    ) -> None:
        self._threads = threads
        self._reduce = reduce
        self._layout: LayoutName = layout
        self.threads = threads or os.cpu_count() or 1
        self._calls: list[Callable[[], None]] | None = None

    def load_matrix(
        self,
        arrays: dict[str, Array],
        format_name: str,
        shape: tuple[int, int],
        out_NK: Array | None,
    ) -> Array:
        assert out_NK is not None and out_NK.shape == shape
        num_rows, num_cols = shape
        fmt = Format.parse(format_name)
        step = max(1, 2**20 // num_cols // WEIGHT_TILE) * WEIGHT_TILE
        unit = axis_rows(self._layout)
        for first in range(0, num_rows, step):
            stored = slice(first // unit, (first + step) // unit)
            part = {suffix: array[stored] for suffix, array in arrays.items()}
            out_RK = out_NK[first : first + step]
            out_RK[:] = to_dense(self._layout, part, fmt, len(out_RK), num_cols)
        return out_NK

    def record(self, emit: Callable[[], None]) -> Program:
        assert self._calls is None, "already recording"
        self._calls = []
        try:
            emit()
            return ReferenceProgram(tuple(self._calls), self._threads)
        finally:
            self._calls = None

    def _append(self, call: Callable[[], None]) -> None:
        assert self._calls is not None, "operations are called inside record() only"
        self._calls.append(call)

    def _append_reduce(self, x: Stream) -> None:
        if self._reduce is not None:
            self._append(self._reduce(x.partial_TD))

    def embed(self, token_ids_T: Array, table: Linear, x: Stream) -> None:
        self._append(partial(_embed, token_ids_T, table, x))

    def qkv(
        self,
        x: Stream,
        norm: Norm,
        linear: Linear,
        rope: RopeTable,
        batch: ForwardBatch,
        cache: LayerCache,
        q_TQ: Array,
    ) -> None:
        self._append_reduce(x)
        self._append(partial(_qkv, x, norm, linear, rope, batch, cache, q_TQ))

    def attention(
        self, q_TQ: Array, batch: ForwardBatch, cache: LayerCache, out: Linear, x: Stream
    ) -> None:
        self._append(partial(_attention, q_TQ, batch, cache, out, x))

    def gate_up(self, x: Stream, norm: Norm, linear: Linear, act_TF: Array) -> None:
        self._append_reduce(x)
        self._append(partial(_gate_up, x, norm, linear, act_TF))

    def down(self, act_TF: Array, linear: Linear, x: Stream) -> None:
        self._append(partial(_down, act_TF, linear, x))

    def head(self, x: Stream, rows_L: Array, norm: Norm, linear: Linear, logits_LV: Array) -> None:
        self._append_reduce(x)
        self._append(partial(_head, x, rows_L, norm, linear, logits_LV))

    def copy_blocks(self, kv_arrays: tuple[Array, ...], copies_C2: Array) -> None:
        copy_blocks(kv_arrays, copies_C2)


def _embed(token_ids_T: Array, table: Linear, x: Stream) -> None:
    (weight_VD,) = table.weights
    x.residual_TD[:] = 0.0
    is_here_T = (token_ids_T >= 0) & (token_ids_T < len(weight_VD))
    x.partial_TD[:] = 0.0
    x.partial_TD[is_here_T] = weight_VD[token_ids_T[is_here_T]]


def _qkv(
    x: Stream,
    norm: Norm,
    linear: Linear,
    rope: RopeTable,
    batch: ForwardBatch,
    cache: LayerCache,
    q_TQ: Array,
) -> None:
    _, num_kv_heads, block_size, head_dim = cache.values_NKPE.shape
    kv_size = num_kv_heads * head_dim
    qkv_TX = _project(_reduce_norm(x, norm), linear)
    num_tokens = len(qkv_TX)
    q_THE = qkv_TX[:, : -2 * kv_size].reshape(num_tokens, -1, head_dim)
    k_TKE = qkv_TX[:, -2 * kv_size : -kv_size].reshape(num_tokens, num_kv_heads, head_dim)
    v_TKE = qkv_TX[:, -kv_size:].reshape(num_tokens, num_kv_heads, head_dim)
    cos_T1E = rope.cos_PE[batch.positions_T][:, None, :]
    sin_T1E = rope.sin_PE[batch.positions_T][:, None, :]
    q_TQ[:] = _rotate(q_THE, cos_T1E, sin_T1E).reshape(num_tokens, -1)
    block_T, offset_T = batch.slots_T // block_size, batch.slots_T % block_size
    k_TKE = _rotate(k_TKE, cos_T1E, sin_T1E)
    if cache.key_scales_NKP is not None and cache.value_scales_NKP is not None:
        k_TKE, cache.key_scales_NKP[block_T, :, offset_T] = _quantise_kv(k_TKE)
        v_TKE, cache.value_scales_NKP[block_T, :, offset_T] = _quantise_kv(v_TKE)
    dtype = cache.values_NKPE.dtype
    if dtype == np.float16:
        k_TKE, v_TKE = (np.clip(x, -FLOAT16_MAX, FLOAT16_MAX) for x in (k_TKE, v_TKE))
    cache.keys_NKEP[block_T, :, :, offset_T] = k_TKE.astype(dtype)
    cache.values_NKPE[block_T, :, offset_T] = v_TKE.astype(dtype)


def _quantise_kv(x_TKE: Array) -> tuple[Array, Array]:
    """int8 [T, K, E] and float32 scales [T, K]."""
    largest_TK1 = np.abs(x_TKE).max(axis=2, keepdims=True)
    limit = np.float32(127)
    inverse_TK1 = np.zeros_like(largest_TK1)
    np.divide(limit, largest_TK1, out=inverse_TK1, where=largest_TK1 > TINY)
    return np.rint(x_TKE * inverse_TK1).astype(np.int8), (largest_TK1 / limit)[:, :, 0]


def _attention(q_TQ: Array, batch: ForwardBatch, cache: LayerCache, out: Linear, x: Stream) -> None:
    attended_TQ = np.empty_like(q_TQ)
    for seq in range(batch.num_seqs):
        start, stop = batch.query_start_S1[seq], batch.query_start_S1[seq + 1]
        num_context = int(batch.seq_lens_S[seq])
        k_KCE, v_KCE = _read_context(batch.block_table_SM[seq], num_context, cache)
        for tile in range(start, stop, TILE):
            rows = slice(tile, min(tile + TILE, stop))
            first_position = num_context - int(stop - tile)
            attended_TQ[rows] = _attend(q_TQ[rows], k_KCE, v_KCE, first_position)
    x.partial_TD[:] = _project(attended_TQ, out)


def _gate_up(x: Stream, norm: Norm, linear: Linear, act_TF: Array) -> None:
    gate_TF, up_TF = np.split(_project(_reduce_norm(x, norm), linear), 2, axis=1)
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and 1 / inf is right.
        act_TF[:] = gate_TF / (1 + np.exp(-gate_TF)) * up_TF


def _down(act_TF: Array, linear: Linear, x: Stream) -> None:
    x.partial_TD[:] = _project(act_TF, linear)


def _head(x: Stream, rows_L: Array, norm: Norm, linear: Linear, logits_LV: Array) -> None:
    hidden_LD = x.residual_TD[rows_L] + x.partial_TD[rows_L]
    logits_LV[:] = _project(_normalise(hidden_LD, norm), linear)


def _reduce_norm(x: Stream, norm: Norm) -> Array:
    np.add(x.residual_TD, x.partial_TD, out=x.residual_TD)
    return _normalise(x.residual_TD, norm)


def _normalise(x_TD: Array, norm: Norm) -> Array:
    mean_T1 = np.mean(np.square(x_TD), axis=1, keepdims=True)
    return x_TD / np.sqrt(mean_T1 + np.float32(norm.eps)) * norm.weight_D


def _project(x_TK: Array, linear: Linear) -> Array:
    """float32 [T, N] = x W^T + b, in tiles of TILE rows."""
    num_tokens, num_cols = x_TK.shape
    padded_TK = np.zeros((-(-num_tokens // TILE) * TILE, num_cols), np.float32)
    padded_TK[:num_tokens] = x_TK
    sizes = [len(weight_NK) for weight_NK in linear.weights]
    out_TN = np.empty((len(padded_TK), sum(sizes)), np.float32)
    for tile in range(0, num_tokens, TILE):
        rows_RK, first = padded_TK[tile : tile + TILE], 0
        for weight_NK, size in zip(linear.weights, sizes, strict=True):
            # The same product as rows @ W.T, up to 1.8 times faster: the larger matrix comes first.
            out_TN[tile : tile + TILE, first : first + size] = (weight_NK @ rows_RK.T).T
            first += size
    if linear.bias_N is not None:
        out_TN += linear.bias_N
    return out_TN[:num_tokens]


def _rotate(x_THE: Array, cos_T1E: Array, sin_T1E: Array) -> Array:
    first, second = np.split(x_THE, 2, axis=2)
    rotated = (first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E)
    return np.concatenate(rotated, axis=2)


def _read_context(block_table_M: Array, num_context: int, cache: LayerCache) -> tuple[Array, Array]:
    """Keys and values [K, context rounded up to whole chunks, E] in float32, zeros at the end."""
    _, num_kv_heads, block_size, head_dim = cache.values_NKPE.shape
    blocks = block_table_M[: -(-num_context // block_size)]
    shape = (num_kv_heads, -(-num_context // CONTEXT) * CONTEXT, head_dim)

    def read(cache_NKPE: Array, scales_NKP: Array | None) -> Array:
        x_KNPE = cache_NKPE[blocks].transpose(1, 0, 2, 3)
        x_KCE = x_KNPE.reshape(num_kv_heads, -1, head_dim)[:, :num_context]
        out_KCE = np.zeros(shape, np.float32)
        out_KCE[:, :num_context] = to_float32(x_KCE)
        if scales_NKP is not None:
            scales_KNP = scales_NKP[blocks].transpose(1, 0, 2)
            scales_KC = scales_KNP.reshape(num_kv_heads, -1)[:, :num_context]
            out_KCE[:, :num_context] *= scales_KC[:, :, None]
        return out_KCE

    keys_NKPE = cache.keys_NKEP.transpose(0, 1, 3, 2)
    return read(keys_NKPE, cache.key_scales_NKP), read(cache.values_NKPE, cache.value_scales_NKP)


def _attend(q_RQ: Array, k_KCE: Array, v_KCE: Array, first_position: int) -> Array:
    """Rows of one sequence, at positions first_position on, against its context; returns [R, Q].

    Softmax is accumulated chunk by chunk (online softmax, arXiv:1805.02867). A chunk that lies
    wholly in a row's future changes nothing in that row, to the bit.
    """
    num_kv_heads, num_context, head_dim = k_KCE.shape
    num_rows = len(q_RQ)
    q_RKJE = q_RQ.reshape(num_rows, num_kv_heads, -1, head_dim)
    num_shared = q_RKJE.shape[2]
    tile_KRJE = np.zeros((num_kv_heads, TILE, num_shared, head_dim), np.float32)
    tile_KRJE[:, :num_rows] = q_RKJE.transpose(1, 0, 2, 3)
    tile_KRJE *= np.float32(head_dim**-0.5)
    # J heads share the keys of their KV head: rows of one product.
    q_KXE = tile_KRJE.reshape(num_kv_heads, TILE * num_shared, head_dim)
    position_X1 = np.repeat(first_position + np.arange(TILE), num_shared)[:, None]

    acc_KXE = np.zeros_like(q_KXE)
    total_KX1 = np.zeros((num_kv_heads, TILE * num_shared, 1), np.float32)
    largest_KX1 = np.full_like(total_KX1, -np.inf)
    for start in range(0, min(num_context, first_position + num_rows), CONTEXT):
        chunk = slice(start, start + CONTEXT)
        is_future_XC = np.arange(start, start + CONTEXT) > position_X1
        scores_KXC = q_KXE @ k_KCE[:, chunk].transpose(0, 2, 1)
        scores_KXC[:, is_future_XC] = -np.inf
        new_KX1 = np.maximum(largest_KX1, scores_KXC.max(axis=2, keepdims=True))
        weight_KXC = np.exp(scores_KXC - new_KX1)
        shrink_KX1 = np.exp(largest_KX1 - new_KX1)
        total_KX1 = total_KX1 * shrink_KX1 + weight_KXC.sum(axis=2, keepdims=True)
        acc_KXE = acc_KXE * shrink_KX1 + weight_KXC @ v_KCE[:, chunk]
        largest_KX1 = new_KX1
    attended_KRJE = (acc_KXE / total_KX1).reshape(num_kv_heads, TILE, num_shared, head_dim)
    return attended_KRJE[:, :num_rows].transpose(1, 0, 2, 3).reshape(num_rows, -1)
