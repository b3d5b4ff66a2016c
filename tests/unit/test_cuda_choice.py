"""Which kernels an operation is, by the number of tokens: kernels that only say their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_configs import BLOCK, cuda_config

from puna.batch import ForwardBatch
from puna.cuda.choices import Choices
from puna.cuda.kernel_table import triton_kernels
from puna.cuda.launches import Launches
from puna.cuda.ops import CudaOps
from puna.cuda_memory import padded_cols, padded_rows
from puna.engine import EngineConfig
from puna.memory import workspace_specs
from puna.models.llama.model import Activations, Layer, Llama
from puna.ops import LayerCache, Linear, Norm, RopeTable
from puna.spec import ModelSpec

SPEC = ModelSpec(
    hidden_size=160,
    intermediate_size=200,
    num_layers=2,
    num_heads=10,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=512,
    attention_bias=True,
)
CHOICES = Choices(direct_tokens=20, swiglu_tokens=100)


class NamedKernels:
    """Checks what is passed against what the kernel takes, and keeps its name."""

    def __init__(self, config: EngineConfig) -> None:
        self._kernels = {kernel.name: kernel for kernel in triton_kernels(config)}
        self.launched: list[str] = []
        self.overlapping: list[bool] = []

    def constant(self, name: str, key: str) -> Any:
        return dict(self._kernels[name].constants)[key]

    def launch(self, name: str, grid: Any, arguments: tuple[Any, ...], overlaps: bool) -> None:
        kinds = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
        found = [kinds[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
        assert found == [kind for _, kind in self._kernels[name].arguments], name
        assert len(grid) == 3 and min(grid) > 0, (name, grid)
        self.launched.append(name)
        self.overlapping.append(overlaps)


class Fused:
    def __init__(self, kernels: NamedKernels, *operations: str) -> None:
        self.operations = frozenset(operations)
        self._kernels = kernels

    def _say(self, name: str) -> None:
        self._kernels.launched.append(f"fused {name}")
        self._kernels.overlapping.append(False)

    def qkv(self, *_: Any) -> None:
        self._say("qkv")

    def attention(self, *_: Any) -> None:
        self._say("attention")

    def out(self, *_: Any) -> None:
        self._say("out")

    def gate_up(self, *_: Any) -> None:
        self._say("gate_up")

    def down(self, *_: Any) -> None:
        self._say("down")

    def head(self, *_: Any) -> None:
        self._say("head")

    def sample_greedy(self, *_: Any) -> None:
        self._say("sample_greedy")

    def finish(self) -> None:
        pass


class Swiglu:
    def __init__(self, kernels: NamedKernels) -> None:
        self._kernels = kernels

    def gate_up(self, x: Any, weight: Any, bias: Any, act: Any, overlaps: bool) -> None:
        assert bias is None and len(x) == len(act)
        self._kernels.launched.append("swiglu")
        self._kernels.overlapping.append(overlaps)


class Once:
    """A recorder that runs what it records."""

    def prepare(self, call: Callable[[], None]) -> None:
        call()

    def record(self, emit: Callable[[], None]) -> Any:
        emit()


def launched(
    num_tokens: int,
    *,
    is_decode: bool = False,
    deterministic: bool = False,
    fused: tuple[str, ...] = (),
    most: int = 4,
) -> NamedKernels:
    """The kernels of a step of a model of two layers."""
    config = cuda_config(SPEC)
    kinds = {"float32": torch.float32, "int32": torch.int32, "float16": torch.float16}
    arrays = {
        name: torch.zeros(shape, dtype=kinds[dtype.name])
        for name, (dtype, shape) in workspace_specs(config, 0, "cuda").items()
    }
    kernels = NamedKernels(config)
    ops = CudaOps(
        config,
        0,
        kernels,
        arrays,
        Once(),
        CHOICES,
        deterministic=deterministic,
        fused=((most, Fused(kernels, *fused)),) if fused else (),
        swiglu=Swiglu(kernels),
    )
    act = Activations(*(arrays[k] for k in ("residual_TD", "partial_TD", "q_TQ", "act_TF")))
    num_seqs = num_tokens if is_decode else 3
    tokens, seqs = (torch.zeros(n, dtype=torch.int32) for n in (num_tokens, num_seqs))
    table = torch.zeros((num_seqs, 8), dtype=torch.int32)
    start = torch.zeros(num_seqs + 1, dtype=torch.int32)
    args: list[Any] = [tokens, tokens, tokens, start, seqs, table, seqs]
    batch, model = ForwardBatch(*args, is_decode=is_decode), model_of(ops, SPEC)
    logits: Any = arrays["logits_LV"][:num_seqs]

    def emit() -> None:
        model.forward(ops, batch, act)
        model.logits(ops, batch.logits_rows_L, num_tokens, act, logits)
        ops.sample_greedy(logits, seqs, arrays["last_tokens_R"], seqs)

    ops.record(emit)
    return kernels


def model_of(ops: CudaOps, spec: ModelSpec) -> Llama:
    zeros: Any = torch.zeros

    def linear(*sizes: int, cols: int, bias: bool = False) -> Linear:
        data = zeros((sum(map(padded_rows, sizes)), padded_cols(cols)), dtype=torch.float16)
        parts = data.split([padded_rows(size) for size in sizes])
        matrices = tuple(
            ops.load_matrix({"data": part}, "float16", (size, cols), None)
            for part, size in zip(parts, sizes, strict=True)
        )
        return Linear(matrices, zeros(sum(sizes)) if bias else None)

    q, kv, d, f = spec.q_size, spec.kv_size, spec.hidden_size, spec.intermediate_size
    norm = Norm(zeros(d), 1e-5)
    kv_array = zeros((4, 2, BLOCK, spec.head_dim), dtype=torch.float16)
    layer = Layer(
        norm,
        linear(q, kv, kv, cols=d, bias=True),
        linear(d, cols=q, bias=True),
        norm,
        linear(f, f, cols=d),
        linear(d, cols=f),
        LayerCache(kv_array, kv_array),
    )
    table = zeros((512, spec.head_dim // 2))
    vocab = linear(spec.vocab_size, cols=d)
    return Llama((layer, layer), RopeTable(table, table), vocab, norm, vocab)


def test_a_few_tokens_leave_parts() -> None:
    kernels = launched(3, is_decode=True)
    layer = ["norm_parts", "gemm_qkv_16", "decode_parts", "combine", "gemm_o_16"]
    layer += ["norm_parts", "gemm_gate_up_16", "gemm_down_16"]
    last = ["norm_parts_pick", "gemm_head_16", "argmax_chunks", "argmax_rows"]
    assert kernels.launched == ["embed_parts", *layer, *layer, *last]
    assert kernels.overlapping == [False] + [True] * (len(kernels.launched) - 1)


def test_many_tokens_are_for_cublas() -> None:
    """Each product is one of torch's, so what follows it is launched as usual."""
    kernels = launched(33)
    layer = ["norm_partial", "rope_append", "prefill", "add_bias", "norm_partial", "silu_mul"]
    last = ["norm_partial_pick", "gemm_head_16", "argmax_chunks", "argmax_rows"]
    assert kernels.launched == ["embed_partial", *layer, *layer, *last]
    overlaps = dict(zip(kernels.launched, kernels.overlapping, strict=True))
    assert overlaps["prefill"] and not overlaps["rope_append"] and not overlaps["silu_mul"]


