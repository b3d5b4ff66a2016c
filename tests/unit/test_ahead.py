"""Running ahead: the same tokens as without, whatever arrives, ends or is aborted meanwhile."""

from __future__ import annotations

import random

import pytest
from fake_session import (
    VOCAB_SIZE,
    generated,
    make_executor,
    one_by_one,
    random_prompt,
    run_to_end,
)

from puna.runtime.request import SamplingParams
from puna.spec import GenerationDefaults


def greedy(max_new_tokens: int, **more) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, **more)


def test_a_sequence_alone_is_always_a_step_ahead():
    executor = make_executor(runs_ahead=True)
    request = executor.add_request([1, 2, 3], greedy(20))
    events = run_to_end(executor)
    assert generated(request) == [one_by_one([1, 2, 3], greedy(20))[0]]
    assert [len(event.token_ids) for event in events] == [1] * 20
    # All steps but the first; and none is planned after the last, whose number is known.
    assert (executor.num_steps, executor.session.num_ahead) == (20, 19)


def test_an_end_token_costs_one_step_that_is_thrown_away():
    tokens, _ = one_by_one([1, 2, 3], greedy(20))
    stop = next(t for i, t in enumerate(tokens) if i > 3 and t not in tokens[:i])
    cut = tokens[: tokens.index(stop) + 1]
    executor = make_executor(
        runs_ahead=True, block_size=1, defaults=GenerationDefaults(eos_token_ids=(stop,))
    )
    request = executor.add_request([1, 2, 3], greedy(20))
    events = run_to_end(executor)
    assert generated(request) == [cut] and events[-1].finish_reason == "stop"
    pool = executor.scheduler.pool
    assert pool.num_free == pool.num_usable, "the step in flight holds no blocks"
    assert len(executor.session.plans) == executor.num_steps + 1
    # The next request is served as ever; the plan says who left.
    again = executor.add_request([1, 2, 3, 4], greedy(20, ignore_eos=True))
    assert executor.step() == [], "the step in flight was nobody's"
    run_to_end(executor)
    assert generated(again) == [one_by_one([1, 2, 3, 4], greedy(20))[0]]
    (left,) = [plan.left for plan in executor.session.plans if plan.left]
    assert left == (request.sequences[0].id,)


@pytest.mark.parametrize(
    "params", [greedy(9, repetition_penalty=1.3), greedy(9, logprobs=1), greedy(9, num_beams=2)]
)
def test_who_needs_its_tokens_here_does_not_run_ahead(params: SamplingParams):
    executor = make_executor(runs_ahead=True)
    executor.add_request([1, 2], params)
    executor.add_request([4, 5], greedy(9))
    run_to_end(executor)
    assert executor.session.num_ahead == 0


def test_logits_of_a_prompt_do_not_run_ahead():
    executor = make_executor(runs_ahead=True)
    executor.add_request([1, 2, 3, 4], want_prompt_logits=True, num_prefill=2)
    run_to_end(executor)
    assert executor.session.num_ahead == 0


def test_who_waits_joins_as_soon_as_without():
    """With room in the batch nobody is kept waiting; in a full one steps run ahead all the same."""
    for max_batch_size, joins_at in ((2, 2), (1, 9)):
        executor = make_executor(max_batch_size=max_batch_size, runs_ahead=True)
        first = executor.add_request([1, 2, 3], greedy(8))
        executor.step()
        second = executor.add_request([4, 5, 6], greedy(8))
        run_to_end(executor)
        joined = [i for i, plan in enumerate(executor.session.plans) if plan.joined]
        assert joined[0] == 0 and joined[1] in (joins_at - 1, joins_at)
        assert executor.session.num_ahead > 6
        for request in (first, second):
            assert generated(request) == [one_by_one(request.prompt_token_ids, greedy(8))[0]]


def test_who_forks_joins_as_soon_as_without():
    executor = make_executor(runs_ahead=True)
    request = executor.add_request([1, 2, 3, 4, 5], greedy(5, n=4))
    run_to_end(executor)
    assert generated(request) == [one_by_one([1, 2, 3, 4, 5], greedy(5))[0]] * 4
    assert (executor.num_steps, executor.session.num_ahead) == (6, 3)


def test_nobody_is_preempted_ahead():
    """Two sequences and blocks for little more than one of them."""
    executor = make_executor(num_blocks=1 + 14, block_size=2, prefix_cache=False, runs_ahead=True)
    requests = [executor.add_request([i, 2, 3], greedy(24)) for i in range(2)]
    run_to_end(executor)
    assert executor.num_preemptions > 0 and executor.session.num_ahead > 10
    for request in requests:
        assert generated(request) == [one_by_one(request.prompt_token_ids, greedy(24))[0]]


