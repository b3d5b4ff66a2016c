"""`puna bench` without a model: what is timed, what is counted, what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_session import VOCAB_SIZE, FakeSession

import puna.bench.latency
import puna.llm
import puna.native.bandwidth
from puna.bench.latency import (
    LatencyRun,
    check_run,
    measure_latency,
    step_kv_bytes,
    step_weight_bytes,
)
from puna.builder import plan_checkpoint
from puna.checkpoint.dummy import DummyCheckpoint
from puna.engine import EngineConfig
from puna.errors import ConfigError
from puna.llm import LLM
from puna.native.bandwidth import BUFFER_BYTES, numpy_read_bandwidth, read_bandwidth
from puna.native.library import find_library
from puna.plan import BuildConfig
from puna.runtime.launch import World
from puna.runtime.step import StepPlan
from puna.spec import GenerationDefaults, ModelSpec

# Sizes that no layout has to pad.
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 320
SHORT_AND_RANDOM = GenerationDefaults(eos_token_ids=tuple(range(VOCAB_SIZE)), temperature=2.0)


def planned(is_tied: bool = False, vocab_size: int = VOCAB, **options: Any) -> EngineConfig:
    spec = ModelSpec(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        tie_word_embeddings=is_tied,
    )
    return plan_checkpoint(DummyCheckpoint(spec), BuildConfig(**options))


class TimedSession(FakeSession):
    """A step takes 2 seconds and 1 more a token, by a clock of its own."""

    device, device_name = "cpu", "fake"
    threads = 3
    now = 0.0

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        super().submit(plan)
        decoding = int(self.lowering._is_decoding_R.sum())  # after the step
        TimedSession.now += 2 + max(decoding, sum(n for _, n in plan.prefills))


@pytest.fixture
def open_llm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., LLM]:
    """A function that opens an LLM whose session tells the time, on a machine of 50 GB/s."""
    clock = SimpleNamespace(perf_counter=lambda: TimedSession.now)
    monkeypatch.setattr(puna.bench.latency, "time", clock)
    monkeypatch.setattr(
        puna.bench.latency, "read_bandwidth", lambda threads, num_bytes: 25.0 * (threads - 1)
    )

    def open_llm(max_num_tokens: int = 64, num_blocks: int = 60) -> LLM:
        def open_session(engine_dir: Path, **_: object) -> TimedSession:
            session = TimedSession(num_blocks, 4, 8, 64, max_num_tokens, engine_dir=engine_dir)
            config = planned(vocab_size=VOCAB_SIZE, max_batch_size=8, max_num_tokens=max_num_tokens)
            session.config = replace(config, generation=SHORT_AND_RANDOM)  # type: ignore
            return session

        monkeypatch.setattr(puna.llm.Session, "open", open_session)
        return LLM(tmp_path, prefix_cache=False)

    return open_llm


def test_one_sequence(open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with open_llm() as llm:
        run = LatencyRun(batch=1, isl=10, osl=6, rounds=3)
        result = measure_latency(llm, run, lambda done, total: told.append((done, total)))
        plans = llm.session.plans
    assert (result.engine, result.device, result.threads) == (str(tmp_path), "fake", 3)
    assert result.ranks == 1
    assert (result.batch, result.isl, result.osl, result.rounds) == (1, 10, 6, 3)
    assert result.ttft_ms == 12_000 and result.prefill_tok_s == pytest.approx(10 / 12)
    assert result.decode_ms == 3_000 and result.tok_s == pytest.approx(1 / 3)
    assert result.gb_s == pytest.approx((result.weight_bytes + result.kv_bytes) / 3 / 1e9)
    assert result.read_gb_s == 50 and result.roofline == pytest.approx(result.gb_s / 50)
    assert len(plans) == 4 * 6, "a warm-up round and three, to their full length"
    prompts = [join.token_ids for plan in plans for join in plan.joined]
    assert len(set(prompts)) == 4 and {len(prompt) for prompt in prompts} == {10}
    assert told[-1] == (24, 24) and told == sorted(told)


def test_batch_whose_prompts_are_read_in_several_steps(open_llm: Callable[..., LLM]) -> None:
    with open_llm(max_num_tokens=16) as llm:
        result = measure_latency(llm, LatencyRun(batch=3, isl=12, osl=8, rounds=1))
        # 12 + 4, then 8 + 7 beside the first, which decodes; then 5 beside two.
        prefills = [sum(n for _, n in plan.prefills) for plan in llm.session.plans[:4]]
    assert prefills == [16, 15, 5, 0]
    assert result.ttft_ms == pytest.approx(1000 * (3 * 2 + sum(prefills)))
    assert result.prefill_tok_s == pytest.approx(36 / (6 + sum(prefills)))
    assert result.decode_ms == 5_000, "steps of all three only"
    assert result.tok_s == pytest.approx(3 / 5)


def test_prompts_do_not_meet_in_a_cache(open_llm: Callable[..., LLM]) -> None:
    with open_llm() as llm:
        measure_latency(llm, LatencyRun(batch=2, isl=20, osl=4, rounds=2))
        joins = [join for plan in llm.session.plans for join in plan.joined]
    assert len(joins) == 6 and not any(join.num_computed for join in joins)
    assert all(join.params.temperature == 0 for join in joins)


@pytest.mark.parametrize("is_tied", [False, True])
def test_weight_bytes(is_tied: bool) -> None:
    kv_size = KV_HEADS * HIDDEN // HEADS
    layer = 2 * HIDDEN + HIDDEN * (HIDDEN + 2 * kv_size) + HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    num_read = LAYERS * layer + HIDDEN + VOCAB * HIDDEN  # the head, tied or not
    assert step_weight_bytes(planned(is_tied, dtype="float32")) == 4 * num_read


def test_weight_bytes_of_ranks() -> None:
    """Shards add up to the whole; norms count for each rank that reads them."""
    whole = step_weight_bytes(planned(dtype="float32"))
    norms = 4 * (2 * LAYERS + 1) * HIDDEN
    assert step_weight_bytes(planned(dtype="float32", tp_size=2)) == whole + norms
    for is_tied in (False, True):
        assert whole == step_weight_bytes(planned(is_tied, dtype="float32", pp_size=2))


def test_kv_bytes_of_ranks() -> None:
    run = LatencyRun(batch=3, isl=10, osl=8)
    whole = step_kv_bytes(planned(), run)
    for tp_size, pp_size, times in ((2, 1, 1), (1, 2, 1), (4, 1, 2), (4, 2, 2)):
        assert step_kv_bytes(planned(tp_size=tp_size, pp_size=pp_size), run) == times * whole


def test_the_read_limit_of_ranks(open_llm: Callable[..., LLM]) -> None:
    """That of a host with all its ranks' threads, times the hosts."""
    with open_llm() as llm:
        llm.world = World(0, 8, 0, 4)
        result = measure_latency(llm, LatencyRun(isl=4, osl=3, rounds=1))
    assert result.read_gb_s == 25 * (4 * 3 - 1) * 2


