"""Several batches under way at once, as pipeline stages need them: the executor over a fake session
with lanes, against sequences computed one by one."""

from __future__ import annotations

import random

import pytest
from fake_session import VOCAB_SIZE, FakeSession, generated, one_by_one, random_prompt
from test_beam import check_beams, plain_search, random_params

from puna.runtime.block_pool import BlockPool
from puna.runtime.executor import Executor
from puna.runtime.request import Request, SamplingParams, SequenceEvent
from puna.runtime.scheduler import Scheduler
from puna.runtime.step import StepPlan, StepResult


class LaneSession:
    """One fake session a lane, over one KV cache; remembers how many steps were under way."""

    def __init__(self, num_lanes: int, num_blocks: int, block_size: int, max_batch_size: int):
        self.num_lanes = num_lanes
        self.lanes = [FakeSession(num_blocks, block_size, max_batch_size) for _ in range(num_lanes)]
        for lane in self.lanes:
            lane.kv_NP = self.lanes[0].kv_NP
        self.under_way: list[int] = []
        self.counts: list[int] = []

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        assert lane not in self.under_way, "two steps of a lane"
        self.under_way.append(lane)
        self.counts.append(len(self.under_way))
        self.lanes[lane].submit(plan)

    def collect(self, lane: int = 0) -> StepResult:
        assert self.under_way[0] == lane, "collected out of order"
        self.under_way.pop(0)
        return self.lanes[lane].collect()

    def can_run_ahead(self, params: SamplingParams) -> bool:
        return False


def make(
    num_lanes: int, num_blocks: int = 64, batch: int = 4, max_beams: int = 5
) -> tuple[Executor, LaneSession]:
    session = LaneSession(num_lanes, num_blocks, 4, max(batch, max_beams))
    pool = BlockPool(num_blocks, 4)
    lanes = [
        Scheduler(pool, batch, 64, 64, VOCAB_SIZE, max_beams=max_beams) for _ in range(num_lanes)
    ]
    return Executor(session, lanes), session


def run(executor: Executor) -> list[SequenceEvent]:
    events = []
    while not executor.is_idle:
        events += executor.step()
        executor._check()
    return events


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 4])
def test_every_lane_has_a_step_under_way(num_lanes: int) -> None:
    executor, session = make(num_lanes)
    params = SamplingParams(max_new_tokens=10, temperature=0.0)
    requests = [executor.add_request([i, i + 1, i + 2], params) for i in range(2 * num_lanes)]
    assert {request.lane for request in requests} == set(range(num_lanes))
    run(executor)
    for request in requests:
        assert generated(request) == [one_by_one(request.prompt_token_ids, params)[0]]
    # Ten steps a lane; but for the first and the last rounds all lanes are at work.
    assert len(session.counts) == 10 * num_lanes
    assert session.counts.count(num_lanes) >= 9 * num_lanes + 1


@pytest.mark.parametrize("seed", range(12))
def test_random_requests_in_little_memory(seed: int) -> None:
    rng = random.Random(seed)
    executor, _ = make(rng.choice((2, 3, 4)), num_blocks=rng.randint(12, 20), batch=3)
    requests, params = [], {}
    for _ in range(25):
        for _ in range(rng.randint(0, 3)):
            chosen = SamplingParams(
                max_new_tokens=rng.randint(1, 20),
                temperature=rng.choice((0.0, 1.0)),
                seed=rng.randrange(100),
            )
            request = executor.add_request(random_prompt(rng, 1, 20), chosen)
            requests.append(request)
            params[request.id] = chosen
        executor.step()
        executor._check()
    run(executor)
    for request in requests:
        expected = one_by_one(request.prompt_token_ids, params[request.id])
        assert generated(request) == [expected[0]]
    assert executor.pool.num_free == executor.pool.num_usable


@pytest.mark.parametrize("seed", range(8))
def test_beams_in_little_memory(seed: int) -> None:
    """Up to five beams in batches of three: those that are more than a batch run alone."""
    rng = random.Random(seed)
    executor, session = make(rng.choice((2, 3, 4)), num_blocks=rng.randint(18, 26), batch=3)
    requests: list[Request] = []
    scores: dict[int, dict[int, float]] = {}
    to_come = 25
    while to_come or not executor.is_idle:
        for _ in range(min(to_come, rng.randint(0, 3))):
            to_come -= 1
            params = SamplingParams(max_new_tokens=rng.randint(1, 20), temperature=0.0)
            if rng.random() < 0.6:
                params = random_params(rng, longest=8, most_beams=5)
            requests.append(executor.add_request(random_prompt(rng, 1, 12), params))
        for event in executor.step():
            if event.score is not None:
                found = scores.setdefault(event.sequence.request.id, {})
                found[event.sequence.index] = event.score
        executor._check()
    for request in requests:
        prompt = list(request.prompt_token_ids)
        if request.params.num_beams == 1:
            assert generated(request) == [one_by_one(prompt, request.params)[0]]
        else:
            expected = plain_search(prompt, request.params, set())
            check_beams(request, scores[request.id], expected)
    assert executor.pool.num_free == executor.pool.num_usable
    # A lane joins beams that are too many only where nothing else runs, and nothing joins them.
    joined = [plan.joined for lane in session.lanes for plan in lane.plans]
    assert any(len(joins) > 3 for joins in joined)
    assert all(len({join.params for join in joins}) == 1 for joins in joined if len(joins) > 3)


def test_lanes_take_blocks_from_each_other() -> None:
    executor, _ = make(2, num_blocks=13)  # 48 tokens: two sequences of 40 do not fit
    params = SamplingParams(max_new_tokens=32, temperature=0.0)
    requests = [executor.add_request([i] * 8, params) for i in range(2)]
    run(executor)
    assert executor.num_preemptions > 0
    for request in requests:
        assert generated(request) == [one_by_one(request.prompt_token_ids, params)[0]]


def test_abort_waits_for_its_own_lane() -> None:
    executor, session = make(2)
    params = SamplingParams(max_new_tokens=10, temperature=0.0)
    requests = [executor.add_request([i, 1, 2], params) for i in range(4)]
    events = executor.step()  # lane 0 has ended its step, lane 1 has one under way
    assert session.under_way == [1]
    executor.abort(requests[1])
    events += run(executor)
    assert requests[1].sequences[0].finish_reason == "abort"
    for i in (0, 2, 3):
        tokens = [t for e in events if e.sequence.request is requests[i] for t in e.token_ids]
        assert tokens == one_by_one(requests[i].prompt_token_ids, params)[0], i
    assert executor.pool.num_free == executor.pool.num_usable


def test_a_failed_step_ends_all_lanes() -> None:
    executor, session = make(2)
    requests = [executor.add_request([i, 1, 2], SamplingParams(max_new_tokens=9)) for i in range(4)]
    executor.step()
    session.lanes[0].fail_at = 2
    with pytest.raises(RuntimeError, match="on fire"):
        executor.step()
    assert executor.is_idle and executor.pool.num_free == executor.pool.num_usable
    assert {request.sequences[0].finish_reason for request in requests} == {"abort"}
