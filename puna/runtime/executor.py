"""Executor: the loop that takes requests in and lets a session run their steps.

Decides what a request needs before it is scheduled (defaults, end tokens, a seed), which lane it
goes to, and what happens when a step fails. Knows no text, no arrays and no device.

A lane is a batch of its own, with a scheduler of its own. There is one, or one for each pipeline
stage, so that while a stage computes one lane's step the others have work too. A lane has a step in
flight: `submit`, then `collect`. It has two where the second can be planned without what the first
one samples, so that the device goes from one to the other while the first is booked.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Sequence as ListLike
from dataclasses import replace
from itertools import count
from numbers import Integral  # NumPy's integers are welcome too
from typing import Protocol

from puna.errors import RequestError
from puna.runtime.request import Request, SamplingParams, Sequence, SequenceEvent
from puna.runtime.scheduler import Scheduler
from puna.runtime.step import StepPlan, StepResult
from puna.spec import GenerationDefaults


class StepRunner(Protocol):
    """The part of a session that the executor drives: one rank's, or many ranks' as one."""

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        """Start a step of a lane that has none in flight, or one that it runs ahead of."""
        ...

    def collect(self, lane: int = 0) -> StepResult:
        """Wait for the lane's oldest step; steps are collected in the order in which they were
        submitted."""
        ...

    def can_run_ahead(self, params: SamplingParams) -> bool:
        """Whether a lane whose sequences are all sampled so may have two steps in flight."""
        ...


class Executor:
    """Drives one session with a scheduler for each of its lanes, which share a pool of blocks. Not
    for several threads.

    If a step is broken off by any exception, all requests end as aborted and the executor can be
    used again: the next plan tells the session to forget every sequence.
    """

    def __init__(
        self,
        session: StepRunner,
        schedulers: Scheduler | ListLike[Scheduler],
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self.session = session
        self.lanes = [schedulers] if isinstance(schedulers, Scheduler) else list(schedulers)
        self.pool = self.lanes[0].pool
        assert all(lane.pool is self.pool for lane in self.lanes), "lanes share a pool"
        self.defaults = defaults or GenerationDefaults()
        self.num_steps = 0
        self.session_seconds = 0.0  # in submit and collect; the rest of the time the device idles
        self._in_flight: deque[tuple[int, StepPlan]] = deque()  # oldest first
        self._held: list[SequenceEvent] = []  # of steps that an abort had to wait for
        self._may_run_ahead = False  # whether any request could: where none can, nothing is tried
        self._next_lane = 0
        self._request_ids = count()

    @property
    def scheduler(self) -> Scheduler:
        """The first lane's scheduler: the only one where there is one rank."""
        return self.lanes[0]

    @property
    def num_preemptions(self) -> int:
        return sum(lane.num_preemptions for lane in self.lanes)

    @property
    def is_idle(self) -> bool:
        return all(lane.is_idle for lane in self.lanes)

    def add_request(
        self,
        prompt_token_ids: ListLike[int],
        params: SamplingParams | None = None,
        want_prompt_logits: bool = False,
        num_prefill: int | None = None,
    ) -> Request:
        """Queue a prompt; RequestError if it can never be served.

        With `want_prompt_logits` the request computes its prompt and ends; positions from
        `num_prefill` on are computed one a step.
        """
        params = (params or SamplingParams()).resolve(self.defaults)
        if want_prompt_logits:
            params = replace(params, n=1)
        eos = () if params.ignore_eos else self.defaults.eos_token_ids
        request = Request(
            id=next(self._request_ids),
            prompt_token_ids=_token_ids(prompt_token_ids),
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_token_ids=frozenset((*eos, *params.stop_token_ids)),
            want_prompt_logits=want_prompt_logits,
            num_prefill=num_prefill,
        )
        request.can_run_ahead = not want_prompt_logits and self.session.can_run_ahead(params)
        self._may_run_ahead = self._may_run_ahead or request.can_run_ahead
        request.lane = min(range(len(self.lanes)), key=lambda i: self.lanes[i].num_sequences)
        self.lanes[request.lane].add(request)
        return request

    def abort(self, request: Request) -> None:
        """End all sequences of a request that have not finished."""
        for seq in reversed(request.sequences):
            self.abort_sequence(seq)

    def abort_sequence(self, seq: Sequence) -> None:
        """End one sequence, as its stop string requires. A step of it that is in flight is waited
        for first; what the step brought to others comes with the next events."""
        lane = seq.request.lane
        while any(lane == flying for flying, _ in self._in_flight):
            self._held += self.collect()
        self._held = [event for event in self._held if event.sequence is not seq]
        self.lanes[lane].abort(seq)
        if self.is_idle:
            self._check()

    def step(self) -> list[SequenceEvent]:
        """Start what can be started, wait for the oldest step, and return what it brought; [] when
        there is nothing to do."""
        self.submit()
        events, self._held = self._held, []
        return events + self.collect() if self._in_flight else events

    def submit(self) -> bool:
        """Plan and start the steps that lanes can have now, each one, and perhaps one that runs
        ahead; False if none has begun."""
        num_lanes, num_before = len(self.lanes), len(self._in_flight)
        for i in range(num_lanes):
            lane = (self._next_lane + i) % num_lanes
            flying = [plan for of_lane, plan in self._in_flight if of_lane == lane]
            if not flying and self._submit_lane(lane, None):
                flying.append(self._in_flight[-1][1])
            if self._may_run_ahead and len(flying) == 1:
                self._submit_lane(lane, flying[0])
        assert self._in_flight or self.is_idle, "no lane can go on"
        return len(self._in_flight) > num_before

    def _submit_lane(self, lane: int, before: StepPlan | None) -> bool:
        """Start the lane's next step, which runs ahead of `before` where that is in flight."""
        try:
            scheduler = self.lanes[lane]
            plan = scheduler.plan() if before is None else scheduler.plan_ahead(before)
            if plan is None:
                return False
            start = time.perf_counter()
            self._in_flight.append((lane, plan))
            self.session.submit(plan, lane)
            self.session_seconds += time.perf_counter() - start
            return True
        except BaseException:
            self.reset()
            raise

    def collect(self) -> list[SequenceEvent]:
        """Wait for the oldest step in flight and book its result."""
        assert self._in_flight, "nothing was submitted"
        lane, plan = self._in_flight[0]
        try:
            start = time.perf_counter()
            result = self.session.collect(lane)
            self.session_seconds += time.perf_counter() - start
            events = self.lanes[lane].commit(plan, result)
            self._in_flight.popleft()
            self._next_lane = lane
            self.num_steps += 1
            if self.is_idle:
                self._check()
            return events
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Abort everything, after a failure or before closing."""
        self._in_flight.clear()
        self._held.clear()
        for lane in self.lanes:
            lane.reset()

    def _check(self) -> None:
        """Assert that no block is lost."""
        self.pool.check(table for lane in self.lanes for table in lane.tables())


def _token_ids(values: ListLike[int]) -> tuple[int, ...]:
    values = tuple(values)
    # To look at each of 2,048 took 2.4 ms (beside an H200, 2026-11-26), before the first token.
    return values if set(map(type, values)) == {int} else tuple(map(_token_id, values))


def _token_id(value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RequestError(
            f"the prompt holds {value!r:.40}; it needs token ids, which are whole numbers"
        )
    return int(value)
