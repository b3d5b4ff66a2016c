"""Beam search with a fake session, against a search over whole sequences that knows no cache."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from fake_session import (
    VOCAB_SIZE,
    fake_logits,
    generated,
    make_executor,
    one_by_one,
    random_prompt,
    run_to_end,
)

from puna.errors import RequestError
from puna.ops.sampling import log_softmax
from puna.runtime.request import Request, SamplingParams
from puna.spec import GenerationDefaults

Found = list[tuple[list[int], float]]


def plain_search(
    prompt: list[int], params: SamplingParams, eos: set[int], max_seq_len: int = 64
) -> Found:
    """transformers' beam search over arrays of all V continuations; returns (tokens, score)."""
    width, power = params.num_beams, params.length_penalty
    ends = set() if params.ignore_eos else set(eos)
    room = max_seq_len - len(prompt)
    room = room if params.max_new_tokens is None else min(room, params.max_new_tokens)
    running: Found = [([], 0.0)]
    finished: Found = []
    for length in range(1, room + 1):
        rows = []
        for tokens, score in running:
            logprobs = log_softmax(fake_logits([*prompt, *tokens])[None])[0].astype(np.float64)
            if params.repetition_penalty not in (None, 1.0):
                logprobs[sorted({*prompt, *tokens})] *= params.repetition_penalty
            rows.append(score + logprobs)
        flat = np.concatenate(rows)
        top = np.argsort(-flat, kind="stable")[: width * max(2, 1 + len(ends))]
        hits, others = [], []
        for rank, i in enumerate(top.tolist()):
            tokens = [*running[i // VOCAB_SIZE][0], i % VOCAB_SIZE]
            if length == room or tokens[-1] in ends:
                hits += [(tokens, flat[i] / length**power)] if rank < width else []
            else:
                others.append((tokens, float(flat[i])))
        finished = sorted(finished + hits, key=lambda pair: -pair[1])[:width]
        running = others[:width]
        if len(finished) < width or length == room:
            continue
        ahead = room if params.early_stopping == "never" and power > 0 else length
        if params.early_stopping is True or running[0][1] / ahead**power <= finished[-1][1]:
            break
    return finished


def check_beams(request: Request, scores: dict[int, float], expected: Found) -> None:
    n = request.params.n
    assert generated(request)[:n] == [tokens for tokens, _ in expected[:n]]
    assert [scores[i] for i in range(n)] == pytest.approx([s for _, s in expected[:n]], abs=1e-4)


def random_params(rng: random.Random, longest: int, most_beams: int) -> SamplingParams:
    num_beams = rng.randint(2, most_beams)
    return SamplingParams(
        max_new_tokens=rng.randint(1, longest),
        num_beams=num_beams,
        n=rng.randint(1, num_beams),
        length_penalty=rng.choice([1.0, 0.0, 2.0, -1.0, 0.5]),
        early_stopping=rng.choice([False, True, "never"]),
        ignore_eos=rng.random() < 0.2,
        repetition_penalty=rng.choice([None, None, 1.3]),
    )


@pytest.mark.parametrize("chunk", range(3))
def test_random_worlds(chunk: int):
    """Beams among greedy and sampled requests, with few blocks, chunks and the prefix cache."""
    num_preemptions = num_resumed = num_copies = num_stopped = 0
    for world in range(120):
        rng = random.Random(1000 * chunk + world)
        block_size = rng.choice([1, 2, 3, 4, 8])
        batch = rng.choice([2, 4, 6])
        eos = set(rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 1, 2])))
        longest_prompt, longest_new = rng.choice([(6, 14), (14, 6)])
        # What the largest request of one sequence needs: many beams are refused, others give way.
        need = -(-(longest_prompt + longest_new) // block_size)
        executor = make_executor(
            num_blocks=1 + need + rng.choice([0, need // 2, need]),
            block_size=block_size,
            max_batch_size=batch,
            max_num_tokens=batch + rng.choice([0, 1, 5, 40]),
            max_chunk=rng.choice([None, 1, 3]),
            prefix_cache=rng.random() < 0.6,
            defaults=GenerationDefaults(eos_token_ids=tuple(eos)),
        )
        prefix = random_prompt(rng, 0, longest_prompt - 1)
        requests, scores, aborted = [], {}, set()
        to_come = rng.randint(3, 8)
        while to_come or not executor.is_idle:
            while to_come and rng.random() < 0.8:
                to_come -= 1
                prompt = prefix[: rng.randint(0, len(prefix))]
                prompt += random_prompt(rng, 1, longest_prompt - len(prompt))
                params = SamplingParams(
                    max_new_tokens=rng.randint(1, longest_new),
                    temperature=rng.choice([0.0, 1.0]),
                    seed=rng.randrange(2**64),
                )
                if rng.random() < 0.6:
                    params = random_params(rng, longest_new, min(batch, 4))
                try:
                    requests.append(executor.add_request(prompt, params))
                except RequestError as error:
                    if "do not fit the KV cache" not in str(error):
                        raise
            if requests and rng.random() < 0.02:
                request = rng.choice(requests)
                executor.abort_sequence(rng.choice(request.sequences))
                aborted.add(request.id)
            for event in executor.step():
                if event.score is not None:
                    found = scores.setdefault(event.sequence.request.id, {})
                    found[event.sequence.index] = event.score
            executor.scheduler.check()
        for request in requests:
            prompt = list(request.prompt_token_ids)
            first = request.sequences[0]
            if first.finish_reason == "abort":
                assert request.id in aborted
            elif request.params.num_beams == 1:
                assert generated(request) == [one_by_one(prompt, request.params, eos=list(eos))[0]]
            else:
                check_beams(request, scores[request.id], plain_search(prompt, request.params, eos))
                num_stopped += first.finish_reason == "stop"
        pool = executor.scheduler.pool
        assert pool.num_free == pool.num_usable
        num_preemptions += executor.scheduler.num_preemptions
        for plan in executor.session.plans:
            num_copies += len(plan.copies)
            num_resumed += sum(
                join.num_candidates > 0 and len(join.token_ids) > join.num_prompt
                for join in plan.joined
            )
    assert num_preemptions > 5 and num_resumed > 5 and num_copies > 50 and num_stopped > 5, (
        num_preemptions, num_resumed, num_copies, num_stopped,
    )  # fmt: skip


def test_beams_share_their_prompt_and_return_the_best_n():
    executor = make_executor(prefix_cache=False)
    prompt = list(range(1, 11))
    params = SamplingParams(max_new_tokens=5, num_beams=4, n=2)
    request = executor.add_request(prompt, params)
    events = run_to_end(executor)
    check_beams(
        request,
        {e.sequence.index: e.score for e in events if e.score is not None},
        plain_search(prompt, params, set()),
    )
    assert len(events) == 2 and events[0].score > events[1].score
    plans = executor.session.plans
    assert sum(n for plan in plans for _, n in plan.prefills) == len(prompt)
    assert executor.num_steps == 5


def test_a_failing_step_leaves_the_executor_usable():
    executor = make_executor()
    executor.session.fail_at = 3
    params = SamplingParams(max_new_tokens=6, num_beams=3, n=3)
    first = executor.add_request([1, 2, 3], params)
    executor.add_request([4] * 9, SamplingParams(num_beams=8, max_new_tokens=6))
    with pytest.raises(RuntimeError, match="on fire"):
        run_to_end(executor)
    assert all(seq.finish_reason == "abort" for seq in first.sequences)
    again = executor.add_request([1, 2, 3], params)
    run_to_end(executor)
    assert generated(again) == [t for t, _ in plain_search([1, 2, 3], params, set())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "lower n or raise num_beams"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature is 0.5"),
        ({"num_beams": 2, "top_k": 5}, "top_k"),
        ({"num_beams": 2, "top_p": 0.9}, "top_p"),
        ({"num_beams": 2, "min_p": 0.1}, "min_p"),
        ({"num_beams": 2, "presence_penalty": 1.0}, "presence_penalty"),
        ({"num_beams": 2, "frequency_penalty": 1.0}, "frequency_penalty"),
        ({"num_beams": 2, "stop": "a"}, "stop"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping"),
        ({"num_beams": 2, "early_stopping": "always"}, "True, False or 'never'"),
        ({"length_penalty": 2.0}, "without beams"),
        ({"early_stopping": True}, "without beams"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**options)
    assert "\n" not in str(caught.value)


def test_the_engines_sampling_defaults_are_not_for_beams():
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    params = SamplingParams(num_beams=2).resolve(defaults)
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.0, 1.0, 1.1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(num_beams=5, max_new_tokens=2), "at most 4 sequences at once"),
        (SamplingParams(num_beams=100, max_new_tokens=2), "at most 4 sequences at once"),
        (
            SamplingParams(num_beams=4, max_new_tokens=2, stop_token_ids=tuple(range(8))),
            "need 36 candidates",
        ),
        (SamplingParams(num_beams=4, max_new_tokens=20), "for each of 4 beams"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(params, message):
    executor = make_executor(num_blocks=12, max_batch_size=4)
    with pytest.raises(RequestError, match=message):
        executor.add_request([1, 2, 3], params)
    assert executor.is_idle
