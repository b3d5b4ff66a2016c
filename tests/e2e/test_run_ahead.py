"""A real session that runs ahead, as on a GPU, against one that does not: the same text.

The runner is the host's behind one that knows last tokens by itself, and answers late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import puna.runtime.session
from puna import LLM, SamplingParams
from puna.engine import RankMemory
from puna.ops.sampling import SampleResult
from puna.quant import Array
from puna.runtime.host_runner import open_host_runner
from puna.runtime.lower import LoweredStep
from puna.runtime.runner import Opening, Runner

PROMPTS = ["Hello", "the quick brown fox", "a", "Hello there, all of you", "12", "lazy dogs"]


class LateRunner:
    """Lets a step run ahead of the one before, whose tokens it finds itself."""

    def __init__(self, inner: Runner, num_rows: int) -> None:
        self.inner = inner
        self.threads, self.device_name = inner.threads, inner.device_name
        self.num_ahead = 0
        self._last_token_R = np.full(num_rows, -1, np.int32)
        self._results: deque[tuple[LoweredStep, SampleResult, Array]] = deque()

    @property
    def memory(self) -> RankMemory:
        return self.inner.memory

    def can_run_ahead(self, params: SamplingParams) -> bool:
        return not params.has_penalties and params.logprobs is None and params.num_beams == 1

    def start(self, step: LoweredStep, lane: int) -> None:
        self.num_ahead += len(self._results)
        assert len(self._results) < 2
        token_ids_T = step.batch.token_ids_T.copy()
        is_unknown_T = token_ids_T < 0
        token_ids_T[is_unknown_T] = self._last_token_R[-1 - token_ids_T[is_unknown_T]]
        assert (token_ids_T >= 0).all()
        known = replace(step, batch=replace(step.batch, token_ids_T=token_ids_T))
        self.inner.start(known, lane)
        sampled, logits_LV = self.inner.finish(known, lane)
        self._last_token_R[step.rows] = sampled.token_ids_L
        self._results.append((step, sampled, logits_LV))

    def finish(self, step: LoweredStep, lane: int) -> tuple[SampleResult, Array]:
        mine, sampled, logits_LV = self._results.popleft()
        assert mine is step
        return sampled, logits_LV

    def discard(self, lane: int) -> None:
        self._results.clear()

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateRunner]:
    """Sessions opened from now on run ahead; the list has their runners."""
    opened: list[LateRunner] = []

    def open_late(opening: Opening) -> LateRunner:
        runner = LateRunner(open_host_runner(opening), opening.config.limits.max_batch_size)
        opened.append(runner)
        return runner

    monkeypatch.setattr(puna.runtime.session, "open_host_runner", open_late)
    return opened


def params() -> list[SamplingParams]:
    plain = SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)
    return [
        plain,
        replace(plain, max_new_tokens=7),
        replace(plain, temperature=0.9, seed=3, n=3),
        replace(plain, max_new_tokens=40),
        replace(plain, temperature=1.2, seed=4, ignore_eos=False),
        replace(plain, max_new_tokens=1),
    ]


def answers(llm: LLM, sampling: list[SamplingParams]) -> list[tuple[str, tuple[int, ...], str]]:
    return [
        (part.text, part.token_ids, part.finish_reason)
        for output in llm.generate(PROMPTS, sampling)
        for part in output.completions
    ]


def with_stops(llm: LLM) -> list[SamplingParams]:
    """Stop strings that occur, and an end token that does, both found in what is generated."""
    sampling = params()
    outputs = llm.generate(PROMPTS, sampling)
    text = outputs[0].text
    sampling[0] = replace(sampling[0], stop=(text[len(text) // 2 : len(text) // 2 + 2],))
    sampling[3] = replace(sampling[3], stop_token_ids=(outputs[3].token_ids[9],))
    return sampling


def both(
    engine: Path, late: list[LateRunner], ask: Callable[[LLM], object], **options: int
) -> tuple[object, object]:
    with LLM(engine, device="reference", **options) as llm:
        ahead = ask(llm)
        assert late[-1].num_ahead > 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puna.runtime.session, "open_host_runner", open_host_runner)
        with LLM(engine, device="reference", **options) as llm:
            return ahead, ask(llm)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_generate(batch: int, engine: Path, late: list[LateRunner]) -> None:
    def ask(llm: LLM) -> object:
        sampling = with_stops(llm)
        found = answers(llm, sampling)
        reasons = [reason for _, _, reason in found]
        assert reasons.count("stop") >= 2 and reasons.count("length") >= 2
        return found, answers(llm, sampling), llm.logits([1, 2, 3, 4, 5], num_prefill=2).tolist()

    ahead, without = both(engine, late, ask, max_batch_size=batch)
    assert ahead == without


def test_streams_beside_each_other(engine: Path, late: list[LateRunner]) -> None:
    """Two streams read in turn, a third that is closed early, and a request between."""

    def ask(llm: LLM) -> object:
        sampling = params()
        streams = [llm.stream(PROMPTS[i], sampling[i]) for i in (0, 3)]
        dropped = llm.stream(PROMPTS[2], sampling[0])
        texts = ["", ""]
        for i in range(3):
            next(dropped)
            for k, stream in enumerate(streams):
                texts[k] += next(stream).text
            if i == 1:
                texts.append(llm.generate(PROMPTS[1], sampling[1]).pop().text)
        dropped.close()  # type: ignore[attr-defined]
        for k, stream in enumerate(streams):
            texts[k] += "".join(delta.text for delta in stream)
        assert llm.executor.is_idle
        return texts

    ahead, without = both(engine, late, ask)
    assert ahead == without
