"""Beam search: which continuations of a prompt go on, and which are finished.

`BeamSearch` decides, from log-probabilities, as transformers' `generate(num_beams=...)` does
(`_beam_search` of version 5). `Beams` are the sequences of one request that such a search owns:
how they share blocks, and how they compute their tokens again after a preemption. Neither knows
what else runs: see `puna.runtime.scheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import NamedTuple

from puna.runtime.block_pool import BlockPool
from puna.runtime.request import Request, Sequence, SequenceEvent, TokenLogprob
from puna.runtime.step import Branch


class Beam(NamedTuple):
    """A continuation that goes on: of which beam of the step before, and how likely it is."""

    parent: int
    token_ids: tuple[int, ...]  # generated
    score: float  # sum of log-probabilities


class Hypothesis(NamedTuple):
    """A continuation that has ended. `score` is divided by length ** length_penalty."""

    token_ids: tuple[int, ...]
    score: float


def candidates_for(num_beams: int, num_end_tokens: int) -> int:
    """How many best continuations a step looks at: enough for `num_beams` of them to go on even if
    every beam could end in every way.

    >>> candidates_for(num_beams=4, num_end_tokens=2)
    12
    """
    return max(2, 1 + num_end_tokens) * num_beams


class BeamSearch:
    """The beams of one prompt, best first, and the best continuations that have ended.

    There is one beam, the prompt, before the first `advance`, and `num_beams` afterwards. Each
    step looks at the `num_candidates` best continuations of all beams; only an end among the best
    `num_beams` counts.
    """

    def __init__(
        self,
        num_beams: int,
        length_penalty: float,
        early_stopping: bool | str,
        end_token_ids: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        self.num_beams = num_beams
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.end_token_ids = end_token_ids
        self.max_new_tokens = max_new_tokens
        self.num_candidates = candidates_for(num_beams, len(end_token_ids))
        self.beams = [Beam(0, (), 0.0)]
        self.finished: list[Hypothesis] = []  # best first, at most num_beams
        self.is_done = False

    def advance(self, candidates: ListLike[tuple[ListLike[int], ListLike[float]]]) -> None:
        """Take each beam's best next tokens and their log-probabilities."""
        assert len(candidates) == len(self.beams), f"{len(candidates)} for {len(self.beams)} beams"
        best = sorted(
            (-(beam.score + logprob), parent, token_id)
            for parent, (beam, found) in enumerate(zip(self.beams, candidates, strict=True))
            for token_id, logprob in zip(*found, strict=True)
        )[: self.num_candidates]
        num_new = len(self.beams[0].token_ids) + 1
        is_last = num_new == self.max_new_tokens
        going: list[Beam] = []
        for rank, (cost, parent, token_id) in enumerate(best):
            is_end = is_last or token_id in self.end_token_ids
            if rank >= self.num_beams if is_end else len(going) == self.num_beams:
                continue
            token_ids = (*self.beams[parent].token_ids, token_id)
            if is_end:
                score = -cost / num_new**self.length_penalty
                self.finished.append(Hypothesis(token_ids, score))
            else:
                going.append(Beam(parent, token_ids, -cost))
        # Of equals, the one that ended first stays: sorting is stable.
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.num_beams :]
        self.beams = going
        self.is_done = is_last or (
            len(self.finished) == self.num_beams
            and (self.early_stopping is True or not self._may_improve(num_new))
        )

    def _may_improve(self, num_new: int) -> bool:
        """Whether the best beam could still beat the worst that has ended.

        A guess, unless early_stopping is "never": a beam's score falls with each token, but with a
        positive penalty for length its share a token may rise.
        """
        length = num_new
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        return self.beams[0].score / length**self.length_penalty > self.finished[-1].score