def test_kv_bytes() -> None:
    a_token = 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 2  # K and V, float16
    run = LatencyRun(batch=3, isl=10, osl=7)
    assert step_kv_bytes(planned(dtype="float16"), run) == 3 * 13.5 * a_token


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch", 0, "batch is 0; it must be at least 1"),
        ("isl", 0, "isl is 0; it must be at least 1"),
        ("osl", 1, "osl is 1; it must be at least 2"),
        ("rounds", -1, "rounds is -1; it must be at least 1"),
    ],
)
def test_sizes_that_measure_nothing(name: str, value: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatencyRun(**{name: value})


def test_what_the_engine_cannot_do() -> None:
    config = planned(max_batch_size=2)
    check_run(LatencyRun(batch=2, isl=32, osl=32), config)
    with pytest.raises(ConfigError, match=r"isl 33 \+ osl 32 is 65 tokens; .* at most 64: lower"):
        check_run(LatencyRun(isl=33, osl=32), config)
    with pytest.raises(ConfigError, match="batch is 3; the engine takes at most 2 sequences: low"):
        check_run(LatencyRun(batch=3, isl=1, osl=2), config)


def test_the_read_limit_of_a_gpu(
    open_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bandwidth = pytest.importorskip("puna.runtime.cuda_bandwidth", reason="needs torch")
    asked: list[str] = []

    def measure(device_name: str, engine_dir: Path) -> float:
        assert engine_dir == tmp_path
        asked.append(device_name)
        return 4000.0

    monkeypatch.setattr(bandwidth, "gpu_read_bandwidth", measure)
    with open_llm() as llm:
        assert llm.session is not None
        monkeypatch.setattr(llm.session, "device", "cuda")
        monkeypatch.setattr(llm.session, "device_name", "cuda:1")
        result = measure_latency(llm, LatencyRun(isl=4, osl=4, rounds=2))
    assert (result.device, result.read_gb_s, asked) == ("cuda:1", 4000.0, ["cuda:1"] * 2)


def test_what_the_kv_cache_cannot_hold(open_llm: Callable[..., LLM]) -> None:
    run = LatencyRun(batch=2, isl=10, osl=7, rounds=1)  # 16 tokens each in the cache
    measure_latency(open_llm(num_blocks=9), run)
    with pytest.raises(ConfigError, match=r"has 7 blocks of 4 tokens; .* needs 8: lower them, or"):
        measure_latency(open_llm(num_blocks=8), run)


def test_sequences_that_never_decode_together(open_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match=r"osl 2 ends the first of 3 sequences .*raise osl"):
        measure_latency(open_llm(max_num_tokens=16), LatencyRun(batch=3, isl=12, osl=2))


def test_native_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    @ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_int, ctypes.c_int64, ctypes.c_int)
    def measure(threads: int, num_bytes: int, rounds: int) -> float:
        return 10.5 * threads * (num_bytes <= BUFFER_BYTES) * (rounds == 5)

    library = SimpleNamespace(puna_read_bandwidth=measure)
    monkeypatch.setattr(puna.native.bandwidth, "find_library", lambda: library)
    assert read_bandwidth(4) == 42.0 == 2 * read_bandwidth(2, 1_000_000)
    with pytest.raises(ConfigError, match="a buffer of 9,000,000,000 bytes, which the system ref"):
        read_bandwidth(4, 9_000_000_000)
    monkeypatch.setattr(puna.native.bandwidth, "find_library", lambda: None)
    monkeypatch.setattr(
        puna.native.bandwidth, "numpy_read_bandwidth", lambda threads, num_bytes: num_bytes
    )
    assert read_bandwidth(4) == BUFFER_BYTES


def test_native_and_numpy_bandwidth_agree() -> None:
    if find_library() is None:
        pytest.skip("needs the native library")
    native, numpy = read_bandwidth(1, 200_000_000), numpy_read_bandwidth(1, 200_000_000)
    assert 0.2 < native / numpy < 5, (native, numpy)


@pytest.mark.parametrize("threads", [1, 3])
def test_numpy_bandwidth(threads: int) -> None:
    found = numpy_read_bandwidth(threads, 200_000_008)
    assert 0.5 < found < 5000
