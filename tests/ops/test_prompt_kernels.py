"""The products of sm_90 for a prompt of up to 128 tokens, emulated on the CPU, against torch in
float32: two layers but for attention, whose result is made up."""

from __future__ import annotations

from typing import Any, Literal

import emulator
import pytest
import torch
from cuda_configs import BLOCK, cuda_config
from emulator import EmulatedDriver, EmulatedLibrary

from puna.batch import ForwardBatch
from puna.cuda.attend import Attend
from puna.cuda.source_table import prompt_source
from puna.cuda.wide import WideDecode
from puna.cuda_memory import cuda_specs, padded_rows
from puna.ops import LayerCache, Norm, RopeTable, Stream
from puna.spec import ModelSpec

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
Tensor = Any
SPECS: dict[str, tuple[ModelSpec, Literal["float16", "bfloat16"]]] = {
    "grouped": (ModelSpec(1024, 1024, 2, 16, 4, 64, 1001, 512), "bfloat16"),
    # Biases, and units of gate and up that are cut.
    "alone": (
        ModelSpec(1280, 2112, 2, 9, 9, 128, 515, 512, attention_bias=True, mlp_bias=True),
        "float16",
    ),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("num_tokens", "num_ctas"), [(65, 2), (77, 4), (128, 6)])
def test_two_layers(
    made: dict[str, Any], tmp_path_factory: Any, name: str, num_tokens: int, num_ctas: int
) -> None:
    spec, dtype_name = SPECS[name]
    config = cuda_config(spec, dtype_name, max_seq_len=512, max_batch_size=64)
    if name not in made:
        made[name] = EmulatedLibrary([prompt_source(config)], tmp_path_factory.mktemp("emulated"))
    dtype = getattr(torch, dtype_name)
    random = torch.Generator().manual_seed(num_tokens)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def matrix(rows: int, cols: int) -> Tensor:
        found = torch.zeros(padded_rows(rows), cols)
        found[:rows] = floats(rows, cols) / cols**0.5
        return found.to(dtype)

    def bias(size: int, is_there: bool) -> Tensor | None:
        return floats(size) if is_there else None

    q, kv, d, f = spec.q_size, spec.kv_size, spec.hidden_size, spec.intermediate_size
    kinds = {"float32": torch.float32, "int32": torch.int32}
    arrays = {
        key: torch.zeros(shape, dtype=kinds.get(kind.name, dtype))
        for key, (kind, shape) in cuda_specs(config, 0).items()
    }
    arrays["fused_next"] = torch.full((128, d), float("nan"), dtype=dtype)
    arrays["fused_sums"] = torch.full((256, 128), float("nan"))
    angles = floats(512, spec.head_dim // 2) * 3
    rope = RopeTable(torch.cos(angles), torch.sin(angles))
    arrays["rope_cos_PE"] = rope.cos_PE
    given: Any = made[name], EmulatedDriver(), arrays, num_ctas
    ops = WideDecode(config, *given, Attend(*given))

    positions = torch.arange(num_tokens, dtype=torch.int32) + 3
    num_blocks = -(-(num_tokens + 3) // BLOCK)
    blocks = 1 + torch.randperm(num_blocks, generator=random).int()
    slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
    nothing = torch.zeros(1, dtype=torch.int32)
    batch = ForwardBatch(nothing, positions, slots, nothing, nothing, nothing, nothing)
    shape = (num_blocks + 1, spec.num_kv_heads, BLOCK, spec.head_dim)
    qkv_bias = bias(q + 2 * kv, spec.attention_bias)
    weights = {
        "qkv": (matrix(q + 2 * kv, d), qkv_bias),
        "o": (matrix(d, q), bias(d, spec.attention_bias)),
        "gate_up": (matrix(2 * f, d), bias(2 * f, spec.mlp_bias)),
        "down": (matrix(d, f), bias(d, spec.mlp_bias)),
    }
    norms = [Norm(1 + floats(d) / 4, 1e-5) for _ in range(2)]
    h_TD, attended_TQ = floats(num_tokens, d), floats(num_tokens, q).to(dtype)

    def product(x: Tensor, key: str) -> Tensor:
        weight, added = weights[key]
        y = x @ weight.float().T
        return y if added is None else y[:, : len(added)] + added

    def expect_qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = product(normed(x, norms[0]), "qkv").view(num_tokens, -1, spec.head_dim)
        a, b = heads.chunk(2, -1)
        cos, sin = (it[positions.long()][:, None] for it in (rope.cos_PE, rope.sin_PE))
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        count = spec.num_heads + spec.num_kv_heads
        return turned[:, : spec.num_heads], turned[:, spec.num_heads : count], heads[:, count:]

    def check_qkv(x: Tensor, q_TQ: Tensor, cache: LayerCache) -> None:
        expected = expect_qkv(x)
        at = slots.long() // BLOCK, slice(None), slots.long() % BLOCK
        found = q_TQ.view(num_tokens, -1, spec.head_dim), cache.keys_NKEP[at], cache.values_NKPE[at]
        for got, wanted in zip(found, expected, strict=True):
            assert_close(got, wanted)
        written = torch.zeros(shape[0], BLOCK, dtype=torch.bool)
        written[slots.long() // BLOCK, slots.long() % BLOCK] = True
        assert cache.keys_NKEP.transpose(1, 2)[~written].isnan().all()

    def empty_cache() -> LayerCache:
        return LayerCache(*(torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)))

    x = Stream(h_TD.clone(), torch.zeros(0))
    q_TQ = torch.full((num_tokens, q), float("nan"), dtype=dtype)
    act_TF = torch.full((num_tokens, f), float("nan"), dtype=dtype)
    cache = empty_cache()
    ops.qkv(x, norms[0], *weights["qkv"], rope, batch, cache, q_TQ)
    check_qkv(h_TD, q_TQ, cache)

    ops.out(attended_TQ, *weights["o"], x)
    ops.gate_up(x, norms[1], *weights["gate_up"], act_TF)
    expected_TD = h_TD + product(attended_TQ.float(), "o")
    assert_close(x.residual_TD, expected_TD)
    gate, up = product(normed(expected_TD, norms[1]), "gate_up").chunk(2, -1)
    assert_close(act_TF, torch.nn.functional.silu(gate) * up)

    ops.down(act_TF, *weights["down"], x)
    cache = empty_cache()
    q_TQ.fill_(float("nan"))
    ops.qkv(x, norms[0], *weights["qkv"], rope, batch, cache, q_TQ)  # by the sums of squares
    expected_TD = expected_TD + product(act_TF.float(), "down")
    assert_close(x.residual_TD, expected_TD)
    check_qkv(expected_TD, q_TQ, cache)


def normed(x: Tensor, norm: Norm) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.eps) * norm.weight_D


def assert_close(got: Tensor, wanted: Tensor) -> None:
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-2}[got.dtype]
    assert (got.float() - wanted).norm() <= tolerance * wanted.norm()
