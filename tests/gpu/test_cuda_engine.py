"""Whole engines on this machine's GPU: logits against the reference, tokens against themselves.

Dummy weights; the reference computes them on the CPU in float32. Run as tests/gpu/test_cuda_ops.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from puna import LLM, BuildConfig, SamplingParams, build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.errors import EngineError
from puna.memory import rank_memory
from puna.runtime.cuda_bandwidth import gpu_read_bandwidth
from puna.runtime.cuda_runner import CudaRunner

LIMITS = {"max_seq_len": 512, "max_batch_size": 64, "max_num_tokens": 256}
# Odd sizes everywhere; and the widths of two real models.
ODD = "hidden=200,layers=2,heads=6,kv_heads=2,head_dim=40,ffn=333,vocab=1003,max_positions=512"
SHAPES = {
    "odd": (ODD, "float16"),
    "7b-wide": ("llama-2-7b,num_layers=2", "float16"),
    "8b-wide": ("llama-3-8b,num_layers=2,vocab=32000", "bfloat16"),
}
# Relative error of logits; torch in the same dtype makes about half of it.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}

ROOT = Path(__file__).resolve().parents[2]

Engines = Callable[[str], Path]
Positions = list[np.ndarray]


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """engines(name): built when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            shape, dtype = SHAPES[name]
            out = tmp_path_factory.mktemp("engines") / name
            config = BuildConfig(dtype=dtype, target=target(), **LIMITS)
            made[name] = build(DummyCheckpoint(parse_preset(shape), seed=11), out, config).path
        return made[name]

    return get


def prompt(seed: int, size: int, vocab: int = 1000) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, size).tolist()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def many_logits(llm: LLM, prompts: list[list[int]], num_prefill: int) -> Positions:
    """The logits of several prompts that are computed side by side, the last tokens one a step."""
    requests = [
        llm.executor.add_request(tokens, want_prompt_logits=True, num_prefill=num_prefill)
        for tokens in prompts
    ]
    parts: dict[int, list[np.ndarray]] = {request.id: [] for request in requests}
    while not llm.executor.is_idle:
        for event in llm.executor.step():
            if event.prompt_logits is not None:
                logits = event.prompt_logits[1]
                assert isinstance(logits, np.ndarray)
                parts[event.sequence.request.id].append(logits)
    return [np.concatenate(parts[request.id]) for request in requests]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_against_the_reference(engines: Engines, name: str) -> None:
    """Prompts of M tokens at once; and M sequences that decode side by side."""
    tolerance = TOLERANCE[SHAPES[name][1]]
    prefills = [prompt(size, size) for size in (1, 3, 8, 33, 64, 200, 300)]
    batches = [[prompt(100 * m + i, 8) for i in range(m)] for m in (1, 3, 8, 16, 33, 64)]

    def run(device: str) -> tuple[Positions, list[Positions]]:
        with LLM(engines(name), device=device, prefix_cache=False) as llm:
            return (
                [llm.logits(tokens) for tokens in prefills],
                [many_logits(llm, prompts, num_prefill=5) for prompts in batches],
            )

    found, expected = run("cuda"), run("reference")
    errors = {
        f"prefill {len(mine)}": error(mine, theirs)
        for mine, theirs in zip(found[0], expected[0], strict=True)
    }
    for prompts, mine, theirs in zip(batches, found[1], expected[1], strict=True):
        both = np.concatenate(mine), np.concatenate(theirs)
        errors[f"decode {len(prompts)}"] = error(*both)
    print(name, {key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors.values()) < tolerance, errors


@pytest.fixture(scope="module")
def llm(engines: Engines) -> Iterator[LLM]:
    with LLM(engines("7b-wide")) as llm:
        assert llm.session is not None and llm.session.device_name == "cuda:0"
        yield llm


def greedy(max_new_tokens: int, **more) -> SamplingParams:
    return SamplingParams(max_new_tokens, temperature=0.0, ignore_eos=True, **more)


def tokens_of(llm: LLM, prompts: list[list[int]], params) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompts, params)  # type: ignore[arg-type]
    return [part.token_ids for output in outputs for part in output.completions]


