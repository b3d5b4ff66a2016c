"""Admission: whether a request can ever be served, and how many new tokens it gets.

Decides from the limits of an engine and the size of its KV cache alone; what is waiting or running
makes a request late, never impossible. See `puna.runtime.scheduler` for when it is served.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.errors import RequestError
from puna.runtime.beam import candidates_for
from puna.runtime.request import Request


@dataclass(frozen=True)
class Admission:
    """What a request may ask for. `num_blocks` are those that sequences can have."""

    num_blocks: int
    block_size: int
    max_beams: int
    max_seq_len: int
    vocab_size: int

    def room(self, request: Request) -> int:
        """Return how many new tokens the request gets; RequestError if it can never be served."""
        self._check_prompt(request.prompt_token_ids)
        self._check_beams(request)
        num_prompt = len(request.prompt_token_ids)
        wanted, num_beams = request.params.max_new_tokens, request.params.num_beams
        capacity = self._capacity(num_prompt, num_beams)
        room = 0
        if not request.want_prompt_logits:
            room = self.max_seq_len - num_prompt
            if not room:
                raise RequestError(
                    f"the prompt has {num_prompt} tokens and max_seq_len is {self.max_seq_len}, "
                    "which leaves no room for a new token; shorten the prompt"
                )
            # The last new token is never computed, so it needs no place in the KV cache.
            room = min(room, max(1, capacity + 1 - num_prompt) if wanted is None else wanted)
        if num_prompt + max(room - 1, 0) > capacity:
            raise RequestError(
                f"{num_prompt} prompt tokens and {room} new ones do not fit the KV cache of "
                f"{capacity} tokens{f' for each of {num_beams} beams' if num_beams > 1 else ''}; "
                "ask for fewer tokens or give the KV cache more memory"
            )
        return room

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; it needs at least one token")
        if len(token_ids) > self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; the engine takes at most "
                f"{self.max_seq_len}: shorten it, or build with a larger --max-seq-len"
            )
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            bad = next(t for t in token_ids if not 0 <= t < self.vocab_size)
            raise RequestError(
                f"the prompt has token id {bad}; the vocabulary is 0 to {self.vocab_size - 1}"
            )

    def _check_beams(self, request: Request) -> None:
        num_beams, num_ends = request.params.num_beams, len(request.stop_token_ids)
        if num_beams == 1:
            return
        if num_beams > self.max_beams:
            raise RequestError(
                f"num_beams is {num_beams}; the engine computes at most {self.max_beams} sequences "
                "at once: ask for fewer, or build with a larger --max-batch-size"
            )
        num_candidates = candidates_for(num_beams, num_ends)
        if num_candidates > self.vocab_size:
            raise RequestError(
                f"{num_beams} beams with {num_ends} end tokens need {num_candidates} candidates, "
                f"and the vocabulary has {self.vocab_size}: ask for fewer beams"
            )

    def _capacity(self, num_prompt: int, num_beams: int) -> int:
        """How many tokens each sequence of a request can have in the KV cache.

        Beams that part at once have the full blocks of the prompt in common, and no others.
        """
        num_shared = num_prompt // self.block_size if num_beams > 1 else 0
        num_own = (self.num_blocks - num_shared) // num_beams
        return (num_shared + num_own) * self.block_size
