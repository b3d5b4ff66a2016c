"""CudaOps: every operation as launches on the current CUDA stream, recorded as a CUDA graph.

This file decides which kernels an operation is, and which product goes to cuBLAS; how many
tokens decide between them is in `puna.cuda.choices`. It knows nothing of how a kernel computes.

The residual is float32; what feeds a product, and `partial`, have the engine's dtype. Beyond
`Choices.direct_tokens` tokens cuBLAS computes the products: it writes `partial`, and the consumer
adds it. Up to so many, and always where the engine runs deterministically, they are skinny ones,
which add into the residual or leave parts for the consumer to add; `partial` is not touched. Some
targets have products of their own for numbers on either side of that bound, which leave parts too
(`StreamKProducts`), and whole operations for the fewest tokens (`FusedOps`). Which it is depends on
the stream's number of tokens alone, so operations of one step may be recorded apart.

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
    StreamKProducts,
    SwigluProduct,
    Tensor,
    joined,
)
from puna.cuda.kernel_table import GEMM_TILES, ROPE_HEADS, ROW_BLOCK
from puna.cuda.launches import Launches
from puna.cuda_memory import ARGMAX_CHUNK, PART_ROWS, padded_rows
from puna.engine import EngineConfig
from puna.ops import LayerCache, Linear, Norm, Program, RopeTable, Stream
from puna.quant import Format


@dataclass(frozen=True, slots=True)
class _Projected:
    """The product of q, k and v, until the attention of a decode batch takes it: which kernel reads
    it, what that is given first, and how the product was cut."""

    way: str
    given: tuple[Tensor, ...]
    cut: tuple[int, int]


class CudaOps:
    """Operations of one rank. `arrays` are those of `memory.workspace_specs(config, rank, "cuda")`
    as torch tensors on the GPU; ForwardBatch, caches and weights hold torch tensors as well.

    `deterministic`: a row's result depends on nothing but the row (products and attention in one
    fixed order, whatever the batch). `fused` are kernels for a few tokens, where the target has
    some: each for up to so many tokens and for more than the one before it; `stream_k` its products
    for more, `swiglu` one of them for many.
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
        stream_k: StreamKProducts | None = None,
        swiglu: SwigluProduct | None = None,
    ) -> None:
        assert config.world_size == 1 and rank == 0, "several ranks are not for this backend yet"
        # They read the residual alone: nothing may be left beside it.
        assert all(most <= choices.direct_tokens for most, _ in fused), choices
        self._kernels = kernels
        self._arrays = arrays
        self._launches = Launches(
            kernels, recorder, tuple(ops for _, ops in fused), choices.overlaps
        )
        self._choices = choices
        self._is_deterministic = deterministic
        self._fused = fused
        self._stream_k = None if deterministic or not choices.stream_k else stream_k
        self._swiglu = None if deterministic or choices.swiglu_tokens is None else swiglu
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
        beside, array = self._beside(x)
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
                *self._cut("down", x),
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
        if batch.is_decode and (fused := self._fused_for("qkv", x)):
            self._launches.fused(
                partial(fused.qkv, x, norm, weight_XK, linear.bias_N, rope, batch, cache, q_TQ)
            )
            return
        assert self._projected is None, "attention follows its projection"
        num_tokens, q_size = q_TQ.shape
        normed_TD, qkv_TX = self._scratch("normed_TD", x), self._scratch("qkv_TX", x)
        self._norm(x, norm, normed_TD, "down")
        way = ""
        if stream_k := self._stream_k_for(x):
            way, qkv_TX = "_stream_k", stream_k.parts
            self._stream_k_product("qkv", normed_TD, weight_XK, None)
        elif not self._is_direct(x):
            self._launches.product(normed_TD, weight_XK, qkv_TX)
        elif self._leaves_parts("qkv", num_tokens):
            way, parts = "_parts", self._arrays["product_parts"]
            self._gemm("qkv", normed_TD, weight_XK, None, qkv_TX, parts)
            qkv_TX = parts
        else:
            self._gemm("qkv", normed_TD, weight_XK, None, qkv_TX)
        given = qkv_TX, self._bias(linear), rope.cos_PE, rope.sin_PE
        given += batch.positions_T, batch.slots_T
        if batch.is_decode and not self._is_deterministic:
            self._projected = _Projected(way, given, self._cut("qkv", x))
            return
        _, num_kv_heads, _, head_dim = cache.values_NKPE.shape
        num_heads = q_size // head_dim + 2 * num_kv_heads
        arrays = q_TQ, cache.keys_NKEP, cache.values_NKPE
        grid = num_tokens, -(-num_heads // ROPE_HEADS), 1
        cut = self._cut("qkv", x)
        self._launches.launch(f"rope_append{way}", grid, (*given, *arrays, *cut))

    def attention(
        self, q_TQ: Tensor, batch: ForwardBatch, cache: LayerCache, out: Linear, x: Stream
    ) -> None:
        """Of a decode batch, unless deterministic, it takes what `qkv` left: those two are recorded
        together."""
        (matrix,) = out.weights
        if batch.is_decode and (fused := self._fused_for("attention", x)):
            weight = matrix.data_NK, out.bias_N
            self._launches.fused(partial(fused.attention, q_TQ, batch, cache, *weight, x))
            return
        attended_TQ = self._scratch("attended_TQ", x)
        if batch.is_decode and not self._is_deterministic:
            self._attend_decode(batch, cache, attended_TQ)
        else:
            self._attend_prefill(q_TQ, batch, cache, attended_TQ)
        self._into_stream("o", attended_TQ, out, x)

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
                *projected.cut,
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
            (num_tiles + min(num_seqs, 8), num_kv_heads, 1),
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
        self._norm(x, norm, normed_TD, "o")
        num_tokens, ffn = act_TF.shape
        name, gate_up_TX = "silu_mul", self._scratch("gate_up_TX", x)
        if stream_k := self._stream_k_for(x):
            name, gate_up_TX = "silu_mul_stream_k", stream_k.parts
            self._stream_k_product("gate_up", normed_TD, weight_XK, None)
        elif self._is_direct(x):
            self._gemm("gate_up", normed_TD, weight_XK, linear.bias_N, act_TF)
            return
        elif self._swiglu and num_tokens >= (self._choices.swiglu_tokens or 0):
            call = partial(self._swiglu.gate_up, normed_TD, weight_XK, linear.bias_N, act_TF)
            self._launches.own(call)
            return
        else:
            self._launches.product(normed_TD, weight_XK, gate_up_TX)
        grid = (num_tokens, -(-ffn // ROW_BLOCK), 1)
        arguments = gate_up_TX, self._bias(linear), act_TF, *self._cut("gate_up", x)
        self._launches.launch(name, grid, arguments)

    def down(self, act_TF: Tensor, linear: Linear, x: Stream) -> None:
        if fused := self._fused_for("down", x):
            (matrix,) = linear.weights
            self._launches.fused(partial(fused.down, act_TF, matrix.data_NK, linear.bias_N, x))
            return
        self._into_stream("down", act_TF, linear, x)

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, linear: Linear, logits_LV: Tensor
    ) -> None:
        (matrix,) = linear.weights
        fused = self._fused_for("head", x) if len(rows_L) <= len(x.residual_TD) else None
        self._fused_head = fused
        if fused:
            self._launches.fused(partial(fused.head, x, rows_L, norm, matrix.data_NK, logits_LV))
            return
        normed_LD = self._arrays["normed_TD"][: len(rows_L)]
        beside, array = self._beside(x)
        self._launches.launch(
            f"norm{beside}_pick",
            (len(rows_L), 1, 1),
            (x.residual_TD, array, norm.weight_D, normed_LD, rows_L, *self._cut("down", x)),
        )
        if (stream_k := self._stream_k) and len(rows_L) <= stream_k.most_tokens:
            self._launches.own(partial(stream_k.logits, normed_LD, matrix.data_NK, logits_LV))
        else:
            self._gemm("head", normed_LD, matrix.data_NK, None, logits_LV)

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

    def _is_direct(self, x: Stream) -> bool:
        """Whether products of this stream's rows are skinny ones."""
        return self._is_deterministic or len(x.residual_TD) <= self._choices.direct_tokens

    def _leaves_parts(self, role: str, num_tokens: int) -> bool:
        """Of a skinny product."""
        return num_tokens <= PART_ROWS and self._kernels.constant(f"gemm_{role}_16", "SPLITS") > 1

    def _beside(self, x: Stream) -> tuple[str, Tensor]:
        """What of a stream is beside its residual, by the number of its rows: nothing, the parts of
        a product, or `partial`."""
        if stream_k := self._stream_k_for(x):
            return "_stream_k", stream_k.parts
        if not self._is_direct(x):
            return "_partial", x.partial_TD
        if self._few(x) is None and self._leaves_parts("o", len(x.residual_TD)):
            return "_parts", self._arrays["product_parts"]
        return "", x.partial_TD

    def _few(self, x: Stream) -> FusedOps | None:
        """The target's fused operations for a stream of so many rows."""
        if self._is_deterministic:
            return None
        num_tokens = len(x.residual_TD)
        return next((fused for most, fused in self._fused if num_tokens <= most), None)

    def _stream_k_for(self, x: Stream) -> StreamKProducts | None:
        """The target's products in parts for a stream of so many rows."""
        stream_k = self._stream_k
        if stream_k is None or self._few(x):
            return None
        return stream_k if len(x.residual_TD) <= stream_k.most_tokens else None

    def _cut(self, role: str, x: Stream) -> tuple[int, int]:
        """For who reads a role's product, where its parts are the target's own."""
        stream_k = self._stream_k_for(x)
        return stream_k.cut(role) if stream_k else (0, 0)

    def _stream_k_product(
        self, role: str, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None
    ) -> None:
        assert self._stream_k
        self._launches.own(partial(self._stream_k.product, role, x_MK, weight_NK, bias_N))

    def _fused_for(self, operation: str, x: Stream) -> FusedOps | None:
        fused = self._few(x)
        return fused if fused and operation in fused.operations else None

    def _scratch(self, name: str, x: Stream) -> Tensor:
        return self._arrays[name][: len(x.residual_TD)]

    def _bias(self, linear: Linear) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if linear.bias_N is None else linear.bias_N

    def _norm(self, x: Stream, norm: Norm, out_TD: Tensor, before: str) -> None:
        """`before`: the role of the product that was added last."""
        beside, array = self._beside(x)
        arguments = x.residual_TD, array, norm.weight_D, out_TD, self._arrays["last_tokens_R"]
        self._launches.launch(
            f"norm{beside}", (len(out_TD), 1, 1), (*arguments, *self._cut(before, x))
        )

    def _into_stream(self, role: str, in_TK: Tensor, linear: Linear, x: Stream) -> None:
        """Add a product to the stream: to its residual, or beside it."""
        (matrix,) = linear.weights
        if self._stream_k_for(x):
            self._stream_k_product(role, in_TK, matrix.data_NK, linear.bias_N)
            return
        beside, array = self._beside(x)
        if beside != "_partial":
            parts = array if beside == "_parts" else None
            self._gemm(role, in_TK, matrix.data_NK, linear.bias_N, x.residual_TD, parts)
            return
        self._launches.product(in_TK, matrix.data_NK, x.partial_TD)
        if linear.bias_N is not None:
            num_tokens, hidden = x.partial_TD.shape
            grid = (num_tokens, -(-hidden // ROW_BLOCK), 1)
            self._launches.launch("add_bias", grid, (x.partial_TD, linear.bias_N))

    def _gemm(
        self,
        role: str,
        x_MK: Tensor,
        w_NK: Tensor,
        bias_N: Tensor | None,
        y_MN: Tensor,
        parts: Tensor | None = None,
    ) -> None:
        """The skinny product of a role, in tiles of as many tokens as there are, or of the most:
        into y, or its parts for the consumer to add."""
        num_tokens = len(x_MK)
        tile = next((tile for tile in GEMM_TILES if num_tokens <= tile), GEMM_TILES[-1])
        name, num_splits = f"gemm_{role}_{tile}", 1
        splits = self._kernels.constant(name, "SPLITS")
        if parts is not None:
            num_splits = splits
        elif splits > 1:
            name, tile = f"gemm_{role}_whole", GEMM_TILES[-1]
        num_programs = -(-y_MN.shape[1] // self._kernels.constant(name, "BLOCK_N"))
        bias = self._arrays["rope_cos_PE"] if bias_N is None else bias_N
        grid = (-(-num_tokens // tile), num_programs, num_splits)
        out = y_MN if parts is None else parts
        self._launches.launch(name, grid, (x_MK, w_NK, bias, out, num_tokens))