def test_greedy_tokens_are_the_largest_logits(llm: LLM) -> None:
    """What the GPU samples in its graph is what its logits say, one token after the other."""
    tokens = prompt(1, 20)
    (out,) = tokens_of(llm, [tokens], greedy(30))
    logits = llm.logits([*tokens, *out[:-1]], num_prefill=len(tokens))
    assert tuple(logits[len(tokens) - 1 :].argmax(axis=1).tolist()) == out


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_running_ahead_changes_nothing(
    llm: LLM, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sequences that begin and end together, so that all steps have the same company."""
    prompts = [prompt(i, 3) for i in range(batch)]
    llm.executor.pool.clear()  # no prefix is known: both read all prompts
    ahead = tokens_of(llm, prompts, greedy(100))
    llm.executor.pool.clear()
    monkeypatch.setattr(llm.session, "can_run_ahead", lambda params: False)
    assert tokens_of(llm, prompts, greedy(100)) == ahead


def test_twenty_runs_are_equal(llm: LLM) -> None:
    prompts = [prompt(i, 10 + 3 * i) for i in range(6)]
    llm.executor.pool.clear()
    first = tokens_of(llm, prompts, greedy(40))
    for _ in range(19):
        llm.executor.pool.clear()
        assert tokens_of(llm, prompts, greedy(40)) == first


def test_deterministic_tokens_do_not_depend_on_company(engines: Engines) -> None:
    prompts = [prompt(i, 1 + 29 * i % 150) for i in range(20)]
    params = [greedy(5 + 7 * i % 40) for i in range(20)]
    with LLM(engines("7b-wide"), deterministic=True) as llm:
        together = tokens_of(llm, prompts, params)
        alone = [tokens_of(llm, [p], s)[0] for p, s in zip(prompts, params, strict=True)]
        assert together == alone
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm.session, "can_run_ahead", lambda params: False)
            assert tokens_of(llm, prompts, params) == alone


def test_rows_that_numpy_samples_beside_greedy_ones(engines: Engines) -> None:
    """On the GPU and on the reference, from logits that differ in the last digits only."""
    params = [
        greedy(12),
        SamplingParams(12, temperature=0.8, top_k=50, seed=1, ignore_eos=True),
        greedy(12, repetition_penalty=1.2),
        greedy(12, logprobs=3),
        SamplingParams(12, num_beams=3, ignore_eos=True),
        SamplingParams(12, temperature=1.0, seed=2, n=3, ignore_eos=True),
    ]
    prompts = [prompt(i, 9) for i in range(len(params))]
    with LLM(engines("odd")) as llm:
        found = tokens_of(llm, prompts, params)
    with LLM(engines("odd"), device="reference") as llm:
        expected = tokens_of(llm, prompts, params)
    same = [
        sum(a == b for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(found, expected, strict=True)
    ]
    # A near tie may fall otherwise, after which the two go apart.
    assert sum(same) > 0.7 * sum(map(len, expected)), same


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_what_was_planned(engines: Engines, name: str) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with LLM(engines(name)) as llm:
        assert llm.session is not None
        planned = rank_memory(llm.config, 0, "cuda").total
        loaded = torch.cuda.memory_allocated() - before
        tokens_of(llm, [prompt(i, 200) for i in range(8)], greedy(4))
        used = torch.cuda.memory_allocated() - before
        print(name, f"planned {planned:,}, loaded {loaded:,}, used {used:,}")
        assert abs(loaded - planned) < 64 * 2**20 and abs(used - planned) < 64 * 2**20
        counted = llm.session.memory
        assert abs(counted.total - planned) < 2**20
    assert torch.cuda.memory_allocated() - before < 64 * 2**20, "close lets go of it"


def weights_on_gpu(llm: LLM) -> dict[str, torch.Tensor]:
    runner = llm.session._runner  # type: ignore[union-attr]
    assert isinstance(runner, CudaRunner)
    return runner._stored


def test_stored_and_generated_weights_are_the_same_bits(engines: Engines, tmp_path: Path) -> None:
    """And a byte that was changed on disk is found."""
    shape, dtype = SHAPES["7b-wide"]
    checkpoint = DummyCheckpoint(parse_preset(shape), seed=11)
    config = BuildConfig(dtype=dtype, target=target(), **LIMITS)
    path = build(checkpoint, tmp_path / "stored", config, materialize=True).path
    with LLM(engines("7b-wide")) as generated, LLM(path) as stored:
        theirs = weights_on_gpu(stored)
        for name, array in weights_on_gpu(generated).items():
            assert torch.equal(array.view(torch.uint8), theirs[name].view(torch.uint8)), name
        same = [tokens_of(llm, [prompt(0, 30)], greedy(20)) for llm in (generated, stored)]
        assert same[0] == same[1]
    file = path / "rank0.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(EngineError, match=r"rank0\.safetensors was changed"):
        LLM(path)


def test_a_changed_kernel_is_found(engines: Engines, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(engines("odd"), tmp_path / "copy"))
    cubin = max((path / "kernels").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(cubin.read_bytes())
    data[len(data) // 2] ^= 1
    cubin.write_bytes(data)
    with pytest.raises(EngineError, match=rf"kernels/{cubin.name} was changed"):
        LLM(path)


def test_running_compiles_nothing(engines: Engines, tmp_path: Path) -> None:
    """No program on the PATH, no compiler to import, nowhere to keep what one would make."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('triton', 'cuda.core', 'cuda.bindings.nvrtc')))\n"
        "from puna import LLM, SamplingParams\n"
        "with LLM(sys.argv[1]) as llm:\n"
        "    params = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True)\n"
        "    outputs = llm.generate([[1, 2, 3] * 9, [4, 5]], params)\n"
        "    print([len(output.token_ids) for output in outputs])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(engines("7b-wide"))],
        env={
            "PATH": str(tmp_path),
            "TRITON_CACHE_DIR": str(cache),
            "CUDA_CACHE_DISABLE": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[0] == "[3, 3]"
    assert not list(cache.iterdir())


def test_too_much_memory_is_refused_with_the_figures(engines: Engines) -> None:
    with pytest.raises(EngineError, match=r"lower --kv-cache-bytes to \d+ or less"):
        LLM(engines("odd"), kv_cache_bytes=10**12)


def test_an_llm_after_a_broken_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens_of(llm, [prompt(5, 12)], greedy(10))
    llm.executor.add_request(prompt(6, 9), greedy(50))
    for _ in range(4):
        llm.executor.step()
    llm.executor.reset()
    assert tokens_of(llm, [prompt(5, 12)], greedy(10)) == expected


def test_read_bandwidth(engines: Engines) -> None:
    """More than any GPU's half, and no more than the fastest memory there is."""
    found = gpu_read_bandwidth("cuda:0", engines("odd"))
    print(f"reads {found:,.0f} GB/s")
    assert 200 < found < 9000
