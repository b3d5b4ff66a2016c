"""CudaOps compiled, on this machine's GPU: the cases of the interpreter, real sizes, graphs, bits.

Run them with `PYTHONPATH=. python -m pytest -o addopts= -q tests/gpu`; they skip without a GPU.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from dataclasses import replace

import numpy as np
from cuda_attention_cases import *  # noqa: F403
from cuda_attention_cases import (
    Attention,
    attention_step,
    check_attention,
    check_company,
    check_decode,
)
from cuda_bench import (
    Bench,
    TestDevice,
    activated,
    assert_near,
    norm_of,
    project,
)
from cuda_cases import *  # noqa: F403
from cuda_configs import BLOCK
from cuda_model_cases import *  # noqa: F403
from cuda_model_cases import MODEL, TwoModels
from lazy_kernels import LazyKernels, current_stream, local_target

from puna.batch import ForwardBatch
from puna.checkpoint.dummy import parse_preset
from puna.cuda.choices import Choices
from puna.cuda.compile import compile_kernels
from puna.cuda.driver import Driver
from puna.cuda.fused_ops import fused_ops
from puna.cuda.graphs import GraphRecorder
from puna.cuda.library import Library
from puna.cuda.ops import CudaOps
from puna.cuda.swiglu import swiglu
from puna.engine import EngineConfig
from puna.errors import EngineError
from puna.models.llama.model import Activations
from puna.ops import Norm, Stream
from puna.spec import ModelSpec

LLAMA_2_7B = parse_preset("llama-2-7b,num_layers=1")
LLAMA_3_8B = parse_preset("llama-3-8b,num_layers=1")


def make_ops(
    config: EngineConfig,
    arrays: dict[str, torch.Tensor],
    choices: Choices,
    deterministic: bool,
    has_fused: bool,
) -> CudaOps:
    kernels, recorder = LazyKernels(config), GraphRecorder()
    num_ctas = torch.cuda.get_device_properties(0).multi_processor_count
    given = kernels.config, kernels, Driver(), arrays, num_ctas
    return CudaOps(
        config,
        0,
        kernels,
        arrays,
        recorder,
        choices,
        deterministic=deterministic,
        fused=fused_ops(*given) if has_fused else (),
        swiglu=swiglu(kernels.config, kernels, Driver(), num_ctas),
    )


@pytest.fixture
def device() -> TestDevice:
    return TestDevice("cuda", make_ops)


def real_bench(
    device: TestDevice, spec: ModelSpec, dtype: str, deterministic: bool = False
) -> Bench:
    return Bench(
        device,
        spec,
        dtype,
        deterministic=deterministic,
        max_num_tokens=512,
        max_batch_size=64,
        max_seq_len=4096,
    )


REAL = pytest.mark.parametrize(
    ("spec", "dtype"), [(LLAMA_2_7B, "float16"), (LLAMA_3_8B, "bfloat16")], ids=["7b", "8b"]
)
TOKENS = pytest.mark.parametrize("num_tokens", [1, 3, 8, 17, 33, 64, 200])


@REAL
@TOKENS
def test_real_mlp(device: TestDevice, spec: ModelSpec, dtype: str, num_tokens: int) -> None:
    bench = real_bench(device, spec, dtype)
    x, sum_TD = bench.stream(num_tokens)
    norm = Norm(1 + bench.floats(spec.hidden_size) / 4, 1e-5)
    ffn = spec.intermediate_size
    linear = bench.linear([ffn, ffn], spec.hidden_size)
    act_TF = bench.poisoned(num_tokens, ffn, dtype=bench.dtype)
    bench.run(lambda: bench.ops.gate_up(x, norm, linear, act_TF))
    right = activated(sum_TD, norm, linear, torch.float64)
    assert_near(act_TF, right, activated(sum_TD, norm, linear, bench.dtype))
    down = bench.linear([spec.hidden_size], ffn)
    found_TD = bench.added_by(lambda: bench.ops.down(act_TF, down, x), x)
    product_TD, same_TD = (project(act_TF, down, kind) for kind in (torch.float64, bench.dtype))
    assert_near(found_TD, product_TD, same_TD)


@REAL
@TOKENS
def test_real_head(device: TestDevice, spec: ModelSpec, dtype: str, num_tokens: int) -> None:
    bench = real_bench(device, spec, dtype)
    x, sum_TD = bench.stream(num_tokens)
    norm = Norm(1 + bench.floats(spec.hidden_size) / 4, 1e-5)
    linear = bench.linear([spec.vocab_size], spec.hidden_size)
    rows = list(range(num_tokens))[-64:]
    logits_LV = bench.poisoned(len(rows), spec.vocab_size)
    rows_L = bench.integers(rows)
    bench.run(lambda: bench.ops.head(x, rows_L, norm, linear, logits_LV))
    right, same = (
        project(norm_of(sum_TD[rows].to(kind), norm), linear, kind)
        for kind in (torch.float64, bench.dtype)
    )
    assert_near(logits_LV, right, same)


@REAL
def test_real_prefill_attention(device: TestDevice, spec: ModelSpec, dtype: str) -> None:
    bench = real_bench(device, spec, dtype)
    check_attention(bench, [(200, 200), (1, 1), (150, 1000), (1, 700), (64, 64)], 512, 64, False)


@REAL
@pytest.mark.parametrize("num_seqs", [1, 8, 64])
def test_real_decode_attention(
    device: TestDevice, spec: ModelSpec, dtype: str, num_seqs: int
) -> None:
    bench = real_bench(device, spec, dtype)
    contexts = [1 + (i * 613) % 4000 for i in range(num_seqs)]
    check_decode(bench, contexts, num_seqs)


def test_a_row_is_alone_where_deterministic(device: TestDevice) -> None:
    """The bits of a row's products and of its attention are the same in any company."""
    spec = LLAMA_2_7B
    bench = real_bench(device, spec, "float16", deterministic=True)
    norm = Norm(1 + bench.floats(spec.hidden_size) / 4, 1e-5)
    ffn = spec.intermediate_size
    gate_up = bench.linear([ffn, ffn], spec.hidden_size)
    down = bench.linear([spec.hidden_size], ffn)
    rows_TD = bench.floats(200, spec.hidden_size)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for num_tokens in (200, 1, 3, 16, 17, 33, 64, 65):
        residual_TD = rows_TD[:num_tokens].clone()
        x = Stream(residual_TD, bench.poisoned(*residual_TD.shape, dtype=bench.dtype))
        act_TF = bench.poisoned(num_tokens, ffn, dtype=bench.dtype)

        bench.arrays["product_parts"][:] = 0.0
        normed_TD = bench.poisoned(*residual_TD.shape, dtype=bench.dtype)

        def emit(
            x: Stream = x, act_TF: torch.Tensor = act_TF, normed_TD: torch.Tensor = normed_TD
        ) -> None:
            bench.ops.gate_up(x, norm, gate_up, act_TF)
            bench.ops.down(act_TF, down, x)
            bench.ops._norm(x, norm, normed_TD)  # takes in what down left beside the residual

        bench.run(emit)
        found.append((act_TF, residual_TD))
    for act_TF, residual_TD in found[1:]:
        assert torch.equal(act_TF, found[0][0][: len(act_TF)])
        assert torch.equal(residual_TD, found[0][1][: len(residual_TD)])


