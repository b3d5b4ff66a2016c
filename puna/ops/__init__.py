"""Ops: the one seam between the model and what computes it.

The model (`puna.models`) is written once against this protocol. Each method appends one operation
to the program being recorded; nothing is computed until the program runs, and then the model is no
longer in the way: the reference replays a list of calls, other backends a list of kernels or a CUDA
graph.

A layer is four operations: `qkv`, `attention`, `gate_up`, `down`. What flows between them is a
`Stream`: the residual, and a partial sum that has not yet been added to it. The first thing that a
consumer does (qkv, gate_up, head) is residual += sum of partial over tensor-parallel ranks, so that
a backend can fuse the reduction with the norm that follows.

Contract of every operation: the order of summation for a row depends on neither the batch, nor the
position in it, nor the thread count; attention splits its context at fixed lengths. A token's
result is then the same to the bit in any company.

Shape suffixes: T tokens in the step, S sequences, L rows wanted as logits, D hidden, H query heads
on this rank, K KV heads on this rank, E head_dim, Q = H * E, F ffn on this rank, V vocab on this
rank, N KV blocks, P block size, M blocks a sequence (most).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from puna.batch import ForwardBatch
from puna.quant import Array


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden state between operations: residual_TD, and partial_TD still to be added. float32."""

    residual_TD: Array
    partial_TD: Array


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: float32 weight_D and epsilon."""

    weight_D: Array
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b. `weights` are W's rows in order: one matrix, or q, k, v, or gate and up.

    Each is whatever the backend made of a stored matrix when it was loaded, formats may differ; the
    model only passes them on. The bias is one vector for all.
    """

    weights: tuple[Any, ...]
    bias_N: Array | None = None


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos_PE and sin_PE, float32 [max_seq_len, E / 2]: row p for position p, half-split pairs."""

    cos_PE: Array
    sin_PE: Array


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged keys and values; slot s is token s % P of block s // P.

    Inside a block the keys of a KV head are transposed, so that its tokens lie side by side. An
    int8 cache has float32 scales beside it, of each token and KV head: x = q * scale.
    """

    keys_NKEP: Array
    values_NKPE: Array
    key_scales_NKP: Array | None = None
    value_scales_NKP: Array | None = None


# Where there are several tensor-parallel ranks: given a stream's partial, the call that replaces it
# with its sum over the ranks. A consumer records that call before anything else.
Reduce = Callable[[Array], Callable[[], None]]


class Program(Protocol):
    """Recorded operations over fixed arrays."""

    def run(self) -> None:
        """Execute every operation, reading the arrays' contents as they are now."""
        ...


class Ops(Protocol):
    """One backend. Operations may only be called inside `record`; they write to the arrays
    given."""

    def load_matrix(
        self,
        arrays: dict[str, Array],
        format_name: str,
        shape: tuple[int, int],
        out_NK: Array | None,
    ) -> Any:
        """Make a stored matrix of `shape` (N, K) usable. `arrays` are as in the engine; `out_NK` is
        its workspace, for a backend whose memory plan has one (`unpacked.*`)."""
        ...

    def record(self, emit: Callable[[], None]) -> Program:
        """Run `emit`, which calls operations, and return what they recorded."""
        ...

    def embed(self, token_ids_T: Array, table: Linear, x: Stream) -> None:
        """residual = 0; partial[t] = row token_ids[t] of the table, or 0 where it has no such row:
        with several ranks each holds a part of the vocabulary."""
        ...

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
        """Reduce into the residual, norm, project to q, k, v; rotate q and k by their positions;
        store k and v at slots_T; write q. Where attention follows in the same record, q is for it
        alone, and a backend may leave the rotation to it.

        A float cache is rounded to its dtype, a float16 one after clipping to its range. For an
        int8 cache, in float32, over the E numbers of a token and KV head: scale = max|x| / 127,
        q = rint(x * (127 / max|x|)), all 0 where max|x| is at most 1e-30.
        """
        ...

    def attention(
        self,
        q_TQ: Array,
        batch: ForwardBatch,
        cache: LayerCache,
        out: Linear,
        x: Stream,
    ) -> None:
        """Causal softmax(q k^T / sqrt(E)) v over each token's context, read from the cache through
        the block table; query head h reads KV head h // (H / K). partial = result projected by
        `out`."""
        ...

    def gate_up(self, x: Stream, norm: Norm, linear: Linear, act_TF: Array) -> None:
        """Reduce into the residual, norm, project to gate and up; act = silu(gate) * up."""
        ...

    def down(self, act_TF: Array, linear: Linear, x: Stream) -> None:
        """partial = act projected by `linear`."""
        ...

    def head(self, x: Stream, rows_L: Array, norm: Norm, linear: Linear, logits_LV: Array) -> None:
        """Reduce, norm and project rows_L of the stream to logits. On one rank it leaves the stream
        as it is, so that it may be called for other rows of the same step; on several, partial is
        reduced in place."""
        ...

    def copy_blocks(self, kv_arrays: tuple[Array, ...], copies_C2: Array) -> None:
        """Copy KV blocks (source, destination) of every layer, at once rather than recorded.

        Blocks are axis 2 of each array; all sources are read before anything is written.
        """
        ...
