"""CudaOps: every operation as launches on the current CUDA stream, recorded as a CUDA graph.

This file decides which kernels an operation is; how its product is computed, and where that leaves
it, `puna.cuda.products`; when launches may overlap, `puna.cuda.launches`. It knows nothing of how a
kernel computes. The residual is float32; what feeds a product has the engine's dtype.

Shape suffixes as in `puna.ops`; X = rows of several matrices together, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from puna.batch import ForwardBatch
from puna.cuda.choices import Choices
from puna.cuda.interfaces import (
    FusedOps,
    Kernels,
    Matrix,
    Recorder,
    SwigluProduct,
    Tensor,
    joined,
)
from puna.cuda.kernel_table import ROPE_HEADS
from puna.cuda.launches import Launches
from puna.cuda.products import Products
from puna.cuda_memory import ARGMAX_CHUNK, padded_rows
from puna.engine import EngineConfig
from puna.ops import LayerCache, Linear, Norm, Program, RopeTable, Stream
from puna.quant import Format


@dataclass(frozen=True, slots=True)
class _Projected:
    """The product of q, k and v, until the attention of a decode batch takes it: which kernel reads
    it, and what that is given first."""

    way: str
    given: tuple[Tensor, ...]


class CudaOps:
    """Operations of one rank. `arrays` are those of `memory.workspace_specs(config, rank, "cuda")`
    as torch tensors on the GPU; ForwardBatch, caches and weights hold torch tensors as well.

    `deterministic`: a row's result depends on nothing but the row (products and attention in one
    fixed order, whatever the batch). `fused` are kernels for a few tokens, where the target has
    some: each for up to so many tokens and for more than the one before it; `swiglu` one of its
    products for many.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        kernels: Kernels,
        arrays: dict[str, Tensor],
        recorder: Recorder,
        choices: Choices,
        *,
        deterministic: bool = False,
        fused: tuple[tuple[int, FusedOps], ...] = (),
        swiglu: SwigluProduct | None = None,
    ) -> None:
        assert config.world_size == 1 and rank == 0, "several ranks are not for this backend yet"
        # They read the residual alone: nothing may be left beside it.
        for most, ops in fused:
            assert most <= choices.direct_tokens or "out" in ops.operations, choices
        self._kernels = kernels
        self._arrays = arrays
        self._launches = Launches(
            kernels, recorder, choices, tuple(ops for _, ops in fused), arrays["zeros_N"]
        )
        self._choices = choices
        self._is_deterministic = deterministic
        self._products = Products(
            kernels,
            arrays,
            self._launches,
            choices,
            deterministic=deterministic,
            fused=fused,
            swiglu=swiglu,
        )
        # Of what is being recorded.
        self._fused_head: FusedOps | None = None
        self._projected: _Projected | None = None

    def load_matrix(
        self,
        arrays: dict[str, Tensor],
        format_name: str,
        shape: tuple[int, int],
        out_NK: Tensor | None,
    ) -> Matrix:
        assert out_NK is None and Format.parse(format_name).is_dense, format_name
        data_NK, (num_rows, num_cols) = arrays["data"], shape
        assert data_NK.is_contiguous() and len(data_NK) == padded_rows(num_rows), data_NK.shape
        return Matrix(data_NK, num_rows, num_cols)

    def record(self, emit: Callable[[], None]) -> Program:
        self._projected = None
        return self._launches.record(emit)

    def embed(self, token_ids_T: Tensor, table: Linear, x: Stream) -> None:
        (matrix,) = table.weights
        beside, array = self._products.beside(x)
        last_tokens_R = self._arrays["last_tokens_R"]
        self._launches.launch(
            f"embed{beside}",
            (len(token_ids_T), 1, 1),
            (
                token_ids_T,
                last_tokens_R,
                matrix.data_NK,
                x.residual_TD,
                array,
            ),
        )

    def qkv(
        self,
        x: Stream,
        norm: Norm,
        linear: Linear,
        rope: RopeTable,
        batch: ForwardBatch,
        cache: LayerCache,
        q_TQ: Tensor,
    ) -> None:
        weight_XK = joined(linear)
        fused = self._fused_for("qkv", x)
        if fused and (batch.is_decode or "out" in fused.operations):
            self._launches.fused(
                partial(fused.qkv, x, norm, weight_XK, linear.bias_N, rope, batch, cache, q_TQ)
            )
            return
        assert self._projected is None, "attention follows its projection"
        num_tokens, q_size = q_TQ.shape
        normed_TD, qkv_TX = self._scratch("normed_TD", x), self._scratch("qkv_TX", x)
        self._norm(x, norm, normed_TD)
        way, qkv_TX = self._products.project(x, normed_TD, weight_XK, qkv_TX)
        given = qkv_TX, self._bias(linear), rope.cos_PE, rope.sin_PE
        given += batch.positions_T, batch.slots_T
        if self._is_portable_decode(batch):
            self._projected = _Projected(way, given)
            return
        _, num_kv_heads, _, head_dim = cache.values_NKPE.shape
        num_heads = q_size // head_dim + 2 * num_kv_heads
        arrays = q_TQ, cache.keys_NKEP, cache.values_NKPE
        grid = num_tokens, -(-num_heads // ROPE_HEADS), 1
        self._launches.launch(f"rope_append{way}", grid, (*given, *arrays))

    def attention(
        self, q_TQ: Tensor, batch: ForwardBatch, cache: LayerCache, out: Linear, x: Stream
    ) -> None:
        """Of a decode batch it may take what `qkv` left: those two are recorded together."""
        (matrix,) = out.weights
        if batch.is_decode and (fused := self._fused_for("attention", x)):
            weight = matrix.data_NK, out.bias_N
            self._launches.fused(partial(fused.attention, q_TQ, batch, cache, *weight, x))
            return
        attended_TQ = self._scratch("attended_TQ", x)
        if self._is_portable_decode(batch):
            self._attend_decode(batch, cache, attended_TQ)
        else:
            self._attend_prefill(q_TQ, batch, cache, attended_TQ)
        if fused := self._fused_for("out", x):
            weight = matrix.data_NK, out.bias_N
            self._launches.fused(partial(fused.out, attended_TQ, *weight, x))
            return
        self._products.into_stream("o", attended_TQ, out, x)

    def _attend_decode(self, batch: ForwardBatch, cache: LayerCache, out_TQ: Tensor) -> None:
        projected, self._projected = self._projected, None
        assert projected is not None, "attention follows its projection"
        _, num_kv_heads, _, head_dim = cache.values_NKPE.shape
        num_seqs, max_blocks = batch.block_table_SM.shape
        parts = self._arrays["attn_part_SBHE"], self._arrays["attn_scale_SBH2"]
        most = -(-max_blocks // self._kernels.constant("decode", "MIN_BLOCKS"))
        wanted = -(-self._choices.decode_programs // (num_seqs * num_kv_heads))
        shared_by = min(wanted, most, self._kernels.constant("decode", "PARTS"))
        self._launches.launch(
            f"decode{projected.way}",
            (num_seqs, num_kv_heads, shared_by),
            (
                *projected.given,
                cache.keys_NKEP,
                cache.values_NKPE,
                batch.block_table_SM,
                batch.seq_lens_S,
                *parts,
                out_TQ,
                max_blocks,
            ),
        )
        grid = (num_seqs, out_TQ.shape[1] // head_dim, 1)
        self._launches.launch("combine", grid, (batch.seq_lens_S, *parts, out_TQ))

    def _attend_prefill(
        self, q_TQ: Tensor, batch: ForwardBatch, cache: LayerCache, out_TQ: Tensor
    ) -> None:
        num_kv_heads = cache.values_NKPE.shape[1]
        num_seqs, max_blocks = batch.block_table_SM.shape
        num_tiles = len(q_TQ) // self._kernels.constant("prefill", "TOKENS")
        assert num_seqs <= self._kernels.constant("prefill", "SEQS"), num_seqs
        self._launches.launch(
            "prefill",
            # Enough for a few sequences; where there are more, programs take several tiles.
            (num_kv_heads, num_tiles + min(num_seqs, 8), 1),
            (
                q_TQ,
                cache.keys_NKEP,
                cache.values_NKPE,
                batch.block_table_SM,
                batch.query_start_S1,
                batch.seq_lens_S,
                out_TQ,
                num_seqs,
                max_blocks,
            ),
        )

    def gate_up(self, x: Stream, norm: Norm, linear: Linear, act_TF: Tensor) -> None:
        weight_XK = joined(linear)
        if fused := self._fused_for("gate_up", x):
            self._launches.fused(partial(fused.gate_up, x, norm, weight_XK, linear.bias_N, act_TF))
            return
        normed_TD = self._scratch("normed_TD", x)
        self._norm(x, norm, normed_TD)
        gate_up_TX = self._scratch("gate_up_TX", x)
        self._products.gate_up(x, normed_TD, weight_XK, linear.bias_N, gate_up_TX, act_TF)

    def down(self, act_TF: Tensor, linear: Linear, x: Stream) -> None:
        if fused := self._fused_for("down", x):
            (matrix,) = linear.weights
            self._launches.fused(partial(fused.down, act_TF, matrix.data_NK, linear.bias_N, x))
            return
        self._products.into_stream("down", act_TF, linear, x)

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, linear: Linear, logits_LV: Tensor
    ) -> None:
        (matrix,) = linear.weights
        fused = self._fused_for("head", x)
        if len(rows_L) > len(x.residual_TD):
            fused = None
        self._fused_head = fused
        if fused:
            self._launches.fused(partial(fused.head, x, rows_L, norm, matrix.data_NK, logits_LV))
            return
        normed_LD = self._arrays["normed_TD"][: len(rows_L)]
        beside, array = self._products.beside(x)
        self._launches.launch(
            f"norm{beside}_pick",
            (len(rows_L), 1, 1),
            (
                x.residual_TD,
                array,
                norm.weight_D,
                normed_LD,
                rows_L,
            ),
        )
        self._products.logits(normed_LD, matrix.data_NK, logits_LV)

    def sample_greedy(
        self, logits_LV: Tensor, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor
    ) -> None:
        """out_tokens[l] = last_tokens[rows[l]] = the largest of logits[l], the lowest id where
        several are; rows below 0 write no last token."""
        if self._fused_head:
            sample = self._fused_head.sample_greedy
            self._launches.fused(partial(sample, rows_L, last_tokens_R, out_tokens_L))
            return
        num_rows, vocab = logits_LV.shape
        largest = self._arrays["argmax_value_LC"], self._arrays["argmax_index_LC"]
        num_chunks = -(-vocab // ARGMAX_CHUNK)
        self._launches.launch("argmax_chunks", (num_rows, num_chunks, 1), (logits_LV, *largest))
        arguments = (*largest, rows_L, last_tokens_R, out_tokens_L)
        self._launches.launch("argmax_rows", (num_rows, 1, 1), arguments)

    def copy_blocks(self, kv_arrays: tuple[Tensor, ...], copies_C2: Any) -> None:
        """Copy KV blocks (source, destination) on the current stream, at once."""
        for array in kv_arrays:
            pairs_C2 = torch.as_tensor(copies_C2).to(array.device, torch.int64)
            array[:, :, pairs_C2[:, 1]] = array[:, :, pairs_C2[:, 0]]

    def _is_portable_decode(self, batch: ForwardBatch) -> bool:
        """Rotation, append and attention are one kernel, the same for all targets."""
        return batch.is_decode and not self._is_deterministic

    def _fused_for(self, operation: str, x: Stream) -> FusedOps | None:
        fused = self._products.fused(x)
        return fused if fused and operation in fused.operations else None

    def _scratch(self, name: str, x: Stream) -> Tensor:
        return self._arrays[name][: len(x.residual_TD)]

    def _bias(self, linear: Linear) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if linear.bias_N is None else linear.bias_N

    def _norm(self, x: Stream, norm: Norm, out_TD: Tensor) -> None:
        beside, array = self._products.beside(x)
        given = x.residual_TD, array, norm.weight_D, out_TD, self._arrays["last_tokens_R"]
        self._launches.launch(f"norm{beside}", (len(out_TD), 1, 1), given)
