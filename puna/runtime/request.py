"""What is asked of the runtime (Request, SamplingParams) and what it answers (RequestOutput).

Decides which parameters are legal and when a sequence is finished by a token or by its length.
Knows no text: stop strings are carried here but tested in `puna.llm`, which has the tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from puna.errors import RequestError
from puna.spec import GenerationDefaults

if TYPE_CHECKING:
    from puna.runtime.beam import Beams

FinishReason = Literal["stop", "length", "abort"]
Status = Literal["waiting", "running", "finished"]

# What beam search does not take, and the value that means nothing to it.
_WITHOUT_BEAMS = (
    ("temperature", 0.0),
    ("top_k", 0),
    ("top_p", 1.0),
    ("min_p", 0.0),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
    ("stop", ()),
    ("logprobs", None),
)


@dataclass(frozen=True)
class SamplingParams:
    """The user's choices for one prompt. None takes the engine's default, else the neutral value.

    `max_new_tokens` None: as many as the engine has room for. `temperature` 0: greedy, which is
    also the neutral value. `top_k` 0, `top_p` 1, `min_p` 0 and penalties of 1, 0 and 0 switch a
    filter off. `logprobs`: None for no logprobs, else how many alternatives beside the chosen
    token. `n`: how many independent continuations. `ignore_eos` leaves `stop` and `stop_token_ids`
    in force.

    `num_beams` above 1 is beam search, for the `n` best continuations it finds, best first. A
    finished one scores the sum of its log-probabilities / length ** `length_penalty`.
    `early_stopping` True ends the search with `num_beams` finished ones; False when the best beam,
    at its present length, scores less than each of them; "never" when it would at any length.

    >>> SamplingParams(stop="END").stop
    ('END',)
    """

    max_new_tokens: int | None = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        # A lone string and lists are what users write; the frozen form is a tuple.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _as_tuple("stop", stop))
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop holds {text!r}; it needs strings that are not empty")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0)

        _check_int("n", self.n, 1)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False")
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_new_tokens is not None:
            _check_int("max_new_tokens", self.max_new_tokens, 1)
        if self.temperature is not None:
            _check_float("temperature", self.temperature, 0.0, 100.0)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 0, 2**31 - 1)
        if self.top_p is not None:
            _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.min_p is not None:
            _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.repetition_penalty is not None:
            _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, 2**31 - 1)
        self._check_beams()

    def _check_beams(self) -> None:
        _check_int("num_beams", self.num_beams, 1)
        _check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'"
            )
        if self.num_beams == 1:
            for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != neutral:
                    raise RequestError(
                        f"{name} is {getattr(self, name)!r} without beams: leave it out, or ask "
                        "for num_beams of at least 2"
                    )
            return
        if self.n > self.num_beams:
            raise RequestError(
                f"n is {self.n} and num_beams {self.num_beams}; beam search returns at most one "
                "continuation a beam: lower n or raise num_beams"
            )
        for name, neutral in _WITHOUT_BEAMS:
            value = getattr(self, name)
            if value is not None and value != neutral:
                raise RequestError(
                    f"{name} is {value!r} and num_beams {self.num_beams}; beam search does not "
                    f"take it: leave {name} or num_beams out"
                )

    def resolve(self, defaults: GenerationDefaults) -> SamplingParams:
        """Return a copy in which no sampling field is None.

        >>> SamplingParams(top_k=5).resolve(GenerationDefaults(temperature=0.6)).temperature
        0.6
        """
        if self.num_beams > 1:  # the engine's defaults for sampling are not for beams
            defaults = GenerationDefaults(repetition_penalty=defaults.repetition_penalty)
        return replace(
            self,
            temperature=_first(self.temperature, defaults.temperature, 0.0),
            top_k=_first(self.top_k, defaults.top_k, 0),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
        )

    @property
    def num_sequences(self) -> int:
        """How many sequences of a request are computed side by side."""
        return max(self.n, self.num_beams)

    @property
    def has_penalties(self) -> bool:
        """Whether sampling needs to know which tokens the sequence already has."""
        return bool(
            self.repetition_penalty not in (None, 1.0)
            or self.presence_penalty
            or self.frequency_penalty
        )


class TokenLogprob(NamedTuple):
    """Log-probability of a chosen token under the raw logits, and of the most likely tokens."""

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Request:
    """One prompt and the sequences that continue it, `n` or one a beam.

    `params` is resolved, `seed` is drawn.
    """

    __slots__ = (
        "can_run_ahead",
        "id",
        "lane",
        "max_new_tokens",
        "num_prefill",
        "params",
        "prompt_token_ids",
        "seed",
        "sequences",
        "stop_token_ids",
        "want_prompt_logits",
    )

    def __init__(
        self,
        id: int,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        stop_token_ids: frozenset[int] = frozenset(),
        want_prompt_logits: bool = False,
        num_prefill: int | None = None,
    ) -> None:
        self.id = id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        # Logits of every position of the prompt instead of new tokens; the positions from
        # num_prefill on are computed one a step, as decode would.
        self.want_prompt_logits = want_prompt_logits
        self.num_prefill = len(prompt_token_ids) if num_prefill is None else num_prefill
        self.max_new_tokens = 0  # set by the scheduler, which knows what fits
        # Set by the executor: whether the session can be given a step of its sequences before it
        # has been asked for the step before.
        self.can_run_ahead = False
        self.lane = 0  # set by the executor
        self.sequences: list[Sequence] = []


class Sequence:
    """One continuation: the tokens known so far, how many of them are in the KV cache, and where.

    The scheduler's whole task is to let `num_computed` catch up with `len(token_ids)`. Once it has,
    `is_decoding` holds and the sequence gains one token a step. `followers` are the sequences of
    the same request that wait for this one to compute their common prompt. `beams` are those it is
    one of, if any.
    """

    __slots__ = (
        "beams",
        "block_ids",
        "finish_reason",
        "followers",
        "id",
        "index",
        "is_decoding",
        "max_len",
        "num_computed",
        "request",
        "status",
        "token_ids",
    )

    def __init__(self, id: int, request: Request, index: int) -> None:
        self.id = id
        self.request = request
        self.index = index
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.max_len = len(self.token_ids) + request.max_new_tokens
        self.num_computed = 0
        self.block_ids: list[int] = []
        self.is_decoding = False
        self.status: Status = "waiting"
        self.finish_reason: FinishReason | None = None
        self.followers: list[Sequence] = []
        self.beams: Beams | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def generated_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def append(self, token_id: int) -> tuple[int, ...]:
        """Add a sampled token, finish if it is the last, and return what was added.

        Nothing is added for a request that wants no new token, only the logits of its prompt.
        """
        added = ()
        if len(self.token_ids) < self.max_len:
            self.token_ids.append(token_id)
            added = (token_id,)
        if added and token_id in self.request.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"
        return added


class SequenceEvent(NamedTuple):
    """What one step brought to one sequence."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logits: tuple[int, object] | None = None  # first position, float32 [positions, V]
    score: float | None = None  # of a finished beam


@dataclass(frozen=True)
class Completion:
    """One finished continuation. `token_ids` include the token that ended it; `text` does not.

    `score`, of beam search alone: the sum of logprobs / number of tokens ** length_penalty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All continuations of one prompt, of beams the best first; `text` and its neighbours are those
    of the first."""

    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.completions[0].logprobs

    @property
    def score(self) -> float | None:
        return self.completions[0].score


@dataclass(frozen=True)
class Delta:
    """What one step added to a streamed continuation; the last one has a `finish_reason`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


def _first(chosen, default, neutral):
    if chosen is not None:
        return chosen
    return neutral if default is None else default


def _as_tuple(name: str, value: object) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise RequestError(f"{name} is {value!r}; it must be a tuple")
    return tuple(value)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    # bool is an int to Python, but True new tokens is a mistake.
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; it must be a whole number")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} is {value}; it must be {bound}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; it must be a finite number")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must be between {low:g} and {high:g}")
