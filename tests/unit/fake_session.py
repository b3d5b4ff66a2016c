"""A session without a model, which catches what a real one would only blur.

It stores the token ids themselves in a paged "KV cache", reads each row's context back through the
block table, and computes logits as a hash of that context. A wrong slot, a stale prefix block or a
copy at the wrong time thus changes the output. One that runs ahead computes a step only when it is
collected, as late as can be, and then by the arrays that it was lowered to.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from puna.ops.sampling import sample
from puna.runtime.block_pool import BlockPool
from puna.runtime.executor import Executor
from puna.runtime.lower import LoweredStep, Lowering
from puna.runtime.request import Request, SamplingParams, SequenceEvent
from puna.runtime.scheduler import Scheduler
from puna.runtime.step import StepPlan, StepResult
from puna.spec import GenerationDefaults

VOCAB_SIZE = 31


def fake_logits(context: Sequence[int]) -> np.ndarray:
    """Float32 [V] logits that depend on every token of the context and on their order."""
    seed = zlib.crc32(np.asarray(context, np.int32).tobytes())
    mixed = (np.arange(1, VOCAB_SIZE + 1, dtype=np.uint64) * np.uint64(2654435761) + seed) * 40503
    return ((mixed >> np.uint64(7)) % np.uint64(1009)).astype(np.float32) / 100


class FakeSession:
    """Implements what the executor and LLM need of a session."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_batch_size: int = 8,
        max_seq_len: int = 64,
        max_num_tokens: int = 64,
        generation: GenerationDefaults | None = None,
        engine_dir: Path = Path("nowhere"),
        runs_ahead: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_lanes = 1
        self.engine_dir = engine_dir
        self.config = SimpleNamespace(
            spec=SimpleNamespace(vocab_size=VOCAB_SIZE),
            limits=SimpleNamespace(
                max_seq_len=max_seq_len,
                max_batch_size=max_batch_size,
                max_num_tokens=max_num_tokens,
                block_size=block_size,
            ),
            generation=generation or GenerationDefaults(),
        )
        self.lowering = Lowering(block_size, max_batch_size, max_seq_len)
        self.kv_NP = np.full((num_blocks, block_size), -1, np.int32)
        self.plans: list[StepPlan] = []
        self.is_closed = False
        self.fail_at: int | None = None  # number of the submit that raises
        self.runs_ahead = runs_ahead
        self.num_ahead = 0
        self._last_token_R = np.full(max_batch_size, -1, np.int32)  # the device's own
        self._steps: deque[LoweredStep] = deque()

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        self.plans.append(plan)
        if plan.reset:
            self._steps.clear()
        assert len(self._steps) < 1 + self.runs_ahead, "collect the step before"
        self.num_ahead += len(self._steps)
        step = self.lowering.lower(plan)
        if self.fail_at == len(self.plans):
            raise RuntimeError("the device is on fire")
        self._steps.append(step)

    def _compute(self, step: LoweredStep) -> StepResult:
        sources, destinations = step.copies_C2[:, 0], step.copies_C2[:, 1]
        self.kv_NP[destinations] = self.kv_NP[sources]
        batch = step.batch
        assert len(set(batch.slots_T.tolist())) == batch.num_tokens, "two tokens in one slot"
        assert (batch.slots_T >= self.block_size).all(), "a token in the null block"
        token_ids_T = batch.token_ids_T.copy()
        is_unknown_T = token_ids_T < 0
        assert self.runs_ahead or not is_unknown_T.any(), "tokens that nobody told"
        token_ids_T[is_unknown_T] = self._last_token_R[-1 - token_ids_T[is_unknown_T]]
        self.kv_NP.reshape(-1)[batch.slots_T] = token_ids_T

        logits = []
        for t in batch.logits_rows_L:
            s = int(np.searchsorted(batch.query_start_S1, t, side="right")) - 1
            start, stop = batch.query_start_S1[s : s + 2]
            assert batch.positions_T[stop - 1] == batch.seq_lens_S[s] - 1
            context = self.kv_NP[batch.block_table_SM[s]].reshape(-1)[: batch.positions_T[t] + 1]
            assert batch.positions_T[t] - batch.positions_T[start] == t - start
            logits.append(fake_logits(context))
        logits_LV = np.array(logits, np.float32).reshape(-1, VOCAB_SIZE)
        sampled = sample(step.sample_logits(logits_LV), step.sampling)
        self._last_token_R[step.rows] = sampled.token_ids_L
        return self.lowering.record(step, sampled, logits_LV)

    def collect(self, lane: int = 0) -> StepResult:
        return self._compute(self._steps.popleft())

    def can_run_ahead(self, params: SamplingParams) -> bool:
        is_plain = not params.has_penalties and params.logprobs is None and params.num_beams == 1
        return self.runs_ahead and is_plain

    def close(self) -> None:
        self.is_closed = True


