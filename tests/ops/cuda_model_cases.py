"""A model on CudaOps against the reference operations, step by step; run where `cuda_cases` is."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_bench import (
    WIDE,
    Bench,
    TestDevice,
    error,
)
from cuda_configs import BLOCK

from puna.batch import ForwardBatch
from puna.models.llama.model import Activations, Layer, Llama
from puna.ops import LayerCache, Linear, Norm, RopeTable
from puna.ops.reference import ReferenceOps
from puna.spec import ModelSpec

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


# The padded step below has the target's own kernels.
LARGE = replace(WIDE, num_layers=2, vocab_size=300, max_position_embeddings=256)


@pytest.mark.parametrize(
    ("spec", "dtype", "deterministic"),
    [
        (MODEL, "float16", False),
        (MODEL, "bfloat16", False),
        (MODEL, "float16", True),
        (LARGE, "float16", False),
        (LARGE, "bfloat16", False),
    ],
    ids=lambda it: {MODEL: "small", LARGE: "large"}.get(it, str(it)),
)
def test_model_against_the_reference(
    device: TestDevice, spec: ModelSpec, dtype: str, deterministic: bool
) -> None:
    """A padded step of many tokens with two prompts, then tokens that only the device knows, with a
    sequence of padding."""
    bench = Bench(device, spec, dtype, deterministic=deterministic, max_seq_len=256)
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


def test_a_batch_of_many_sequences(device: TestDevice) -> None:
    """Two decode steps of 21 sequences, by the target's own kernels."""
    num_seqs = 21
    bench = Bench(device, LARGE, "float16", max_seq_len=256, max_batch_size=num_seqs)
    models = TwoModels(bench, num_seqs + 1)
    first_R = np.arange(num_seqs) * 31 % LARGE.vocab_size
    bench.arrays["last_tokens_R"][:] = bench.integers(first_R)
    table = np.zeros((num_seqs, 4), np.int32)
    table[:, 0] = 1 + np.arange(num_seqs)
    for step in range(2):
        batch = ForwardBatch(
            bench.integers(-1 - np.arange(num_seqs)),
            bench.integers([step] * num_seqs),
            bench.integers(table[:, 0] * BLOCK + step),
            bench.integers(range(num_seqs + 1)),
            bench.integers([step + 1] * num_seqs),
            bench.integers(table),
            bench.integers(range(num_seqs)),
            is_decode=True,
        )
        found_LV, expected_LV, tokens_L = models.step(batch)
        assert error(found_LV, expected_LV) < 4e-3, step
        assert torch.equal(tokens_L.long(), found_LV.argmax(dim=1))
