"""Scheduler: which tokens of which sequences the next step computes, and in which blocks.

There are no phases. Every sequence knows some tokens and has computed some of them; a step lets the
computed tokens catch up. Prefill, chunked prefill, decode, and resuming after preemption are this
one loop. Decides order, budget and memory; knows no arrays, no text, and no model.
"""

from __future__ import annotations

from collections import deque
from itertools import count

from puna.errors import ConfigError
from puna.runtime.admission import Admission
from puna.runtime.ahead import full_after
from puna.runtime.beam import Beams
from puna.runtime.block_pool import NULL_BLOCK, BlockPool
from puna.runtime.request import Request, Sequence, SequenceEvent, TokenLogprob
from puna.runtime.step import Branch, Join, StepPlan, StepResult


class Scheduler:
    """Owns the waiting and the running sequences. Call `plan` and `commit` in turn; between the
    two, `plan_ahead` may give one more step, to be committed after the first.

    A step computes at most `max_num_tokens` tokens of at most `max_batch_size` sequences, and at
    most `max_chunk` of a prompt. A sequence joins with blocks for all tokens it knows, so only
    decode can run out of blocks; then the sequence that joined last is preempted: it gives up its
    blocks and waits, first in line, to compute its tokens again. The beams of a request join, wait
    and leave together, and the first stands for all in the queue. Up to `max_beams` of them may be
    more than a batch: then they run alone.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        vocab_size: int,
        max_chunk: int | None = None,
        max_beams: int | None = None,
    ) -> None:
        max_beams = max_beams or max_batch_size
        if min(max_batch_size, max_num_tokens) < 1 or max_num_tokens < max_batch_size:
            raise ConfigError(
                f"max_num_tokens is {max_num_tokens} and max_batch_size {max_batch_size}; a step "
                "must have room for one token of each sequence"
            )
        if max_chunk is not None and max_chunk < 1:
            raise ConfigError(f"max_chunk is {max_chunk}; it must be at least 1")
        assert max_beams <= max_num_tokens, "beams decode in one step"
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.admission = Admission(
            pool.num_usable, pool.block_size, max_beams, max_seq_len, vocab_size
        )
        self.max_chunk = max_chunk or max_num_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they joined
        self.num_preemptions = 0
        self._branching: list[Beams] = []  # chosen by the last step, without their blocks yet
        self._left: list[int] = []  # since the last plan
        self._reset = False
        self._planned: deque[tuple[Sequence, ...]] = deque()  # who runs, by step not committed
        self._seq_ids = count()

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running)

    @property
    def num_sequences(self) -> int:
        """Sequences that wait or run, those that wait for another's prompt included."""
        followers = sum(len(seq.followers) for seq in (*self.waiting, *self.running))
        return sum(len(_all_beams(seq)) for seq in self.waiting) + len(self.running) + followers

    def add(self, request: Request) -> None:
        """Queue a request; RequestError if it could never be served."""
        request.max_new_tokens = self.admission.room(request)
        num_sequences = request.params.num_sequences
        sequences = [Sequence(next(self._seq_ids), request, i) for i in range(num_sequences)]
        request.sequences = sequences
        if request.params.num_beams > 1:
            beams = Beams(request, sequences)
            for seq in sequences:
                seq.beams = beams
        else:
            sequences[0].followers = sequences[1:]
        self.waiting.append(sequences[0])

    def abort(self, seq: Sequence) -> None:
        """End a sequence that the caller no longer wants, and the beams it is one of; between
        steps only."""
        if seq.status == "finished":
            return
        if seq.beams is not None:
            self._abort_beams(seq.beams)
            return
        leader = seq.request.sequences[0]
        if seq in leader.followers:
            leader.followers.remove(seq)
        elif seq.status == "waiting":
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._release(seq)
        seq.status, seq.finish_reason = "finished", "abort"
        self._queue_first(seq.followers)
        seq.followers = []

    def _abort_beams(self, beams: Beams) -> None:
        if beams.sequences[0].status == "waiting":
            self.waiting.remove(beams.sequences[0])
        else:
            self.running = [seq for seq in self.running if seq.beams is not beams]
            for seq in beams.sequences:
                self._release(seq)
        beams.parents = []
        for seq in beams.sequences:
            seq.status, seq.finish_reason = "finished", "abort"

    def reset(self) -> None:
        """End everything, prefix cache included: a step broke off, so nothing can be trusted. All
        schedulers of a pool are reset together."""
        self.pool.clear()
        for seq in (*self.waiting, *self.running):
            for ended in (*_all_beams(seq), *seq.followers):
                ended.status, ended.finish_reason = "finished", "abort"
                ended.block_ids, ended.followers = [], []
        self.waiting.clear()
        self.running.clear()
        self._branching.clear()
        self._left.clear()
        self._planned.clear()
        self._reset = True

    def plan(self) -> StepPlan | None:
        """Return the next step, or None if there is nothing to compute (now)."""
        assert not self._planned, "commit the step before"
        if self.is_idle:
            return None
        num_preemptions = self.num_preemptions
        branches, sources = self._branch() if self._branching else ((), {})
        new_blocks = self._grow()
        copies: list[tuple[int, int]] = []
        if branches:  # those that still run: `_grow` may have preempted some
            new_of = dict(new_blocks)
            copies += [(block, new_of[id][0]) for id, block in sources.items() if id in new_of]
            branches = tuple(branch for branch in branches if branch.seq_id not in self._left)
        decoding = sum(seq.is_decoding for seq in self.running)
        budget = self.max_num_tokens - decoding

        prefills: list[tuple[int, int]] = []
        if decoding < len(self.running):
            for seq in self.running:
                if not seq.is_decoding and budget:
                    for part, num_tokens in self._chunks(seq, budget):
                        prefills.append((part.id, num_tokens))
                        budget -= num_tokens

        joined: list[Join] = []
        # After a preemption, blocks are for those that still run.
        may_join = num_preemptions == self.num_preemptions
        # Each running sequence may still grow by a block before a new one makes anybody give way.
        reserve = sum(map(self._can_grow, self.running)) if self.waiting else 0
        while may_join and budget and self.waiting and len(self.running) < self.max_batch_size:
            seq = self.waiting[0]
            joining = _all_beams(seq)
            if self.running and len(self.running) + len(joining) > self.max_batch_size:
                break
            if not self._place(seq, copies, reserve):
                break
            self.waiting.popleft()
            for part in joining:
                reserve += self._can_grow(part)
                self.running.append(part)
                part.status = "running"
                joined.append(_join(part))
            for part, num_tokens in self._chunks(seq, budget):
                prefills.append((part.id, num_tokens))
                budget -= num_tokens

        if not (prefills or decoding):
            return None  # schedulers that share the pool hold the blocks
        plan = StepPlan(
            reset=self._reset,
            left=tuple(self._left),
            joined=tuple(joined),
            branches=tuple(branches),
            new_blocks=tuple(new_blocks),
            prefills=tuple(prefills),
            copies=tuple(copies),
        )
        self._reset = False
        self._left.clear()
        self._planned.append(tuple(self.running))
        return plan

    def plan_ahead(self, flying: StepPlan) -> StepPlan | None:
        """Return the step after `flying`, which is not committed yet, if it is the same whatever
        `flying` samples: every sequence computes the token that it samples, and nobody joins. None
        where that is not so, or not certain.

        A sequence that `flying` turns out to have ended then computes a token too many, which
        `commit` throws away. Its blocks are free from then on although that step may still write
        to them: steps run in the order in which they were planned, so whoever has the blocks next
        writes later. What it writes lies behind all that the prefix cache knows of the sequence.
        """
        running, pool = self.running, self.pool
        if not running or not running[0].request.can_run_ahead:
            return None
        if self.waiting and len(running) < self.max_batch_size:
            return None  # who waits may join, once `flying` is committed
        full = full_after(flying, running, pool.block_size)
        if full is None or len(full) > pool.num_free:
            return None
        new_blocks: list[tuple[int, tuple[int, ...]]] = []
        for seq in full:
            new = pool.allocate(1)
            seq.block_ids += new
            new_blocks.append((seq.id, tuple(new)))
        plan = StepPlan(left=tuple(self._left), new_blocks=tuple(new_blocks))
        self._left.clear()
        self._planned.append(tuple(running))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceEvent]:
        """Book what the step computed; return what it brought, in the order of joining, and then
        what finished beams found."""
        events: list[SequenceEvent] = []
        chunks = dict(plan.prefills)
        tokens = iter(result.token_ids)
        logprobs = iter(result.logprobs)
        prompt_logits = {p.seq_id: (p.start, p.logits) for p in result.prompt_logits}
        block_size = self.pool.block_size
        ready: list[Sequence] = []
        has_finished = False
        for seq in self._planned.popleft():
            if seq.status == "finished":  # by the step before, which this one ran ahead of
                next(tokens)
                next(logprobs, None)
                continue
            num_tokens = 1 if seq.is_decoding else chunks.get(seq.id, 0)
            if not num_tokens:
                continue
            seq.num_computed += num_tokens
            if seq.num_computed % block_size < num_tokens:
                self._register_blocks(seq, num_tokens)
            logits = prompt_logits.get(seq.id) if prompt_logits else None
            if seq.num_computed < len(seq.token_ids):
                if logits is not None:
                    events.append(SequenceEvent(seq, prompt_logits=logits))
                continue
            if not seq.is_decoding:
                seq.is_decoding = True
                ready += seq.followers
                seq.followers = []
            token_id = next(tokens)
            logprob: TokenLogprob | None = next(logprobs, None)
            if seq.beams is not None:
                assert logprob is not None, "a beam without candidates"
                if not seq.beams.candidates:
                    self._branching.append(seq.beams)
                seq.beams.candidates.append(logprob)
                continue
            added = seq.append(token_id)
            details = () if logprob is None else (logprob,)
            events.append(SequenceEvent(seq, added, details, seq.finish_reason, logits))
            has_finished = has_finished or seq.finish_reason is not None
        assert next(tokens, None) is None, "more tokens than sequences that sampled"
        self._queue_first(ready)
        for beams in self._branching:
            events += beams.advance()
            has_finished = has_finished or beams.search.is_done

        if has_finished:
            for seq in self.running:
                if seq.finish_reason is not None:
                    self._release(seq)
                    seq.status = "finished"
            self.running = [seq for seq in self.running if seq.finish_reason is None]
        return events

    def check(self) -> None:
        """Assert that no block is lost: the pool, this scheduler's alone, agrees with the
        sequences."""
        self.pool.check(self.tables())

    def tables(self) -> list[list[int]]:
        """The block tables of all running sequences."""
        assert all(not seq.block_ids for seq in self.waiting), "a waiting sequence holds blocks"
        return [seq.block_ids for seq in self.running]

    def _branch(self) -> tuple[tuple[Branch, ...], dict[int, int]]:
        """Give beams the blocks of those they continue; see `Beams.branch`."""
        branches: list[Branch] = []
        sources: dict[int, int] = {}
        for beams in self._branching:
            if beams.parents:  # neither finished nor aborted since
                more_branches, more_sources = beams.branch(self.pool)
                branches += more_branches
                sources |= more_sources
        self._branching.clear()
        return tuple(branches), sources

    def _grow(self) -> list[tuple[int, tuple[int, ...]]]:
        """Give a block to each sequence whose blocks are full, preempting where there is none.

        So too to a beam that lacks its last block (`Beams.branch`), but not to one that waits for
        the first to compute the prompt.
        """
        block_size = self.pool.block_size
        full = [
            s
            for s in self.running
            if s.num_computed >= len(s.block_ids) * block_size and s.is_decoding
        ]
        num_preemptions = self.num_preemptions
        grown: list[tuple[int, tuple[int, ...]]] = []
        for seq in full:
            while seq.status == "running":
                if new := self.pool.allocate(1):
                    seq.block_ids += new
                    grown.append((seq.id, tuple(new)))
                    break
                self._preempt_last()
        if num_preemptions != self.num_preemptions:
            # `full` is in the order of joining: the victims have been given no block, unless they
            # were beams, of which one found none.
            grown = [(seq_id, new) for seq_id, new in grown if seq_id not in self._left]
        return grown

    def _preempt_last(self) -> None:
        """Let the sequence that joined last, and the beams it is one of, wait."""
        parts = _all_beams(self.running[-1])
        for seq in parts:
            self._release(seq)
            seq.num_computed = 0
            seq.is_decoding = False
            seq.status = "waiting"
        del self.running[-len(parts) :]  # beams join side by side
        self.waiting.appendleft(parts[0])
        self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.block_ids)
        seq.block_ids = []
        self._left.append(seq.id)

    def _chunks(self, seq: Sequence, budget: int) -> list[tuple[Sequence, int]]:
        """What a sequence that is not decoding computes next; of beams, the first asks for all."""
        if seq.beams is not None:
            return [] if seq.index else seq.beams.chunks(budget, self.max_chunk)
        num_tokens = min(len(seq.token_ids) - seq.num_computed, self.max_chunk, budget)
        if seq.request.want_prompt_logits:
            num_tokens = min(num_tokens, max(1, seq.request.num_prefill - seq.num_computed))
        return [(seq, num_tokens)]

    def _can_grow(self, seq: Sequence) -> bool:
        """Whether the sequence, at full length, needs more blocks than it has."""
        return seq.max_len - 1 > len(seq.block_ids) * self.pool.block_size

    def _place(self, seq: Sequence, copies: list[tuple[int, int]], reserve: int) -> bool:
        """Find blocks for all tokens that `seq` knows; at least one is left to compute."""
        if seq.beams is not None:
            return seq.beams.place(self.pool, reserve)
        pool, num_known = self.pool, len(seq.token_ids)
        shared, source = self._shared_prompt(seq)
        if source is None and not seq.request.want_prompt_logits:
            shared = pool.match_prefix(seq.token_ids, limit=num_known - 1)
        block_ids = pool.allocate(pool.blocks_for(num_known) - len(shared), shared, reserve)
        if not block_ids:
            return False
        seq.block_ids = block_ids
        seq.num_computed = len(shared) * pool.block_size
        if source is not None:
            seq.num_computed = num_known - 1
            if source != NULL_BLOCK:
                copies.append((source, block_ids[len(shared)]))
        return True

    def _shared_prompt(self, seq: Sequence) -> tuple[list[int], int | None]:
        """Find a sequence to fork from: one of the same request that has computed the prompt.

        Returns the full blocks to share and the block to copy for the tokens after them: the null
        block if there are none, None if there is nobody to fork from.
        """
        request = seq.request
        # A sequence that has tokens of its own resumes alone: it shares the prompt only.
        if request.params.n > 1 and len(seq.token_ids) == seq.num_prompt:
            for parent in request.sequences:
                if parent.is_decoding and parent.status == "running":
                    num_full, tail = divmod(seq.num_prompt - 1, self.pool.block_size)
                    source = parent.block_ids[num_full] if tail else NULL_BLOCK
                    return parent.block_ids[:num_full], source
        return [], None

    def _register_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Offer the blocks that the last `num_tokens` have filled to the prefix cache."""
        block_size = self.pool.block_size
        first = (seq.num_computed - num_tokens) // block_size
        for i in range(first, seq.num_computed // block_size):
            parent = seq.block_ids[i - 1] if i else NULL_BLOCK
            tokens = seq.token_ids[i * block_size : (i + 1) * block_size]
            self.pool.register(seq.block_ids[i], parent, tokens)

    def _queue_first(self, followers: list[Sequence]) -> None:
        """Queue sequences whose prompt is computed before all that came later."""
        self.waiting.extendleft(reversed(followers))


def _all_beams(seq: Sequence) -> list[Sequence]:
    """The beams that a sequence is one of, else itself alone."""
    return [seq] if seq.beams is None else seq.beams.sequences


def _join(seq: Sequence) -> Join:
    request = seq.request
    return Join(
        seq_id=seq.id,
        token_ids=tuple(seq.token_ids),
        num_prompt=seq.num_prompt,
        num_computed=seq.num_computed,
        block_ids=tuple(seq.block_ids),
        params=request.params,
        seed=request.seed,
        stream=seq.index,
        want_prompt_logits=request.want_prompt_logits,
        num_candidates=0 if seq.beams is None else seq.beams.search.num_candidates,
    )
