"""Lowering: from the scheduler's integers to the arrays that the model and the sampler read.

Each session has one `Lowering`. It mirrors the sequences from the deltas of the StepPlans, so that
a plan stays small and a step's arrays are made without a loop over decoding sequences. This is the
only file that knows both a StepPlan and a ForwardBatch; it knows no device. What the sampler reads
is kept in `puna.runtime.lower_sampling`.

Shape suffixes: T tokens in the step, S sequences, L rows wanted as logits, M most blocks a
sequence, R rows of the mirror (one a sequence, in no order), C pairs (of blocks; of row and token).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from puna.batch import ForwardBatch
from puna.ops.sampling import SampleResult, SamplingBatch
from puna.quant import Array
from puna.runtime.lower_sampling import SamplingRows, token_logprobs
from puna.runtime.step import Branch, Join, PromptLogits, StepPlan, StepResult


def _constant(array: Array) -> Array:
    array.setflags(write=False)
    return array


_ONE = np.int32(1)
_NO_COPIES = _constant(np.zeros((0, 2), np.int32))


@dataclass(frozen=True)
class LoweredStep:
    """One step as arrays: copy blocks, run the model on `batch`, sample `sample_logits`."""

    batch: ForwardBatch
    sampling: SamplingBatch
    copies_C2: Array  # int32, (source block, destination block), before the model runs
    sample_rows: Array | None  # rows of L to sample; None: all of them
    prompt_rows: tuple[tuple[int, int, slice], ...]  # (seq_id, first position, rows of L)
    rows: Array = field(repr=False)  # of the mirror, one for each token to be sampled

    def sample_logits(self, logits_LV: Array) -> Array:
        """Pick the rows that are sampled from all the logits that the step computed."""
        return logits_LV if self.sample_rows is None else logits_LV[self.sample_rows]


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What stays the same from one decode step to the next while no sequence joins or leaves."""

    rows: Array
    unknown: Array  # -1 - row
    query_start_S1: Array
    logits_rows_L: Array
    params: Array


