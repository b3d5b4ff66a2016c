"""A request's tokens depend on neither its company, nor the chunking, nor the cache, nor luck.

Greedy tokens are compared with those of each prompt alone, computed in one piece and without a
prefix cache; logits are compared to the bit. Models: the trained stories260K (float32, and int8
with an int8 KV cache) and a random one in which every size is odd for some tile. All of it holds of
each device by itself, and of each instruction set.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from puna.builder import build
from puna.cpu.ops import instruction_sets
from puna.engine import read_config
from puna.llm import LLM
from puna.memory import kv_block_bytes
from puna.native.library import find_library
from puna.plan import BuildConfig
from puna.runtime.request import SamplingParams

PARAMS = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
BATCH = 8
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module", params=["stories260K", "stories260K-int8", "odd-sizes"])
def engine(
    request: pytest.FixtureRequest,
    random_llama: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    if request.param == "odd-sizes":
        checkpoint = random_llama(
            hidden_size=66,
            intermediate_size=101,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=18,
            vocab_size=311,
            attention_bias=True,
            mlp_bias=True,
            max_position_embeddings=512,
        )
    else:
        checkpoint = request.getfixturevalue("stories")
    numbers = "int8" if request.param.endswith("int8") else "auto"
    out = tmp_path_factory.mktemp("engines") / request.param
    build(checkpoint, out, BuildConfig(quant=numbers, kv_dtype=numbers, max_batch_size=BATCH))
    return out


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Lengths around the block and tile sizes; most begin alike, so that the prefix cache bites."""
    rng = np.random.default_rng(5)
    shared = rng.integers(3, 300, 40).tolist()
    lengths = (1, 15, 16, 33, 40, 41, 64, 70)
    tails = [rng.integers(3, 300, max(0, n - 40)).tolist() for n in lengths]
    return [[*shared[:n], *tail] for n, tail in zip(lengths, tails, strict=True)]


@pytest.fixture(scope="module")
def alone(engine: Path, device: str, prompts: list[list[int]]) -> Tokens:
    """Each prompt by itself."""
    with LLM(engine, device=device, prefix_cache=False) as llm:
        return [out.token_ids for prompt in prompts for out in llm.generate([prompt], PARAMS)]


def token_ids(llm: LLM, prompts: list[list[int]]) -> Tokens:
    return [out.token_ids for out in llm.generate(prompts, PARAMS)]


def test_the_prompts_tell_models_apart(alone: Tokens) -> None:
    """Equal outputs everywhere would prove nothing."""
    assert len(set(alone)) > len(alone) // 2
    assert all(len(tokens) == 40 for tokens in alone)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size(
    batch_size: int, engine: Path, device: str, prompts: list[list[int]], alone: Tokens
) -> None:
    with LLM(engine, device=device, prefix_cache=False, max_batch_size=batch_size) as llm:
        assert token_ids(llm, prompts) == alone


def test_order_of_arrival(
    engine: Path, device: str, prompts: list[list[int]], alone: Tokens
) -> None:
    with LLM(engine, device=device, prefix_cache=False, max_batch_size=3) as llm:
        for order in (range(7, -1, -1), (3, 0, 7, 1, 6, 2, 5, 4)):
            found = token_ids(llm, [prompts[i] for i in order])
            assert found == [alone[i] for i in order]


