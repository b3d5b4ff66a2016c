"""Job: a request on its way from steps to an answer. Tokens, text, stop strings, logits.

Decides what text may be shown and when a stop string has ended it. Runs nothing: `puna.llm` does.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from puna.quant import Array
from puna.runtime.request import (
    Completion,
    Delta,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceEvent,
    TokenLogprob,
)
from puna.tokenizer import Detokenizer, Tokenizer


class Job:
    """A request on its way: the text and tokens of each of its sequences so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.parts = [Part(tokenizer, request.params) for _ in range(request.params.n)]
        self.deltas: deque[Delta] | None = None  # filled for a stream only
        self.prompt_logits: list[Array] = []  # of consecutive positions
        self.num_unfinished = len(self.parts)

    @property
    def is_finished(self) -> bool:
        return not self.num_unfinished

    def take(self, event: SequenceEvent) -> bool:
        """Add what a step brought to one sequence; whether the sequence is finished now."""
        part = self.parts[event.sequence.index]
        if event.prompt_logits is not None:
            start, logits = event.prompt_logits
            assert isinstance(logits, np.ndarray), type(logits)
            if start == 0:  # perhaps again, after a preemption
                self.prompt_logits.clear()
            self.prompt_logits.append(logits)
            if not event.token_ids and event.finish_reason is None:
                return False
        text = part.take(event)
        if part.finish_reason is not None:
            self.num_unfinished -= 1
        if self.deltas is not None:
            logprobs = None if self.request.params.logprobs is None else event.logprobs
            self.deltas.append(Delta(text, event.token_ids, part.finish_reason, logprobs))
        return part.finish_reason is not None

    def abort(self) -> None:
        for part in self.parts:
            part.finish_reason = part.finish_reason or "abort"
        if self.deltas is not None and not self.is_finished:
            self.deltas.append(Delta("", (), "abort"))
        self.num_unfinished = 0

    def output(self) -> RequestOutput:
        return RequestOutput(
            self.request.prompt_token_ids, tuple(part.completion() for part in self.parts)
        )


class Part:
    """One sequence's text and tokens."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._text = TextStream(tokenizer, params.stop) if tokenizer else None
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._score: float | None = None
        self.finish_reason: FinishReason | None = None

    def take(self, event: SequenceEvent) -> str:
        """Add what a step brought; return the text that can be shown now."""
        reason = event.finish_reason
        self._token_ids += event.token_ids
        self._score = event.score
        if self._logprobs is not None:
            self._logprobs += event.logprobs
        text = ""
        if self._text is not None:
            # The token that ends a sequence is not part of its text.
            shown = event.token_ids[:-1] if reason == "stop" else event.token_ids
            text = "".join(map(self._text.add, shown))
            if reason is not None:
                text += self._text.finish()
            if self._text.is_stopped:
                reason = "stop"
        self._pieces.append(text)
        self.finish_reason = reason
        return text

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason or "abort",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            score=self._score,
        )


class TextStream:
    """Text as it comes, up to the first stop string; what might begin one is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._held = ""
        self.is_stopped = False

    def add(self, token_id: int) -> str:
        """Return the text that can be shown now that `token_id` has come."""
        return self._show(self._detokenizer.add(token_id))

    def finish(self) -> str:
        """Return what was held back; no more tokens will come."""
        return self._show(self._detokenizer.finish(), is_last=True)

    def _show(self, piece: str, is_last: bool = False) -> str:
        if self.is_stopped:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [i for stop in self._stop if (i := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        num_shown = len(text) if is_last else len(text) - self._num_held(text)
        self._held = text[num_shown:]
        return text[:num_shown]

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
