"""The LLaMA decoder, once, against `Ops`. Recorded for a batch shape, then replayed without Python.

This file knows the order of operations and which weight goes where; it does not know how anything
is computed, stored or scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.batch import ForwardBatch
from puna.ops import LayerCache, Linear, Norm, Ops, RopeTable, Stream
from puna.quant import Array


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights and KV cache of one decoder layer on this rank."""

    attn_norm: Norm
    qkv: Linear
    o: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear
    cache: LayerCache


@dataclass(frozen=True, slots=True)
class Activations:
    """Arrays that a step writes, at their largest; a step uses the first rows.

    T tokens, D hidden, Q query heads x head_dim, F ffn on this rank; all float32.
    """

    residual_TD: Array
    partial_TD: Array
    q_TQ: Array
    act_TF: Array

    def stream(self, num_tokens: int) -> Stream:
        return Stream(self.residual_TD[:num_tokens], self.partial_TD[:num_tokens])


@dataclass(frozen=True, slots=True)
class Llama:
    """The layers of one rank; `embed` on the first pipeline stage, `norm` and `head` on the
    last."""

    layers: tuple[Layer, ...]
    rope: RopeTable
    embed: Linear | None
    norm: Norm | None
    head: Linear | None

    def forward(self, ops: Ops, batch: ForwardBatch, act: Activations) -> None:
        """Record the layers over all tokens of the step; the stream is left in `act`."""
        num_tokens = batch.num_tokens
        x = act.stream(num_tokens)
        q_TQ, act_TF = act.q_TQ[:num_tokens], act.act_TF[:num_tokens]
        if self.embed is not None:
            ops.embed(batch.token_ids_T, self.embed, x)
        for layer in self.layers:
            ops.qkv(x, layer.attn_norm, layer.qkv, self.rope, batch, layer.cache, q_TQ)
            ops.attention(q_TQ, batch, layer.cache, layer.o, x)
            ops.gate_up(x, layer.mlp_norm, layer.gate_up, act_TF)
            ops.down(act_TF, layer.down, x)

    def logits(
        self, ops: Ops, rows_L: Array, num_tokens: int, act: Activations, logits_LV: Array
    ) -> None:
        """Record the head over rows_L of the stream that `forward` left."""
        assert self.norm is not None and self.head is not None, "not the last stage"
        ops.head(act.stream(num_tokens), rows_L, self.norm, self.head, logits_LV)