class Lowering:
    """The mirror: for each sequence its counts, last token, block table and sampling parameters."""

    def __init__(self, block_size: int, max_batch_size: int, max_seq_len: int) -> None:
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self._in_block = np.arange(block_size, dtype=np.int32)
        self._clear()

    def _clear(self) -> None:
        num_rows = self.max_batch_size
        max_blocks = -(-self.max_seq_len // self.block_size)
        self._row_of: dict[int, int] = {}  # by sequence id
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._order = np.zeros(0, np.int64)  # rows in the order in which their sequences joined
        self._seq_id_R = np.zeros(num_rows, np.int64)
        self._num_known_R = np.zeros(num_rows, np.int32)
        self._num_computed_R = np.zeros(num_rows, np.int32)
        self._num_blocks_R = np.zeros(num_rows, np.int64)
        self._is_decoding_R = np.zeros(num_rows, bool)
        self._last_token_R = np.zeros(num_rows, np.int32)
        self._block_table_RM = np.zeros((num_rows, max_blocks), np.int32)
        self._sampling = SamplingRows(num_rows)
        self._known_tokens: dict[int, Array] = {}  # by row, until the sequence has caught up
        self._prompt_logits: set[int] = set()  # rows
        self._decoding: _Decoding | None = None
        self._newest: LoweredStep | None = None

    def lower(self, plan: StepPlan) -> LoweredStep:
        """Apply a plan to the mirror and return its step."""
        if plan.reset:
            self._clear()
        if plan.left or plan.joined or plan.prefills:
            self._decoding = None
        if plan.left:
            self._leave(plan.left)
        for join in plan.joined:
            self._join(join)
        if plan.branches:
            self._branch(plan.branches)
        for seq_id, block_ids in plan.new_blocks:
            self._append_blocks(self._row_of[seq_id], block_ids)
        step = self._lower(plan) if plan.prefills else self._lower_decode(plan)
        self._newest = step
        return step

    def record(self, step: LoweredStep, sampled: SampleResult, logits_LV: Array) -> StepResult:
        """Take the sampled tokens into the mirror and return the step's result.

        `logits_LV` is read only where a sequence wants the logits of its prompt.
        """
        token_ids = tuple(sampled.token_ids_L.tolist())
        self.take(step, token_ids)
        return StepResult(
            token_ids=token_ids,
            logprobs=token_logprobs(sampled, step.sampling.num_logprobs_L),
            prompt_logits=tuple(
                # A copy: the session may compute the next step's logits in the same memory.
                PromptLogits(seq_id, start, np.array(logits_LV[rows], np.float32))
                for seq_id, start, rows in step.prompt_rows
            ),
        )

    def take(self, step: LoweredStep, token_ids: tuple[int, ...]) -> None:
        """Take the step's sampled tokens into the mirror, perhaps from the rank that has them.

        Steps are taken in the order in which they were lowered. Where another one was lowered
        meanwhile, which ran ahead, it samples a token for each of these sequences that is still
        there: theirs are the last tokens now, and these are not.
        """
        if step is not self._newest:
            return
        self._last_token_R[step.rows] = token_ids
        self._sampling.take(step.rows, token_ids)

    def _leave(self, seq_ids: tuple[int, ...]) -> None:
        for seq_id in seq_ids:
            row = self._row_of.pop(seq_id)
            self._free_rows.append(row)
            self._num_known_R[row] = 0
            self._block_table_RM[row] = 0
            self._known_tokens.pop(row, None)
            self._sampling.leave(row)
            self._prompt_logits.discard(row)
        self._order = self._order[self._num_known_R[self._order] > 0]

    def _join(self, join: Join) -> None:
        assert join.seq_id not in self._row_of, f"sequence {join.seq_id} joins twice"
        row = self._free_rows.pop()
        self._row_of[join.seq_id] = row
        self._order = np.append(self._order, row)
        self._seq_id_R[row] = join.seq_id
        self._num_known_R[row] = len(join.token_ids)
        self._num_computed_R[row] = join.num_computed
        self._num_blocks_R[row] = 0
        self._is_decoding_R[row] = False
        self._append_blocks(row, join.block_ids)
        self._sampling.join(row, join)
        self._known_tokens[row] = np.array(join.token_ids, np.int32)
        if join.want_prompt_logits:
            self._prompt_logits.add(row)

    def _branch(self, branches: tuple[Branch, ...]) -> None:
        """Let beams continue others, or themselves: whatever is read is read before it is written.

        What a table holds after the shared blocks is overwritten by new blocks of the same plan.
        """
        rows = [self._row_of[branch.seq_id] for branch in branches]
        parents = [self._row_of[branch.parent_id] for branch in branches]
        if not self._is_decoding_R[rows].all():
            self._decoding = None
            self._is_decoding_R[rows] = True
        self._block_table_RM[rows] = self._block_table_RM[parents]
        self._num_blocks_R[rows] = [branch.num_blocks for branch in branches]
        self._num_computed_R[rows] = self._num_computed_R[parents]
        self._num_known_R[rows] = self._num_known_R[parents]
        self._last_token_R[rows] = [branch.token_id for branch in branches]
        self._sampling.branch(rows, parents, branches)
        for row in rows:
            self._known_tokens.pop(row, None)

    def _append_blocks(self, row: int, block_ids: tuple[int, ...]) -> None:
        start = int(self._num_blocks_R[row])
        self._block_table_RM[row, start : start + len(block_ids)] = block_ids
        self._num_blocks_R[row] = start + len(block_ids)

    def _lower_decode(self, plan: StepPlan) -> LoweredStep:
        """What `_lower` would return for a step in which each sequence computes its last token.

        Most steps are of this kind, and Python's share of them is to be small.
        """
        if self._decoding is None:
            rows = self._order[self._is_decoding_R[self._order]]
            starts = np.arange(len(rows) + 1, dtype=np.int32)
            self._decoding = _Decoding(
                rows, -1 - rows, starts, starts[:-1], self._sampling.params(rows)
            )
        same = self._decoding
        rows = same.rows
        positions_T = self._num_computed_R[rows]
        seq_lens_S = positions_T + _ONE
        num_blocks = 1 + max(positions_T.tolist()) // self.block_size
        step = LoweredStep(
            batch=ForwardBatch(
                token_ids_T=self._last_token_R[rows],
                positions_T=positions_T,
                slots_T=self._slots(rows),
                query_start_S1=same.query_start_S1,
                seq_lens_S=seq_lens_S,
                block_table_SM=self._block_table_RM[rows, :num_blocks],
                logits_rows_L=same.logits_rows_L,
            ),
            sampling=self._sampling.batch(rows, same.params, seq_lens_S),
            copies_C2=_copies(plan),
            sample_rows=None,
            prompt_rows=(),
            rows=rows,
        )
        self._num_computed_R[rows] = seq_lens_S
        self._num_known_R[rows] += _ONE
        self._last_token_R[rows] = same.unknown
        return step

    def _slots(self, rows: Array) -> Array:
        """The slot of each row's next token."""
        positions = self._num_computed_R[rows]
        blocks = positions // self.block_size
        slots = self._block_table_RM[rows, blocks] * self.block_size
        slots += positions - blocks * self.block_size
        return slots

    def _slots_of(self, row: int, start: int, stop: int) -> Array:
        """The slots of a row's tokens from the start-th to the one before the stop-th."""
        size = self.block_size
        first, last = start // size, -(-stop // size)
        slots = self._block_table_RM[row, first:last, None] * size + self._in_block
        return slots.reshape(-1)[start - first * size : stop - first * size]

    def _lower(self, plan: StepPlan) -> LoweredStep:
        num_tokens_R = self._is_decoding_R.astype(np.int32)
        prefills = {self._row_of[seq_id]: num_tokens for seq_id, num_tokens in plan.prefills}
        for row, num_tokens in prefills.items():
            num_tokens_R[row] = num_tokens
        rows_S = self._order[num_tokens_R[self._order] > 0]
        num_tokens_S, num_computed_S = num_tokens_R[rows_S], self._num_computed_R[rows_S]
        seq_lens_S = num_computed_S + num_tokens_S
        query_start_S1 = np.zeros(len(rows_S) + 1, np.int32)
        num_tokens_S.cumsum(out=query_start_S1[1:])
        index_of = {row: i for i, row in enumerate(rows_S.tolist()) if row in prefills}

        token_ids_T, positions_T, slots_T = np.empty((3, query_start_S1[-1]), np.int32)
        if len(index_of) < len(rows_S):
            is_decoding_S = self._is_decoding_R[rows_S]
            rows, places = rows_S[is_decoding_S], query_start_S1[:-1][is_decoding_S]
            token_ids_T[places] = self._last_token_R[rows]
            positions_T[places] = self._num_computed_R[rows]
            slots_T[places] = self._slots(rows)
        for row, i in index_of.items():
            here = slice(query_start_S1[i], query_start_S1[i + 1])
            start, stop = int(num_computed_S[i]), int(seq_lens_S[i])
            token_ids_T[here] = self._known_tokens[row][start:stop]
            positions_T[here] = np.arange(start, stop, dtype=np.int32)
            slots_T[here] = self._slots_of(row, start, stop)
        num_blocks = -(-int(seq_lens_S.max()) // self.block_size)

        has_caught_up_S = seq_lens_S == self._num_known_R[rows_S]
        logits_rows_L, sample_rows, prompt_rows = self._logits_rows(
            query_start_S1, has_caught_up_S, index_of, num_computed_S
        )
        batch = ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slots_T=slots_T,
            query_start_S1=query_start_S1,
            seq_lens_S=seq_lens_S,
            block_table_SM=self._block_table_RM[rows_S, :num_blocks],
            logits_rows_L=logits_rows_L.astype(np.int32),
        )
        rows = rows_S[has_caught_up_S]
        step = LoweredStep(
            batch=batch,
            sampling=self._sampling.batch(
                rows, self._sampling.params(rows), seq_lens_S[has_caught_up_S]
            ),
            copies_C2=_copies(plan),
            sample_rows=sample_rows,
            prompt_rows=prompt_rows,
            rows=rows,
        )
        # The step's effect on the mirror, but for the values of the tokens: see `record`.
        self._num_computed_R[rows_S] = seq_lens_S
        self._num_known_R[rows] += 1
        self._last_token_R[rows] = -1 - rows  # until `take` is told
        self._is_decoding_R[rows] = True
        for row in index_of:
            if self._is_decoding_R[row]:
                del self._known_tokens[row]
        return step

    def _logits_rows(
        self,
        query_start_S1: Array,
        has_caught_up_S: Array,
        index_of: dict[int, int],
        num_computed_S: Array,
    ) -> tuple[Array, Array | None, tuple[tuple[int, int, slice], ...]]:
        """Rows of T whose logits are wanted, which of them are sampled, which are a prompt's."""
        last_rows_S = query_start_S1[1:] - 1
        wanted = [i for row, i in index_of.items() if row in self._prompt_logits]
        if not wanted:
            return last_rows_S[has_caught_up_S], None, ()
        is_wanted_T = np.zeros(query_start_S1[-1], bool)
        is_wanted_T[last_rows_S[has_caught_up_S]] = True
        for i in wanted:
            is_wanted_T[query_start_S1[i] : query_start_S1[i + 1]] = True
        row_of_T = np.cumsum(is_wanted_T) - 1  # of L, where wanted
        seq_id_of = {i: int(self._seq_id_R[row]) for row, i in index_of.items()}
        prompt_rows = tuple(
            (
                seq_id_of[i],
                int(num_computed_S[i]),
                slice(int(row_of_T[query_start_S1[i]]), int(row_of_T[last_rows_S[i]]) + 1),
            )
            for i in wanted
        )
        return np.flatnonzero(is_wanted_T), row_of_T[last_rows_S[has_caught_up_S]], prompt_rows


def _copies(plan: StepPlan) -> Array:
    return np.array(plan.copies, np.int32).reshape(-1, 2) if plan.copies else _NO_COPIES