class Beams:
    """The sequences of a request with beams: they join, wait and leave together.

    At first the first one computes the prompt, and the others have neither tokens nor blocks. From
    then on all are decoding, in the order of the search's beams. After a preemption they share the
    blocks of what they have in common, compute all tokens but their last in any order, and the
    last ones in one step.
    """

    def __init__(self, request: Request, sequences: list[Sequence]) -> None:
        params = request.params
        self.request = request
        self.sequences = sequences
        self.search = BeamSearch(
            params.num_beams,
            params.length_penalty,
            params.early_stopping,
            request.stop_token_ids,
            request.max_new_tokens,
        )
        # What the last step brought, in the order of the beams, until `advance` has taken it.
        self.candidates: list[TokenLogprob] = []
        self.parents: list[int] = []  # of each sequence, until `branch` has given it its blocks
        # By index of a sequence whose first blocks another computes: that one, and how many tokens.
        self._sources: dict[int, tuple[Sequence, int]] = {}

    @property
    def has_branched(self) -> bool:
        return len(self.search.beams) > 1

    def advance(self) -> list[SequenceEvent]:
        """Let the search choose; at its end return the `n` best, which the sequences then hold."""
        self.search.advance([(c.top_token_ids, c.top_logprobs) for c in self.candidates])
        self.candidates = []
        prompt = self.request.prompt_token_ids
        if not self.search.is_done:
            self.parents = [beam.parent for beam in self.search.beams]
            for seq, beam in zip(self.sequences, self.search.beams, strict=True):
                seq.token_ids = [*prompt, *beam.token_ids]
            return []
        events: list[SequenceEvent] = []
        for seq, (token_ids, score) in zip(self.sequences, self.search.finished, strict=True):
            seq.token_ids = [*prompt, *token_ids]
            is_stop = token_ids[-1] in self.request.stop_token_ids
            seq.finish_reason = "stop" if is_stop else "length"
            events.append(SequenceEvent(seq, token_ids, (), seq.finish_reason, score=score))
        return events[: self.request.params.n]

    def branch(self, pool: BlockPool) -> tuple[list[Branch], dict[int, int]]:
        """Give each sequence the blocks of the beam it continues.

        All are shared but a last block with room: the first to continue a beam goes on in it, and
        the others lack it. Returns, for those, the block to copy by sequence id.
        """
        parents = [self.sequences[parent] for parent in self.parents]
        num_computed = parents[0].num_computed
        num_full = num_computed // pool.block_size
        branches: list[Branch] = []
        tables: list[list[int]] = []
        sources: dict[int, int] = {}
        has_last: set[int] = set()
        for seq, parent in zip(self.sequences, parents, strict=True):
            blocks = parent.block_ids
            if parent.id in has_last and len(blocks) > num_full:
                sources[seq.id] = blocks[num_full]
                blocks = blocks[:num_full]
            has_last.add(parent.id)
            tables.append(pool.allocate(0, shared=blocks))
            branches.append(Branch(seq.id, parent.id, seq.token_ids[-1], len(blocks)))
        for seq, table in zip(self.sequences, tables, strict=True):
            pool.free(seq.block_ids)
            seq.block_ids = table
            seq.num_computed = num_computed
            seq.is_decoding = True
        self.parents = []
        return branches, sources

    def place(self, pool: BlockPool, reserve: int) -> bool:
        """Find blocks for all tokens that the sequences know, or take none."""
        self._sources = {}
        placed: list[Sequence] = []
        for seq in self.sequences if self.has_branched else self.sequences[:1]:
            num_known = len(seq.token_ids)
            shared = pool.match_prefix(seq.token_ids, limit=num_known - 1)
            for other in placed:
                num_common = _common(seq.token_ids, other.token_ids) // pool.block_size
                if num_common > len(shared):
                    shared = other.block_ids[:num_common]
                    self._sources[seq.index] = (other, num_common * pool.block_size)
            num_new = pool.blocks_for(num_known) - len(shared)
            seq.block_ids = pool.allocate(num_new, shared, reserve)
            if not seq.block_ids:
                for other in placed:
                    pool.free(other.block_ids)
                    other.block_ids, other.num_computed = [], 0
                return False
            seq.num_computed = len(shared) * pool.block_size
            placed.append(seq)
        return True

    def chunks(self, budget: int, max_chunk: int) -> list[tuple[Sequence, int]]:
        """What the sequences that are not decoding compute next: at most `budget` tokens."""
        if not self.has_branched:
            leader = self.sequences[0]
            todo = len(leader.token_ids) - leader.num_computed
            return [(leader, min(todo, max_chunk, budget))]
        behind = [seq for seq in self.sequences if seq.num_computed < len(seq.token_ids) - 1]
        if not behind:  # every beam's candidates are needed in the same step
            enough = budget >= len(self.sequences)
            return [(seq, 1) for seq in self.sequences] if enough else []
        found: list[tuple[Sequence, int]] = []
        for seq in behind:
            source, num_shared = self._sources.get(seq.index, (seq, 0))
            if budget and source.num_computed >= num_shared:
                todo = len(seq.token_ids) - 1 - seq.num_computed
                num_tokens = min(todo, max_chunk, budget)
                found.append((seq, num_tokens))
                budget -= num_tokens
        return found


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two beams have in common before their last, which both must compute."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)
