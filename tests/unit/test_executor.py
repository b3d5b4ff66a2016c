"""The executor with a fake session: output never depends on company, memory, chunks or cache."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from fake_session import (
    VOCAB_SIZE,
    FakeSession,
    fake_logits,
    generated,
    make_executor,
    one_by_one,
    random_prompt,
    run_to_end,
)

from puna.errors import RequestError
from puna.runtime.block_pool import BlockPool
from puna.runtime.executor import Executor
from puna.runtime.request import SamplingParams
from puna.runtime.scheduler import Scheduler
from puna.runtime.step import StepPlan, StepResult
from puna.spec import GenerationDefaults


def test_one_request():
    executor = make_executor()
    params = SamplingParams(max_new_tokens=10)
    request = executor.add_request([1, 2, 3], params)
    events = run_to_end(executor)
    assert generated(request)[0] == one_by_one([1, 2, 3], params)[0]
    assert [event.finish_reason for event in events] == [None] * 9 + ["length"]
    assert executor.num_steps == 10


def test_end_tokens():
    tokens, _ = one_by_one([1, 2, 3], SamplingParams(max_new_tokens=20))
    stop = next(t for i, t in enumerate(tokens) if i > 3 and t not in tokens[:i])
    cut = tokens[: tokens.index(stop) + 1]
    executor = make_executor(defaults=GenerationDefaults(eos_token_ids=(stop,)))
    by_eos = executor.add_request([1, 2, 3], SamplingParams(max_new_tokens=20))
    ignored = executor.add_request([1, 2, 3], SamplingParams(max_new_tokens=20, ignore_eos=True))
    by_id = executor.add_request(
        [1, 2, 3], SamplingParams(max_new_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    )
    run_to_end(executor)
    assert generated(by_eos) == [cut] == generated(by_id)
    assert by_eos.sequences[0].finish_reason == by_id.sequences[0].finish_reason == "stop"
    assert generated(ignored) == [tokens]
    assert ignored.sequences[0].finish_reason == "length"


@pytest.mark.parametrize("chunk", range(4))
def test_random_scenarios(chunk: int):
    """Many small worlds, each compared with the plain loop; blocks are checked after each step."""
    num_preemptions = num_cached = num_copies = 0
    for world in range(100):
        rng = random.Random(1000 * chunk + world)
        block_size = rng.choice([1, 2, 3, 4, 8])
        max_batch_size = rng.choice([1, 2, 3, 8])
        eos = [rng.randrange(VOCAB_SIZE)] if rng.random() < 0.5 else []
        longest_prompt, longest_new = rng.choice([(6, 20), (20, 6), (24, 24)])
        need = -(-(longest_prompt + longest_new) // block_size)
        executor = make_executor(
            num_blocks=1 + need + rng.choice([0, 1, need, 8 * need]),
            block_size=block_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max_batch_size + rng.choice([0, 1, 5, 40]),
            max_chunk=rng.choice([None, 1, 3, 7]),
            prefix_cache=rng.random() < 0.7,
            max_seq_len=rng.choice([48, 64]),
            defaults=GenerationDefaults(eos_token_ids=tuple(eos)),
        )
        prefix = random_prompt(rng, 0, longest_prompt - 1)
        requests, aborted = [], set()
        to_come = rng.randint(1, 10)
        while to_come or not executor.is_idle:
            while to_come and rng.random() < 0.4:
                to_come -= 1
                prompt = prefix[: rng.randint(0, len(prefix))]
                prompt += random_prompt(rng, 1, longest_prompt - len(prompt))
                is_random = rng.random() < 0.3
                params = SamplingParams(
                    max_new_tokens=rng.randint(1, longest_new),
                    n=rng.choice([1, 1, 1, 2, 4]),
                    ignore_eos=rng.random() < 0.3,
                    seed=rng.randrange(2**64),
                    temperature=1.5 if is_random else 0.0,
                    repetition_penalty=rng.choice([1.0, 1.3]),
                    frequency_penalty=rng.choice([0.0, 0.5]),
                    top_p=rng.choice([1.0, 0.9]),
                )
                requests.append(executor.add_request(prompt, params))
            if requests and rng.random() < 0.03:
                request = rng.choice(requests)
                executor.abort(request)
                aborted.add(request.id)
            if requests and rng.random() < 0.03:
                request = rng.choice(requests)
                executor.abort_sequence(rng.choice(request.sequences))
                aborted.add(request.id)
            executor.step()
            executor.scheduler.check()
        max_seq_len = executor.scheduler.admission.max_seq_len
        for request in requests:
            for seq in request.sequences:
                stream = seq.index if request.params.temperature else 0
                tokens, reason = one_by_one(
                    request.prompt_token_ids, request.params, max_seq_len, eos, stream
                )
                if seq.finish_reason == "abort":
                    assert request.id in aborted
                    assert seq.generated_token_ids == tokens[: len(seq.generated_token_ids)]
                else:
                    assert (seq.generated_token_ids, seq.finish_reason) == (tokens, reason)
        assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_usable
        num_preemptions += executor.scheduler.num_preemptions
        plans = executor.session.plans
        num_copies += sum(len(plan.copies) for plan in plans)
        num_cached += sum(join.num_computed > 0 for plan in plans for join in plan.joined)
    # The worlds are worth something only if these happen in them.
    assert num_preemptions > 10
    assert num_copies > 30
    assert num_cached > 100


def test_n_shares_the_prompt():
    """Four continuations compute the prompt once, also without the prefix cache."""
    executor = make_executor(prefix_cache=False)
    prompt = list(range(1, 11))
    request = executor.add_request(prompt, SamplingParams(max_new_tokens=5, n=4))
    run_to_end(executor)
    alone, _ = one_by_one(prompt, SamplingParams(max_new_tokens=5))
    assert generated(request) == [alone] * 4
    prefilled = sum(n for plan in executor.session.plans for _, n in plan.prefills)
    assert prefilled == len(prompt) + 3
    assert executor.num_steps == 6


def test_n_more_than_the_batch():
    executor = make_executor(max_batch_size=2)
    request = executor.add_request([1, 2, 3], SamplingParams(max_new_tokens=5, n=7))
    run_to_end(executor)
    assert generated(request) == [one_by_one([1, 2, 3], SamplingParams(max_new_tokens=5))[0]] * 7


def test_samples_of_one_request_differ_and_repeat():
    def run() -> list[list[int]]:
        executor = make_executor()
        params = SamplingParams(max_new_tokens=12, n=4, temperature=2.0, seed=7)
        request = executor.add_request([1, 2, 3], params)
        run_to_end(executor)
        return generated(request)

    first = run()
    assert first == run()
    assert len({tuple(tokens) for tokens in first}) == 4


def test_no_seed_draws_one():
    executor = make_executor()
    params = SamplingParams(max_new_tokens=12, temperature=2.0)
    a, b = executor.add_request([1], params), executor.add_request([1], params)
    run_to_end(executor)
    assert generated(a) != generated(b)


@pytest.mark.parametrize("num_prefill", [None, 1, 4, 9, 10])
@pytest.mark.parametrize("max_num_tokens", [8, 64])
def test_prompt_logits(num_prefill: int | None, max_num_tokens: int):
    executor = make_executor(max_num_tokens=max_num_tokens)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    other = executor.add_request(prompt, SamplingParams(max_new_tokens=20))
    run_to_end(executor)  # fills the prefix cache, which must not be used now
    other = executor.add_request([1, 2], SamplingParams(max_new_tokens=20))
    request = executor.add_request(prompt, want_prompt_logits=True, num_prefill=num_prefill)
    rows = {}
    num_chunks = 0
    for event in run_to_end(executor):
        if event.prompt_logits is not None:
            assert event.sequence.request is request
            start, logits = event.prompt_logits
            num_chunks += 1
            rows |= {start + i: row for i, row in enumerate(logits)}
    assert generated(request) == [[]]
    assert request.sequences[0].finish_reason == "length"
    np.testing.assert_array_equal(
        [rows[i] for i in range(10)], [fake_logits(prompt[: i + 1]) for i in range(10)]
    )
    assert generated(other)[0] == one_by_one([1, 2], SamplingParams(max_new_tokens=20))[0]
    if max_num_tokens == 64:
        assert num_chunks == 1 + 10 - (num_prefill or 10)


def test_prompt_logits_of_a_full_context():
    executor = make_executor(max_seq_len=16)
    executor.add_request([1] * 16, want_prompt_logits=True)
    assert len(run_to_end(executor)[0].prompt_logits[1]) == 16


def test_logprobs_in_the_order_of_joining():
    executor = make_executor()
    params = SamplingParams(max_new_tokens=3, logprobs=2)
    plain = executor.add_request([5], SamplingParams(max_new_tokens=3))
    asked = executor.add_request([6], params)
    for event in run_to_end(executor):
        if event.sequence.request is plain:
            assert event.logprobs == ()
            continue
        assert event.sequence.request is asked
        (logprob,) = event.logprobs
        assert logprob.token_id == event.token_ids[0] == logprob.top_token_ids[0]
        assert logprob.logprob == logprob.top_logprobs[0] > logprob.top_logprobs[1]


@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_a_failing_step_aborts_all_and_leaves_the_executor_usable(fail_at: int):
    executor = make_executor()
    executor.session.fail_at = fail_at
    params = SamplingParams(max_new_tokens=30)
    requests = [executor.add_request([i, 2, 3], params) for i in range(12)]
    requests.append(executor.add_request([9], SamplingParams(n=3)))
    with pytest.raises(RuntimeError, match="on fire"):
        run_to_end(executor)
    assert executor.is_idle
    assert executor.step() == []
    assert all(s.finish_reason == "abort" for r in requests for s in r.sequences)
    again = executor.add_request([1, 2, 3], params)
    run_to_end(executor)
    assert generated(again) == [one_by_one([1, 2, 3], params)[0]]


def test_interrupt_in_collect():
    executor = make_executor()
    collect = executor.session.collect

    def interrupted(lane: int = 0) -> StepResult:
        executor.session.collect = collect
        raise KeyboardInterrupt

    executor.session.collect = interrupted
    executor.add_request([1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        executor.step()
    request = executor.add_request([4, 5], SamplingParams(max_new_tokens=4))
    run_to_end(executor)
    assert generated(request) == [one_by_one([4, 5], SamplingParams(max_new_tokens=4))[0]]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([1] * 65, {}, "65 tokens; the engine takes at most 64"),
        ([1] * 64, {}, "no room for a new token"),
        ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE}; the vocabulary is 0 to {VOCAB_SIZE - 1}"),
        ([-1], {}, "token id -1"),
        ([1.5], {}, "token ids, which are whole numbers"),
        (["a"], {}, "token ids, which are whole numbers"),
        ([True], {}, "token ids, which are whole numbers"),
        ([1] * 30, {"max_new_tokens": 12}, "do not fit the KV cache of 40 tokens"),
        ([1] * 41, {"max_new_tokens": None}, "do not fit the KV cache of 40 tokens"),
    ],
)
def test_refused_requests(prompt, params, message):
    executor = make_executor(num_blocks=11, block_size=4)
    with pytest.raises(RequestError, match=message) as caught:
        executor.add_request(prompt, SamplingParams(**params))
    assert "\n" not in str(caught.value)
    assert executor.is_idle


def test_what_just_fits():
    executor = make_executor(num_blocks=11, block_size=4)
    a = executor.add_request([1] * 30, SamplingParams(max_new_tokens=11))
    b = executor.add_request([1] * 30, SamplingParams(max_new_tokens=None))
    c = executor.add_request([1] * 40, SamplingParams(max_new_tokens=None))
    run_to_end(executor)
    assert [len(generated(r)[0]) for r in (a, b, c)] == [11, 11, 1]


def test_new_tokens_are_clipped_to_the_context():
    executor = make_executor(max_seq_len=16)
    request = executor.add_request(np.arange(10), SamplingParams(max_new_tokens=100))
    run_to_end(executor)
    assert len(generated(request)[0]) == 6
    assert request.sequences[0].finish_reason == "length"


class _CountingSession:
    """Answers without a model, so that only planning takes time."""

    num_seqs = 0

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        self.num_seqs += len(plan.joined) - len(plan.left)

    def collect(self, lane: int = 0) -> StepResult:
        return StepResult(token_ids=(1,) * self.num_seqs)

    def can_run_ahead(self, params: SamplingParams) -> bool:
        return False


def test_planning_is_cheap():
    """1,024 decoding sequences: plan and commit take about a millisecond on a quiet machine."""
    size = 1024
    scheduler = Scheduler(BlockPool(32 * size, 16), size, 32 * size, 512, VOCAB_SIZE)
    executor = Executor(_CountingSession(), scheduler)
    for i in range(size):
        executor.add_request([i % VOCAB_SIZE] * (1 + i % 30), SamplingParams(max_new_tokens=400))
    executor.step()
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        executor.step()
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[30] < 0.010, f"median {sorted(seconds)[30] * 1e3:.2f} ms"


def test_lowering_is_cheap():
    """1,024 decoding sequences: lowering takes well under 3 ms on a quiet machine."""
    size = 1024
    session = FakeSession(32 * size, 16, size, 512, 32 * size)
    scheduler = Scheduler(BlockPool(32 * size, 16), size, 32 * size, 512, VOCAB_SIZE)
    seconds = []

    class Lowers(_CountingSession):
        def submit(self, plan: StepPlan, lane: int = 0) -> None:
            super().submit(plan)
            start = time.perf_counter()
            session.lowering.lower(plan)
            seconds.append(time.perf_counter() - start)

    executor = Executor(Lowers(), scheduler)
    for i in range(size):
        executor.add_request([i % VOCAB_SIZE] * (1 + i % 30), SamplingParams(max_new_tokens=400))
    for _ in range(61):
        executor.step()
    assert sorted(seconds)[30] < 0.015, f"median {sorted(seconds)[30] * 1e3:.2f} ms"