def test_attention_of_a_row_is_alone_where_deterministic(device: TestDevice) -> None:
    """The last token of a prompt, computed with the prompt or as a decoding one."""
    spec = LLAMA_3_8B
    bench = real_bench(device, spec, "bfloat16", deterministic=True)
    linear = bench.linear([spec.hidden_size], spec.q_size)
    whole = attention_step(bench, [(300, 300)], 300, 64, False)
    attended = bench.arrays["attended_TQ"]
    x, _ = bench.stream(300)
    bench.run(lambda: bench.ops.attention(whole.q_TQ, whole.batch, whole.cache, linear, x))
    expected_TQ = attended[:300].clone()
    for first in (299, 290, 128):
        num_new = 300 - first
        batch = ForwardBatch(
            *(bench.integers(np.zeros(num_new)) for _ in range(3)),
            bench.integers([0, num_new]),
            bench.integers([300]),
            whole.batch.block_table_SM[:1],
            bench.integers([]),
            is_decode=num_new == 1,
        )
        part = Attention(whole.q_TQ[first:300], batch, whole.cache, num_new, [], [])
        y, _ = bench.stream(num_new)
        attended[:] = float("nan")

        def emit(part: Attention = part, y: Stream = y) -> None:
            bench.ops.attention(part.q_TQ, part.batch, part.cache, linear, y)

        bench.run(emit)
        assert torch.equal(attended[:num_new], expected_TQ[first:]), first
        assert torch.equal(y.residual_TD - y.residual_TD, torch.zeros_like(y.residual_TD))


def test_real_decode_attention_does_not_depend_on_the_batch(device: TestDevice) -> None:
    sizes = {"max_batch_size": 64, "max_seq_len": 4096}
    bench = Bench(device, LLAMA_3_8B, "bfloat16", has_fused=False, **sizes)
    check_company(bench, [1 + (i * 613) % 4000 for i in range(64)], (5, 30))