def test_arrival_while_others_run(
    engine: Path, device: str, prompts: list[list[int]], alone: Tokens
) -> None:
    with LLM(engine, device=device, prefix_cache=False) as llm:
        streams = [llm.stream(prompt, PARAMS) for prompt in prompts[:4]]
        begun: list[list[int]] = [[] for _ in streams]
        for i in range(len(streams)):
            for stream, tokens in zip(streams[: i + 1], begun, strict=False):
                tokens += next(stream).token_ids  # those before are in the midst of decoding
        assert token_ids(llm, prompts[4:]) == alone[4:]
        for stream, tokens, expected in zip(streams, begun, alone, strict=False):
            rest = [token for delta in stream for token in delta.token_ids]
            assert (*tokens, *rest) == expected


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("how", ["max_chunk", "max_num_tokens"])
def test_chunk_size(
    how: str, chunk: int, engine: Path, device: str, prompts: list[list[int]], alone: Tokens
) -> None:
    options = {"max_num_tokens": chunk} if how == "max_num_tokens" else {}
    with LLM(engine, device=device, prefix_cache=False, **options) as llm:
        if how == "max_chunk":
            llm.executor.scheduler.max_chunk = chunk
        assert token_ids(llm, prompts) == alone
        # In chunks, more steps: without this the option might have done nothing.
        assert llm.executor.num_steps >= 39 + -(-70 // chunk)


def test_prefix_cache(engine: Path, device: str, prompts: list[list[int]], alone: Tokens) -> None:
    with LLM(engine, device=device, prefix_cache=True, max_batch_size=3) as llm:
        pool = llm.executor.scheduler.pool
        assert token_ids(llm, prompts) == alone
        assert len(pool.match_prefix(prompts[-1], 64)) == 4
        assert token_ids(llm, prompts) == alone, "now from the cache"


def test_preemption(engine: Path, device: str, prompts: list[list[int]], alone: Tokens) -> None:
    num_bytes = 13 * kv_block_bytes(read_config(engine), 0)
    for prefix_cache in (False, True):
        with LLM(engine, device=device, prefix_cache=prefix_cache, kv_cache_bytes=num_bytes) as llm:
            assert token_ids(llm, prompts) == alone
            assert llm.executor.scheduler.num_preemptions >= 2


def test_preemption_in_chunks(
    engine: Path, device: str, prompts: list[list[int]], alone: Tokens
) -> None:
    num_bytes = 13 * kv_block_bytes(read_config(engine), 0)
    with LLM(engine, device=device, kv_cache_bytes=num_bytes, max_num_tokens=11) as llm:
        assert token_ids(llm, prompts) == alone
        assert llm.executor.scheduler.num_preemptions >= 2


def test_many_continuations_of_one_prompt(
    engine: Path, device: str, prompts: list[list[int]], alone: Tokens
) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True, n=4)
    with LLM(engine, device=device) as llm:
        for i in (0, 2, 5):  # ends before, at and after a block's end
            (out,) = llm.generate([prompts[i]], params)
            assert [c.token_ids for c in out.completions] == [alone[i]] * 4


def test_a_seed_gives_the_same_tokens_in_any_company(
    engine: Path, device: str, prompts: list[list[int]]
) -> None:
    params = [SamplingParams(20, 0.9, top_k=50, seed=i, ignore_eos=True) for i in range(8)]
    with LLM(engine, device=device, prefix_cache=False) as llm:
        together = [out.token_ids for out in llm.generate(prompts, params)]
        single = [llm.generate([p], s)[0].token_ids for p, s in zip(prompts, params, strict=True)]
    assert together == single and len(set(together)) == 8


@pytest.mark.parametrize("length", [80, 300])  # 300: beyond one chunk of attention's context
def test_logits_are_equal_to_the_bit(length: int, engine: Path, device: str) -> None:
    ids = np.random.default_rng(1).integers(0, 311, length).tolist()
    with LLM(engine, device=device) as llm:
        whole = llm.logits(ids)
        for num_prefill in (1, 7, 64, length - 1):
            assert np.array_equal(llm.logits(ids, num_prefill=num_prefill), whole), num_prefill
        for chunk in (1, 7, 64):
            llm.executor.scheduler.max_chunk = chunk
            assert np.array_equal(llm.logits(ids), whole), chunk
        llm.executor.scheduler.max_chunk = 512
        others = [llm.stream([5] * 9, PARAMS) for _ in range(5)]
        for stream in others:
            next(stream)
        assert np.array_equal(llm.logits(ids), whole), "in company"
        for stream in others:
            stream.close()


def test_logits_of_each_instruction_set_are_equal_to_the_bit(engine: Path) -> None:
    """In pieces of every kind: alone in a step, fewer and more rows than a register tile has."""
    library = find_library()
    if library is None:
        pytest.skip("needs the native library")
    ids = np.random.default_rng(3).integers(0, 311, 150).tolist()
    for name in instruction_sets(library):
        with LLM(engine, device=f"cpu:{name}") as llm:
            assert llm.session is not None and llm.session.device_name == f"cpu:{name}"
            whole = llm.logits(ids)
            for chunk in (1, 2, 5, 16, 49, 149):
                llm.executor.scheduler.max_chunk = chunk
                assert np.array_equal(llm.logits(ids), whole), (name, chunk)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_do_not_depend_on_the_thread_count(threads: int, engine: Path, device: str) -> None:
    ids = np.random.default_rng(2).integers(0, 311, 50).tolist()
    program = (
        "import hashlib, sys\n"
        "from puna.llm import LLM\n"
        f"with LLM({str(engine)!r}, device={device!r}, threads={threads}) as llm:\n"
        f"    print(hashlib.sha256(llm.logits({ids}).tobytes()).hexdigest())\n"
    )
    # BLAS takes its number of threads from the environment, when NumPy is imported.
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    env = {**os.environ, **dict.fromkeys(names, str(threads))}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    found = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    with LLM(engine, device=device) as llm:
        assert found == hashlib.sha256(llm.logits(ids).tobytes()).hexdigest()
