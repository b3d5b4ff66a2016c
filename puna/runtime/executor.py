"""Executor: the loop that takes requests in and lets a session run their steps.

Decides what a request needs before it is scheduled (defaults, end tokens, a seed) and what happens
when a step fails. Knows no text, no arrays and no device. A step is `submit` then `collect`; they
are apart so that a later version can plan a step while the one before it runs.
"""

from __future__ import annotations

import secrets
import time
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

    def submit(self, plan: StepPlan) -> None:
        """Start a step."""
        ...

    def collect(self) -> StepResult:
        """Wait for the step that was submitted."""
        ...


class Executor:
    """Drives one session with one scheduler, one step in flight at most. Not for several threads.

    If a step is broken off by any exception, all requests end as aborted and the executor can be
    used again: the next plan tells the session to forget every sequence.
    """

    def __init__(
        self,
        session: StepRunner,
        scheduler: Scheduler,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self.session = session
        self.scheduler = scheduler
        self.defaults = defaults or GenerationDefaults()
        self.num_steps = 0
        self.session_seconds = 0.0  # in submit and collect; the rest of the time the device idles
        self._in_flight: StepPlan | None = None
        self._request_ids = count()

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

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
            prompt_token_ids=tuple(map(_token_id, prompt_token_ids)),
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_token_ids=frozenset((*eos, *params.stop_token_ids)),
            want_prompt_logits=want_prompt_logits,
            num_prefill=num_prefill,
        )
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """End all sequences of a request that have not finished."""
        for seq in reversed(request.sequences):
            self.abort_sequence(seq)

    def abort_sequence(self, seq: Sequence) -> None:
        """End one sequence, as its stop string requires."""
        assert self._in_flight is None, "abort between steps"
        self.scheduler.abort(seq)
        if self.is_idle:
            self.scheduler.check()

    def step(self) -> list[SequenceEvent]:
        """Run one step and return what it brought; [] when there is nothing to do."""
        if not self.submit():
            return []
        return self.collect()

    def submit(self) -> bool:
        """Plan the next step and start it; False if there is nothing to compute."""
        assert self._in_flight is None, "one step at a time"
        try:
            plan = self.scheduler.plan()
            if plan is None:
                return False
            start = time.perf_counter()
            self._in_flight = plan
            self.session.submit(plan)
            self.session_seconds += time.perf_counter() - start
            return True
        except BaseException:
            self.reset()
            raise

    def collect(self) -> list[SequenceEvent]:
        """Wait for the step in flight and book its result."""
        plan = self._in_flight
        assert plan is not None, "nothing was submitted"
        try:
            start = time.perf_counter()
            result = self.session.collect()
            self.session_seconds += time.perf_counter() - start
            events = self.scheduler.commit(plan, result)
            self._in_flight = None
            self.num_steps += 1
            if self.is_idle:
                self.scheduler.check()
            return events
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Abort everything, after a failure or before closing."""
        self._in_flight = None
        self.scheduler.reset()


def _token_id(value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RequestError(
            f"the prompt holds {value!r:.40}; it needs token ids, which are whole numbers"
        )
    return int(value)
