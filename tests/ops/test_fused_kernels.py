"""The fused decode kernels of sm_90, emulated on the CPU, against torch in float32.

A whole step of a model of two layers: what each kernel is given and gives, how CTAs and warps share
the work and tell each other. The same comparison on a GPU is in tests/gpu.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import emulator
import pytest
import torch
from cuda_configs import BLOCK, cuda_config
from emulator import EmulatedDriver, EmulatedLibrary

from puna.batch import ForwardBatch
from puna.cuda.fused_ops import fused_ops
from puna.cuda.source_table import cuda_sources
from puna.cuda_memory import cuda_specs, padded_rows
from puna.engine import EngineConfig
from puna.ops import LayerCache, Norm, RopeTable, Stream
from puna.spec import ModelSpec

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
Tensor = Any
# Groups of four heads; heads of their own, uneven shares of columns, biases, an odd vocabulary.
SPECS: dict[str, tuple[ModelSpec, Literal["float16", "bfloat16"]]] = {
    "grouped": (ModelSpec(2048, 2048, 2, 32, 8, 64, 1001, 512), "bfloat16"),
    "alone": (
        ModelSpec(2048, 2816, 2, 16, 16, 128, 515, 512, attention_bias=True, mlp_bias=True),
        "float16",
    ),
    # Not for one token's; units of gate and up that are cut, and rows for more than 32 of a half.
    "odd": (ModelSpec(4288, 1344, 2, 4, 1, 128, 1001, 512, mlp_bias=True), "float16"),
    # Fewer units than CTAs.
    "small": (ModelSpec(128, 192, 2, 2, 1, 64, 131, 512), "float16"),
}
MAX_SEQ_LEN = 5000


class Fused:
    """The operations of one shape over emulated kernels."""

    def __init__(self, name: str, folder: Path) -> None:
        self.spec, dtype = SPECS[name]
        self.config: EngineConfig = cuda_config(
            self.spec, dtype, max_seq_len=MAX_SEQ_LEN, max_batch_size=64
        )
        sources = [
            it
            for it in cuda_sources(self.config)
            if it.name.startswith(("decode", "attend", "wide"))
        ]
        self.library = EmulatedLibrary(sources, folder)
        self.dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fused]:
    return {}


class Model:
    """Two layers of random weights and a cache, and a step of them in both ways."""

    def __init__(self, fused: Fused, contexts: list[int], num_ctas: int, seed: int) -> None:
        self.fused, self.contexts = fused, contexts
        self.random = torch.Generator().manual_seed(seed)
        spec = fused.spec
        kinds = {"float32": torch.float32, "int32": torch.int32}
        self.arrays = {
            name: torch.zeros(shape, dtype=kinds.get(dtype.name, fused.dtype))
            for name, (dtype, shape) in cuda_specs(fused.config, 0).items()
        }
        angles = self.floats(MAX_SEQ_LEN, spec.head_dim // 2) * 3
        self.rope = RopeTable(torch.cos(angles), torch.sin(angles))
        self.arrays["rope_cos_PE"] = self.rope.cos_PE
        given: Any = fused.library, EmulatedDriver(), self.arrays, num_ctas
        all_ops = fused_ops(fused.config, *given)
        self.ops = next(ops for most, ops in all_ops if len(contexts) <= most)
        q, kv, d, f = spec.q_size, spec.kv_size, spec.hidden_size, spec.intermediate_size
        self.norms = [Norm(1 + self.floats(d) / 4, 1e-5) for _ in range(5)]
        self.layers = [
            {
                "qkv": self.matrix(q + 2 * kv, d),
                "o": self.matrix(d, q),
                "gate_up": self.matrix(2 * f, d),
                "down": self.matrix(d, f),
                "qkv_bias": self.bias(q + 2 * kv, spec.attention_bias),
                "o_bias": self.bias(d, spec.attention_bias),
                "gate_up_bias": self.bias(2 * f, spec.mlp_bias),
                "down_bias": self.bias(d, spec.mlp_bias),
            }
            for _ in range(2)
        ]
        self.head = self.matrix(spec.vocab_size, d)
        self.batch = self._batch()
        shape = (int(self.batch.block_table_SM.max()) + 1, spec.num_kv_heads, BLOCK, spec.head_dim)
        self.caches = [
            LayerCache(*(self.floats(*shape).to(fused.dtype) for _ in range(2))) for _ in range(2)
        ]

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def matrix(self, rows: int, cols: int) -> Tensor:
        found = torch.zeros(padded_rows(rows), cols)
        found[:rows] = self.floats(rows, cols) / cols**0.5
        return found.to(self.fused.dtype)

    def bias(self, size: int, is_there: bool) -> Tensor | None:
        return self.floats(size) if is_there else None

    def _batch(self) -> ForwardBatch:
        counts = [-(-context // BLOCK) for context in self.contexts]
        blocks = 1 + torch.randperm(sum(counts), generator=self.random).int()
        table = torch.zeros(len(counts), max(counts) + 3, dtype=torch.int32)
        for row, part in zip(table, blocks.split(counts), strict=True):
            row[: len(part)] = part
        lens = torch.tensor(self.contexts, dtype=torch.int32)
        last = (lens - 1).clamp(min=0)  # what is beside the batch is written to block 0
        held = table.gather(1, (last // BLOCK)[:, None].long())[:, 0]
        rows = torch.arange(len(lens), dtype=torch.int32)
        args: Any = rows, last, held * BLOCK + last % BLOCK, torch.arange(len(lens) + 1), lens
        return ForwardBatch(*args, table, rows.flip(0), is_decode=True)

    def run(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the last rows first, and the tokens that were chosen."""
        ops, batch, arrays, num = self.ops, self.batch, self.arrays, len(self.contexts)
        x = Stream(h_TD.clone(), torch.zeros(0))
        q_TQ, act_TF = arrays["q_TQ"][:num], arrays["act_TF"][:num]
        for i, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            norm, mlp_norm = self.norms[2 * i : 2 * i + 2]
            qkv = layer["qkv"], layer["qkv_bias"]
            ops.qkv(x, norm, *qkv, self.rope, batch, cache, q_TQ)
            ops.attention(q_TQ, batch, cache, layer["o"], layer["o_bias"], x)
            ops.gate_up(x, mlp_norm, layer["gate_up"], layer["gate_up_bias"], act_TF)
            ops.down(act_TF, layer["down"], layer["down_bias"], x)
        logits_LV = torch.full((num, self.fused.spec.vocab_size), float("nan"))
        tokens_L = torch.full((num,), -7, dtype=torch.int32)
        rows_L = torch.arange(num, dtype=torch.int32)
        ops.head(x, batch.logits_rows_L, self.norms[4], self.head, logits_LV)
        ops.sample_greedy(rows_L, arrays["last_tokens_R"], tokens_L)
        ops.finish()
        return logits_LV, tokens_L

    def expected(self, h_TD: Tensor) -> Tensor:
        spec, batch, num = self.fused.spec, self.batch, len(self.contexts)
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim

        def product(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
            y = x @ layer[name].float().T
            bias = layer[f"{name}_bias"]
            return y if bias is None else y[:, : len(bias)] + bias

        def rotated(x: Tensor, count: int) -> Tensor:
            a, b = x.view(num, count, 2, size // 2).unbind(2)
            at = batch.positions_T.long()
            cos, sin = self.rope.cos_PE[at][:, None], self.rope.sin_PE[at][:, None]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        x = h_TD.clone()
        for i, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            norm, mlp_norm = self.norms[2 * i : 2 * i + 2]
            sizes = [spec.q_size, spec.kv_size, spec.kv_size]
            q, k, v = product(normed(x, norm), layer, "qkv").split(sizes, -1)
            q, k, v = rotated(q, heads), rotated(k, kv_heads), v.view(num, kv_heads, size)
            rows = []
            for seq, context in enumerate(self.contexts):
                if not context:
                    rows.append(torch.zeros(spec.q_size))
                    continue
                blocks = batch.block_table_SM[seq, : -(-context // BLOCK)].long()
                keys, values = (
                    torch.cat(tuple(it[blocks].float()), 1)[:, :context].clone()
                    for it in (cache.keys_NKEP, cache.values_NKPE)
                )
                keys[:, -1], values[:, -1] = k[seq], v[seq]
                queries = q[seq].view(kv_heads, heads // kv_heads, size)
                scores = queries @ keys.transpose(1, 2) / size**0.5
                rows.append((scores.softmax(-1) @ values).reshape(-1))
            x = x + product(torch.stack(rows), layer, "o")
            gate, up = product(normed(x, mlp_norm), layer, "gate_up").chunk(2, -1)
            x = x + product(torch.nn.functional.silu(gate) * up, layer, "down")
        x = normed(x[batch.logits_rows_L.long()], self.norms[4])
        return (x @ self.head.float().T)[:, : spec.vocab_size]


def normed(x: Tensor, norm: Norm) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight_D


@pytest.mark.parametrize("name", ["grouped", "alone"])
@pytest.mark.parametrize(
    ("contexts", "num_ctas"),
    [
        ([1], 3),
        ([777], 4),
        ([4500], 6),
        ([5, 33], 4),
        ([40, 0, 7], 4),
        ([64, 1, 300, 129, 31, 32, 40, 256], 5),
        ([1 + 61 * i % 500 for i in range(9)], 4),
        ([1 + 97 * i % 700 for i in range(16)], 6),
        ([1 + 61 * i % 90 for i in range(17)], 4),
    ],
    ids=lambda it: f"{len(it)} of {max(it)}" if isinstance(it, list) else str(it),
)
def test_a_step(
    made: dict[str, Fused], tmp_path_factory: Any, name: str, contexts: list[int], num_ctas: int
) -> None:
    check_a_step(made, tmp_path_factory, name, contexts, num_ctas)


@pytest.mark.parametrize("num_seqs", [1, 3, 35])
def test_a_step_of_odd_sizes(made: dict[str, Fused], tmp_path_factory: Any, num_seqs: int) -> None:
    contexts = [1 + 61 * i % 40 for i in range(num_seqs)]
    check_a_step(made, tmp_path_factory, "odd", contexts, 4)


@pytest.mark.parametrize("num_seqs", [2, 12])
def test_a_step_of_few_units(made: dict[str, Fused], tmp_path_factory: Any, num_seqs: int) -> None:
    check_a_step(made, tmp_path_factory, "small", [1 + 61 * i % 40 for i in range(num_seqs)], 40)


def check_a_step(
    made: dict[str, Fused], tmp_path_factory: Any, name: str, contexts: list[int], num_ctas: int
) -> None:
    if name not in made:
        made[name] = Fused(name, tmp_path_factory.mktemp("emulated"))
    model = Model(made[name], contexts, num_ctas, seed=len(contexts))
    h_TD = model.floats(len(contexts), model.fused.spec.hidden_size)
    expected_LV = model.expected(h_TD)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[model.fused.dtype]
    for _ in range(2):  # the second step finds what the first one left
        logits_LV, tokens_L = model.run(h_TD)
        assert not model.arrays["fused_error"].any()
        is_there = model.batch.seq_lens_S[model.batch.logits_rows_L.long()] > 0
        assert logits_LV.isfinite().all()
        error = (logits_LV - expected_LV)[is_there].norm() / expected_LV[is_there].norm()
        assert error < tolerance, error
        assert torch.equal(tokens_L.long(), logits_LV.argmax(-1))