def test_an_abort_waits_for_both_steps_and_keeps_what_they_brought_to_others():
    executor = make_executor(runs_ahead=True)
    first = executor.add_request([1, 2, 3], greedy(12))
    second = executor.add_request([4, 5, 6], greedy(12))
    events = executor.step()
    executor.abort(first)
    events += run_to_end(executor)
    tokens, _ = one_by_one([4, 5, 6], greedy(12))
    assert generated(second) == [tokens]
    mine = [t for e in events if e.sequence.request is second for t in e.token_ids]
    assert mine == tokens
    assert first.sequences[0].finish_reason == "abort"


def test_a_failed_step_ends_both():
    executor = make_executor(runs_ahead=True)
    executor.add_request([1, 2, 3], greedy(12))
    executor.step()
    executor.session.fail_at = 3
    with pytest.raises(RuntimeError, match="on fire"):
        executor.step()
    assert executor.is_idle
    again = executor.add_request([1, 2, 3], greedy(12))
    run_to_end(executor)
    assert generated(again) == [one_by_one([1, 2, 3], greedy(12))[0]]


@pytest.mark.parametrize("chunk", range(4))
def test_random_scenarios(chunk: int):
    """Many small worlds with arrivals, ends, aborts, forks and preemptions."""
    num_ahead = num_thrown = num_preemptions = num_cached = num_aborted = 0
    for world in range(80):
        rng = random.Random(1000 * chunk + world)
        block_size = rng.choice([1, 2, 3, 4, 8])
        max_batch_size = rng.choice([1, 2, 3, 8])
        eos = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 1, 3]))]
        longest_prompt, longest_new = rng.choice([(6, 20), (20, 6), (24, 24)])
        need = -(-(longest_prompt + longest_new) // block_size)
        executor = make_executor(
            num_blocks=1 + need + rng.choice([0, 1, need, 8 * need]),
            block_size=block_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max_batch_size + rng.choice([0, 1, 5, 40]),
            max_chunk=rng.choice([None, 1, 3, 7]),
            prefix_cache=rng.random() < 0.7,
            defaults=GenerationDefaults(eos_token_ids=tuple(eos)),
            runs_ahead=True,
        )
        prefix = random_prompt(rng, 0, longest_prompt - 1)
        requests = []
        to_come = rng.randint(1, 10)
        while to_come or not executor.is_idle:
            while to_come and rng.random() < 0.2:
                to_come -= 1
                prompt = prefix[: rng.randint(0, len(prefix))]
                prompt += random_prompt(rng, 1, longest_prompt - len(prompt))
                params = SamplingParams(
                    max_new_tokens=rng.randint(1, longest_new),
                    n=rng.choice([1, 1, 1, 2, 4]),
                    ignore_eos=rng.random() < 0.2,
                    seed=rng.randrange(2**64),
                    temperature=1.5 if rng.random() < 0.3 else 0.0,
                    repetition_penalty=rng.choice([1.0] * 9 + [1.3]),
                )
                requests.append(executor.add_request(prompt, params))
            if requests and rng.random() < 0.03:
                executor.abort(rng.choice(requests))
            if requests and rng.random() < 0.03:
                executor.abort_sequence(rng.choice(rng.choice(requests).sequences))
            executor.step()
            executor.scheduler.check()
        for request in requests:
            for seq in request.sequences:
                stream = seq.index if request.params.temperature else 0
                tokens, reason = one_by_one(
                    request.prompt_token_ids, request.params, eos=eos, stream=stream
                )
                if seq.finish_reason == "abort":
                    num_aborted += 1
                    assert seq.generated_token_ids == tokens[: len(seq.generated_token_ids)]
                else:
                    assert (seq.generated_token_ids, seq.finish_reason) == (tokens, reason)
        assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_usable
        session, plans = executor.session, executor.session.plans
        num_ahead += session.num_ahead
        num_thrown += len(plans) > executor.num_steps
        num_preemptions += executor.scheduler.num_preemptions
        num_cached += sum(join.num_computed > 0 for plan in plans for join in plan.joined)
    # The worlds are worth something only if these happen in them.
    assert num_ahead > 1000 and num_thrown > 0
    assert num_preemptions > 10 and num_cached > 50 and num_aborted > 20
