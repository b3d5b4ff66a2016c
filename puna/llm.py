"""LLM: an engine as a Python object that takes text (or token ids) and returns text.

Decides what happens to text: tokenisation, stop strings, what may be shown while streaming. Any
number of prompts share the engine through in-flight batching, and streams may be read while other
prompts run. Knows nothing of blocks, batches or devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from puna.engine import TOKENIZER_DIR
from puna.errors import RequestError
from puna.job import Job
from puna.quant import Array
from puna.runtime.block_pool import BlockPool
from puna.runtime.executor import Executor
from puna.runtime.launch import World, find_world
from puna.runtime.ranks import RankedSession, SessionOptions, open_ranks
from puna.runtime.request import (
    Delta,
    Request,
    RequestOutput,
    SamplingParams,
)
from puna.runtime.scheduler import Scheduler
from puna.runtime.session import LoadProgress, Session
from puna.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
Messages = list[dict[str, str]]
Progress = Callable[[int, int], None]


class LLM:
    """An engine, loaded. A context manager; not for several threads at once.

    `tokenizer` names a directory to take the tokenizer from instead of the engine's, and
    `chat_template` is Jinja text that replaces its template. `max_batch_size` and `max_num_tokens`
    lower the engine's own limits. `deterministic`: on a GPU too, a prompt's greedy answer does not
    depend on what else runs; it costs speed. `progress` is told (bytes done, bytes in all) while it
    loads.

    An engine of several ranks is opened by all of them: each runs the same program, as mpirun,
    torchrun, srun or puna launch start it, and `world` says which one this is (None: what the
    launcher says). Only rank 0 gets an LLM; on the others this constructor serves it until it is
    closed, then ends the process (SystemExit).
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        device: str = "auto",
        kv_cache_bytes: int | None = None,
        threads: int | None = None,
        tokenizer: str | Path | None = None,
        chat_template: str | None = None,
        prefix_cache: bool = True,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        deterministic: bool = False,
        progress: LoadProgress | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world = find_world() if world is None else world
        options = SessionOptions(
            device, kv_cache_bytes, threads, max_batch_size, max_num_tokens, deterministic
        )
        session = _open_session(world, Path(engine_dir), options, progress)
        try:
            self.config = session.config
            limits, generation = self.config.limits, self.config.generation
            self.tokenizer = _find_tokenizer(session.engine_dir, tokenizer, chat_template)
            if self.tokenizer and not generation.eos_token_ids:
                generation = replace(generation, eos_token_ids=self.tokenizer.eos_token_ids)
            pool = BlockPool(session.num_blocks, session.block_size, prefix_cache)
            schedulers = [
                Scheduler(
                    pool,
                    # Together the lanes have as many sequences as the engine may have.
                    max_batch_size=-(-(limits.max_batch_size - lane) // session.num_lanes),
                    max_num_tokens=limits.max_num_tokens,
                    max_seq_len=limits.max_seq_len,
                    vocab_size=self.config.spec.vocab_size,
                    max_beams=limits.max_batch_size,
                )
                for lane in range(session.num_lanes)
            ]
        except BaseException:
            session.close()
            raise
        self.session: Session | RankedSession | None = session
        self.executor = Executor(session, schedulers, generation)
        self._jobs: dict[int, Job] = {}  # by request id

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many; return one output a prompt, in order.

        A prompt is text or a list of token ids. `params` are for all prompts, or one for each.
        `progress` is told (prompts answered, prompts in all) as they are, in order.
        """
        encoded = [self._encode(prompt) for prompt in _as_prompts(prompts)]
        return self._run(encoded, _one_for_each(params, len(encoded)), progress)

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation of {"role", "content"} messages."""
        return self._run([self._encode_chat(messages)], [params or SamplingParams()])[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt and yield what is new as it comes; closing the iterator aborts."""
        return self._stream(self._encode(prompt), params or SamplingParams())

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Answer a conversation and yield what is new as it comes."""
        return self._stream(self._encode_chat(messages), params or SamplingParams())

    def logits(self, token_ids: Sequence[int], num_prefill: int | None = None) -> Array:
        """Return float32 [T, V]: what the engine computes for each position of `token_ids`.

        The tokens from `num_prefill` on are computed one a step, as decode would. The prefix cache
        is not used.
        """
        if num_prefill is not None and not 1 <= num_prefill <= max(1, len(token_ids)):
            raise RequestError(
                f"num_prefill is {num_prefill}; it must be between 1 and the number of tokens, "
                f"{len(token_ids)}"
            )
        request = self._open_executor().add_request(
            token_ids, want_prompt_logits=True, num_prefill=num_prefill
        )
        job = self._start(request)
        try:
            self._finish(job)
        finally:
            self._drop(job)
        logits_TV = np.concatenate(job.prompt_logits)
        assert len(logits_TV) == len(token_ids), f"{len(logits_TV)} rows of logits"
        return logits_TV

    def close(self) -> None:
        """Abort what is running and let go of the engine's memory. May be called twice."""
        session, self.session = self.session, None
        if session is None:
            return
        self.executor.reset()
        self._abort_jobs()
        session.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_executor(self) -> Executor:
        if self.session is None:
            raise RequestError("this LLM is closed; open the engine again")
        return self.executor

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            if isinstance(prompt, bytes) or not hasattr(prompt, "__iter__"):
                raise RequestError(f"the prompt is {prompt!r:.40}; it must be text or token ids")
            return prompt
        _check_unicode(prompt)
        return self._need_tokenizer("text").encode(prompt)

    def _encode_chat(self, messages: Messages) -> list[int]:
        return self._need_tokenizer("a conversation").apply_chat_template(messages)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"the engine has no tokenizer, which {what} needs: pass token ids, or a tokenizer "
                "directory (tokenizer=DIR, --tokenizer DIR)"
            )
        return self.tokenizer

    def _run(
        self,
        prompts: list[Sequence[int]],
        params: Sequence[SamplingParams],
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        executor = self._open_executor()
        jobs: list[Job] = []
        try:
            for i, (prompt, prompt_params) in enumerate(zip(prompts, params, strict=True)):
                self._check_stop(prompt_params)
                try:
                    jobs.append(self._start(executor.add_request(prompt, prompt_params)))
                except RequestError as error:
                    where = f"prompt {i}: " if len(prompts) > 1 else ""
                    raise RequestError(f"{where}{error}") from None
            for num_done, job in enumerate(jobs, 1):
                self._finish(job)
                if progress is not None:
                    progress(num_done, len(jobs))
        finally:
            for job in jobs:
                self._drop(job)
        return [job.output() for job in jobs]

    def _stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Delta]:
        """Check what can be checked now; the request itself starts with the first `next`."""
        if params.n != 1:
            raise RequestError(f"n is {params.n}; streaming takes 1 (generate takes any)")
        if params.num_beams != 1:
            raise RequestError(
                f"num_beams is {params.num_beams}; the best beam is known at the end only, so it "
                "cannot be streamed: use generate, or one beam"
            )
        self._check_stop(params)
        self._open_executor()
        return self._deltas(prompt, params)

    def _deltas(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Delta]:
        job = self._start(self._open_executor().add_request(prompt, params))
        job.deltas = deque()
        try:
            while job.deltas or not job.is_finished:
                if job.deltas:
                    yield job.deltas.popleft()
                else:
                    self._step()
        finally:
            self._drop(job)

    def _check_stop(self, params: SamplingParams) -> None:
        if params.stop:
            self._need_tokenizer("a stop string")

    def _start(self, request: Request) -> Job:
        job = Job(request, self.tokenizer)
        self._jobs[request.id] = job
        return job

    def _finish(self, job: Job) -> None:
        while not job.is_finished:
            self._step()

    def _drop(self, job: Job) -> None:
        """Forget a request, ending it if it still runs."""
        if self._jobs.pop(job.request.id, None) and not job.is_finished:
            self.executor.abort(job.request)

    def _step(self) -> None:
        """Run one step for all requests and hand each its part."""
        try:
            for event in self._open_executor().step():
                job = self._jobs[event.sequence.request.id]
                if job.take(event) and event.finish_reason is None:
                    self.executor.abort_sequence(event.sequence)  # at a stop string
        except BaseException:
            # A failed step has ended every request in the executor, also those of other streams.
            self.executor.reset()
            self._abort_jobs()
            raise

    def _abort_jobs(self) -> None:
        for job in self._jobs.values():
            job.abort()
        self._jobs.clear()


def _open_session(
    world: World, engine_dir: Path, options: SessionOptions, progress: LoadProgress | None
) -> Session | RankedSession:
    if world.size > 1:
        return open_ranks(world, engine_dir, options, progress)
    return Session.open(
        engine_dir,
        device=options.device,
        kv_cache_bytes=options.kv_cache_bytes,
        threads=options.threads,
        max_batch_size=options.max_batch_size,
        max_num_tokens=options.max_num_tokens,
        deterministic=options.deterministic,
        progress=progress,
    )


def _find_tokenizer(
    engine_dir: Path, directory: str | Path | None, chat_template: str | None
) -> Tokenizer | None:
    """Load the tokenizer of `directory`, else the engine's; None if it has none."""
    own = engine_dir / TOKENIZER_DIR
    if directory is None and not own.is_dir():
        return None
    return load_tokenizer(Path(directory or own), chat_template)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt or many: a lone text or a flat list of token ids is one."""
    if isinstance(prompts, (str, bytes)):
        return [prompts]
    many = list(prompts)
    return [many] if many and isinstance(many[0], Integral) else many


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"found {len(params)} sampling parameters for {num_prompts} prompts; give one, or one "
            "for each prompt"
        )
    return params


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}; it must be valid Unicode"
        ) from None