@pytest.mark.parametrize(("num_tokens", "tile"), [(1, 16), (16, 16), (17, 32), (20, 32)])
def test_tiles(num_tokens: int, tile: int) -> None:
    names = launched(num_tokens).launched
    assert f"gemm_qkv_{tile}" in names and f"gemm_down_{tile}" in names and "prefill" in names


def test_deterministic_steps_have_one_way_for_all() -> None:
    """Skinny products and prefill's attention; beyond the rows of parts, sums are whole."""
    names = launched(3, is_decode=True, deterministic=True).launched
    assert "prefill" in names and "decode" not in names and "gemm_o_16" in names
    names = launched(33, deterministic=True).launched
    assert "gemm_o_64" in names and "norm_parts" in names
    names = launched(100, deterministic=True).launched
    assert {"gemm_qkv_whole", "gemm_o_whole", "gemm_down_whole", "norm"} <= set(names)
    assert not any("partial" in name or "parts" in name for name in names)


def test_fused_operations_of_a_target() -> None:
    every = ("qkv", "attention", "gate_up", "down", "head")
    names = launched(4, is_decode=True, fused=every).launched
    layer = [f"fused {name}" for name in every[:4]]
    assert names == ["embed", *layer, *layer, "fused head", "fused sample_greedy"]
    assert not any("fused" in name for name in launched(5, is_decode=True, fused=every).launched)
    names = launched(4, is_decode=True, deterministic=True, fused=every).launched
    assert not any("fused" in name for name in names)