def test_an_engines_files_run_and_graphs_replay(device: TestDevice) -> None:
    """`compile_kernels` as a build calls it, loaded by the driver; a graph reads its inputs."""
    bench = Bench(device, MODEL, "float16")
    files = compile_kernels(replace(bench.config, target=local_target()))
    library = Library(files, Driver(), current_stream)
    assert library.target == local_target()
    bench.ops = CudaOps(bench.config, 0, library, bench.arrays, GraphRecorder(), Choices())
    models = TwoModels(bench, 3)
    logits_LV, tokens_L = bench.arrays["logits_LV"][:1], bench.integers([-7])
    ids_T, rows_L, zero = bench.integers([5]), bench.integers([0]), bench.integers([0])
    table_SM = bench.integers([[1, 2, 0, 0]])
    start_S1, lens_S, slots_T = bench.integers([0, 1]), bench.integers([1]), bench.integers([BLOCK])
    batch = ForwardBatch(ids_T, zero, slots_T, start_S1, lens_S, table_SM, rows_L, is_decode=True)

    names = ("residual_TD", "partial_TD", "q_TQ", "act_TF")
    act = Activations(*(bench.arrays[name] for name in names))

    def emit() -> None:
        models.model.forward(bench.ops, batch, act)
        models.model.logits(bench.ops, rows_L, 1, act, logits_LV)
        last_R = bench.arrays["last_tokens_R"]
        bench.ops.sample_greedy(logits_LV, rows_L, last_R, tokens_L)

    program = bench.ops.record(emit)
    found = []
    for token in (5, 17, 5):
        ids_T[:] = token
        program.run()
        torch.cuda.synchronize()
        found.append((logits_LV.clone(), tokens_L.item()))
    assert torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[1][0])
    assert found[0][1] == int(found[0][0].argmax())


DEEP = ModelSpec(1024, 2816, 6, 16, 4, 64, 4096, 256)


def decoded(device: TestDevice, overlaps: bool) -> list[torch.Tensor]:
    """Logits of 40 greedy steps of 16 sequences from nothing, one graph replayed."""
    bench = Bench(device, DEEP, "float16", max_batch_size=16, max_seq_len=256, overlaps=overlaps)
    arrays, ops = bench.arrays, bench.ops
    arrays["last_tokens_R"][:] = bench.integers(range(16))
    model = TwoModels(bench, 17).model
    tokens, rows = bench.integers([-1 - i for i in range(16)]), bench.integers(range(16))
    position, lens = bench.integers([0] * 16), bench.integers([1] * 16)
    slots = bench.integers([BLOCK * (1 + i) for i in range(16)])
    table = bench.integers([[1 + i, 0, 0, 0] for i in range(16)])
    start = bench.integers(range(17))
    batch = ForwardBatch(tokens, position, slots, start, lens, table, rows, is_decode=True)
    names = ("residual_TD", "partial_TD", "q_TQ", "act_TF")
    act, out = Activations(*(arrays[name] for name in names)), bench.integers([0] * 16)

    def emit() -> None:
        model.forward(ops, batch, act)
        model.logits(ops, rows, 16, act, arrays["logits_LV"])
        ops.sample_greedy(arrays["logits_LV"], rows, arrays["last_tokens_R"], out)

    program, found = ops.record(emit), []
    for _ in range(40):
        program.run()
        found.append(arrays["logits_LV"].clone())
        for array in (position, lens, slots):
            array += 1
    torch.cuda.synchronize()
    return found


def test_overlapping_kernels_change_no_bit(device: TestDevice) -> None:
    """A kernel that read before the one in front had written would show here, sooner or later."""
    plain, again, overlapping = (decoded(device, overlaps) for overlaps in (False, True, True))
    assert all(torch.isfinite(x).all() for x in plain)
    for step, (a, b, c) in enumerate(zip(plain, again, overlapping, strict=True)):
        assert torch.equal(a, b) and torch.equal(a, c), step


def test_a_damaged_kernel_is_refused(device: TestDevice) -> None:
    torch.zeros(1, device="cuda")
    with pytest.raises(EngineError, match=r"norm\.cubin cannot be loaded: .+ \(error \d+\)"):
        Driver().load(b"\x7fELF" + bytes(100), "kernels/norm.cubin")


def test_the_driver_knows_the_gpu() -> None:
    torch.zeros(1, device="cuda")
    driver = Driver()
    gpu, found = driver.gpu(0), torch.cuda.get_device_properties(0)
    assert gpu.name == found.name and gpu.capability == (found.major, found.minor)
    assert gpu.num_multiprocessors == found.multi_processor_count
    assert driver.version() >= (12, 0) and driver.num_gpus() == torch.cuda.device_count()
    free, total = driver.memory()
    assert 0 < free <= total