def make_executor(
    num_blocks: int = 64,
    block_size: int = 4,
    max_batch_size: int = 8,
    max_num_tokens: int = 64,
    max_seq_len: int = 64,
    max_chunk: int | None = None,
    prefix_cache: bool = True,
    defaults: GenerationDefaults | None = None,
    runs_ahead: bool = False,
) -> Executor:
    """An executor over a fake session; `executor.session` is the FakeSession."""
    session = FakeSession(
        num_blocks,
        block_size,
        max_batch_size,
        max_seq_len,
        max_num_tokens,
        runs_ahead=runs_ahead,
    )
    pool = BlockPool(num_blocks, block_size, prefix_cache)
    scheduler = Scheduler(
        pool, max_batch_size, max_num_tokens, max_seq_len, VOCAB_SIZE, max_chunk=max_chunk
    )
    return Executor(session, scheduler, defaults)


def run_to_end(executor: Executor) -> list[SequenceEvent]:
    """Step until idle, checking the pool after each step."""
    events = []
    while not executor.is_idle:
        events += executor.step()
        executor.scheduler.check()
    return events


def generated(request: Request) -> list[list[int]]:
    return [seq.generated_token_ids for seq in request.sequences]


def one_by_one(
    prompt: Sequence[int],
    params: SamplingParams,
    max_seq_len: int = 64,
    eos: Sequence[int] = (),
    stream: int = 0,
) -> tuple[list[int], str]:
    """The oracle: one sequence, no cache, no batch. Greedy, or sampled with the given seed."""
    params = params.resolve(GenerationDefaults())
    room = max_seq_len - len(prompt)
    room = room if params.max_new_tokens is None else min(room, params.max_new_tokens)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    tokens = list(prompt)
    while True:
        batch = sampling_batch([(params, params.seed or 0, stream, tokens, len(prompt))])
        tokens.append(int(sample(fake_logits(tokens)[None], batch).token_ids_L[0]))
        if tokens[-1] in stops:
            return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == room:
            return tokens[len(prompt) :], "length"


def sampling_batch(rows: Sequence[tuple[SamplingParams, int, int, list[int], int]]):
    """A SamplingBatch from (resolved params, seed, stream, tokens, length of the prompt) a row."""
    from puna.ops.sampling import SamplingBatch

    seen = [
        (i, token_id, tokens[num_prompt:].count(token_id))
        for i, (params, _, _, tokens, num_prompt) in enumerate(rows)
        if params.has_penalties
        for token_id in dict.fromkeys(tokens)
    ]

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(params, name) for params, *_ in rows], np.float32)

    return SamplingBatch(
        temperature_L=floats("temperature"),
        top_k_L=np.array([params.top_k for params, *_ in rows], np.int32),
        top_p_L=floats("top_p"),
        min_p_L=floats("min_p"),
        repetition_L=floats("repetition_penalty"),
        presence_L=floats("presence_penalty"),
        frequency_L=floats("frequency_penalty"),
        seed_L=np.array([row[1] for row in rows], np.uint64),
        stream_L=np.array([row[2] for row in rows], np.uint32),
        position_L=np.array([len(row[3]) for row in rows], np.uint32),
        num_logprobs_L=np.array(
            [-1 if params.logprobs is None else params.logprobs for params, *_ in rows], np.int32
        ),
        is_beam_L=np.zeros(len(rows), bool),
        seen_rows_C=np.array([s[0] for s in seen], np.int32),
        seen_ids_C=np.array([s[1] for s in seen], np.int32),
        seen_counts_C=np.array([s[2] for s in seen], np.int32),
    )


def random_prompt(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(low, high))]