def test_what_a_target_has_not_fused_adds_into_the_residual_too() -> None:
    kernels = launched(4, is_decode=True, fused=("gate_up",))
    layer = ["norm", "gemm_qkv_16", "decode_parts", "combine", "gemm_o_whole"]
    layer += ["fused gate_up", "gemm_down_whole"]
    last = ["norm_pick", "gemm_head_16", "argmax_chunks", "argmax_rows"]
    assert kernels.launched == ["embed", *layer, *layer, *last]
    behind = kernels.launched.index("fused gate_up") + 1
    assert not kernels.overlapping[behind] and kernels.overlapping[behind + 1]


def test_a_prefill_of_a_few_tokens_has_the_attention_of_prefill() -> None:
    names = launched(4, fused=("qkv", "attention", "gate_up", "down", "head")).launched
    layer = ["norm", "gemm_qkv_16", "rope_append_parts", "prefill", "gemm_o_whole"]
    layer += ["fused gate_up", "fused down"]
    assert names == ["embed", *layer, *layer, "fused head", "fused sample_greedy"]


def test_prompts_by_fused_operations() -> None:
    """All of them but attention, also where there are too many tokens for skinny products: then
    nothing is left beside the residual."""
    every = ("qkv", "attention", "out", "gate_up", "down", "head")
    for num_tokens in (4, 99):
        names = launched(num_tokens, fused=every, most=99).launched
        layer = ["fused qkv", "prefill", "fused out", "fused gate_up", "fused down"]
        assert names == ["embed", *layer, *layer, "fused head", "fused sample_greedy"]
    names = launched(99, is_decode=True, fused=every, most=99).launched
    layer = ["fused qkv", "fused attention", "fused gate_up", "fused down"]
    assert names == ["embed", *layer, *layer, "fused head", "fused sample_greedy"]
    assert not any("fused" in name for name in launched(100, fused=every, most=99).launched)


def test_many_tokens_have_gate_and_up_as_one_kernel() -> None:
    kernels = launched(100)
    layer = ["norm_partial", "rope_append", "prefill", "add_bias", "norm_partial", "swiglu"]
    last = ["norm_partial_pick", "gemm_head_16", "argmax_chunks", "argmax_rows"]
    assert kernels.launched == ["embed_partial", *layer, *layer, *last]
    assert kernels.overlapping[kernels.launched.index("swiglu")]
    assert "swiglu" not in launched(99).launched
    assert "swiglu" not in launched(100, deterministic=True).launched


@pytest.mark.parametrize(("num_tokens", "is_biased"), [(1, True), (30, True), (31, False)])
def test_up_to_some_tokens_cublas_is_given_a_bias(num_tokens: int, is_biased: bool) -> None:
    """Ones in place of the zeros tell; the matrix has rows and columns of padding."""
    config, random = cuda_config(SPEC), torch.Generator().manual_seed(num_tokens)
    ones_N = torch.ones(40, dtype=torch.float16)
    launches = Launches(NamedKernels(config), Once(), Choices(biased_tokens=30), (), ones_N)
    x_TK = torch.randn((num_tokens, 64), generator=random).half()
    w_NK = torch.full((48, 128), float("nan"), dtype=torch.float16)
    w_NK[:33, :64] = torch.randn((33, 64), generator=random).half()
    y_TN = torch.full((num_tokens, 33), float("nan"), dtype=torch.float16)
    launches.record(lambda: launches.product(x_TK, w_NK, y_TN))
    expected_TN = x_TK.float() @ w_NK[:33, :64].float().T + float(is_biased)
    assert torch.allclose(y_TN.float(), expected_TN, rtol=2e-3, atol=2e-2)
