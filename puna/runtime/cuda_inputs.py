"""A step's inputs on a GPU: which recorded shape a step takes, and its integers in one buffer.

A step is padded to one of few shapes, each recorded once. Its arrays lie one after the other in one
buffer of int32, so that one copy brings all of them to the GPU. Decides shapes, places and what
padding holds; knows no torch.

Padding: tokens with position 0 whose slots are those of block 0, which is never read, and which
belong to no sequence; sequences without tokens or context; logits of the first row that are
sampled for nobody (row -1).

Shape suffixes as in `puna.runtime.lower`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.engine import Limits
from puna.quant import Array
from puna.runtime.lower import LoweredStep

_ALIGNMENT = 4  # numbers: 16 bytes


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a program is recorded for. `num_logits` 0: the stream alone, because more logits are
    wanted than fit."""

    num_tokens: int
    num_seqs: int
    num_logits: int
    is_decode: bool  # every token is a sequence of its own


def decode_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Numbers of sequences that decode steps are padded to, the last of them the most."""
    small = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    return _up_to(max_batch_size, (*small, *range(96, max_batch_size + 32, 32)))


def prefill_sizes(max_num_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens that other steps are padded to: at most an eighth is padding, from 128
    tokens on."""
    sizes = (*range(16, 128, 16), *range(128, 512, 32), *range(512, 1024, 64))
    return _up_to(max_num_tokens, (*sizes, *range(1024, max_num_tokens + 128, 128)))


def _up_to(most: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)


class StepShapes:
    """The shapes of an engine with these limits."""

    def __init__(self, limits: Limits) -> None:
        self.most_seqs = limits.max_batch_size
        sizes = _next_of(decode_sizes(limits.max_batch_size))
        self._decode = tuple(StepShape(size, size, size, True) for size in sizes)
        self._prefill = _next_of(prefill_sizes(limits.max_num_tokens))

    def decode(self, num_seqs: int) -> StepShape:
        return self._decode[num_seqs]

    def of(self, step: LoweredStep) -> StepShape:
        """The smallest shape that a step fits."""
        batch = step.batch
        num_tokens, num_logits = batch.num_tokens, len(batch.logits_rows_L)
        if num_tokens == batch.num_seqs:
            return self.decode(num_tokens)
        most_logits = 1 if num_logits <= 1 else self.most_seqs
        if num_logits > self.most_seqs:
            most_logits = 0  # those of a prompt's positions
        return StepShape(self._prefill[num_tokens], self.most_seqs, most_logits, False)


def _next_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """For each number up to the largest size, the smallest size that is not below it."""
    return tuple(next(size for size in sizes if size >= n) for n in range(sizes[-1] + 1))


@dataclass(frozen=True, slots=True)
class InputPlaces:
    """Where each array of a shape begins in the buffer."""

    shape: StepShape
    max_blocks: int
    token_ids: int
    positions: int
    slots: int
    query_start: int
    seq_lens: int
    logits_rows: int
    rows: int  # of the mirror: whose last token is sampled from these logits; -1: nobody's
    block_table: int

    @classmethod
    def of(cls, shape: StepShape, max_blocks: int) -> InputPlaces:
        tokens, seqs, logits = shape.num_tokens, shape.num_seqs, shape.num_logits
        sizes = {
            "token_ids": tokens,
            "positions": tokens,
            "slots": tokens,
            "query_start": seqs + 1,
            "seq_lens": seqs,
            "logits_rows": logits,
            "rows": logits,
        }
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return cls(shape, max_blocks, **starts, block_table=end)

    @property
    def num_ints(self) -> int:
        return self.block_table + self.shape.num_seqs * self.max_blocks


def most_ints(limits: Limits) -> int:
    """The size of a buffer that every shape's inputs fit into."""
    shapes, max_blocks = StepShapes(limits), -(-limits.max_seq_len // limits.block_size)
    seqs = shapes.most_seqs
    largest = (shapes.decode(seqs), StepShape(limits.max_num_tokens, seqs, seqs, False))
    return max(InputPlaces.of(shape, max_blocks).num_ints for shape in largest)


class InputWriter:
    """Writes steps of one shape to a buffer."""

    def __init__(self, buffer: Array, places: InputPlaces, block_size: int) -> None:
        shape = places.shape
        tokens, seqs, logits = shape.num_tokens, shape.num_seqs, shape.num_logits

        def view(start: int, size: int) -> Array:
            return buffer[start : start + size]

        self._token_ids_T = view(places.token_ids, tokens)
        self._positions_T = view(places.positions, tokens)
        self._slots_T = view(places.slots, tokens)
        self._query_start_S1 = view(places.query_start, seqs + 1)
        self._seq_lens_S = view(places.seq_lens, seqs)
        self._logits_rows_L = view(places.logits_rows, logits)
        self._rows_L = view(places.rows, logits)
        table = view(places.block_table, seqs * places.max_blocks)
        self._block_table_SM = table.reshape(seqs, places.max_blocks)
        self._padding_slots_T = np.arange(tokens, dtype=np.int32) % np.int32(block_size)

    def write(self, step: LoweredStep) -> None:
        """Write a step and its padding; what was there before is gone."""
        batch = step.batch
        num_tokens, num_seqs = batch.num_tokens, batch.num_seqs
        self._token_ids_T[:num_tokens] = batch.token_ids_T
        self._positions_T[:num_tokens] = batch.positions_T
        self._slots_T[:num_tokens] = batch.slots_T
        self._query_start_S1[: num_seqs + 1] = batch.query_start_S1
        self._seq_lens_S[:num_seqs] = batch.seq_lens_S
        num_blocks = batch.block_table_SM.shape[1]
        self._block_table_SM[:num_seqs, :num_blocks] = batch.block_table_SM
        self._block_table_SM[:num_seqs, num_blocks:] = 0
        if num_tokens < len(self._token_ids_T):
            self._token_ids_T[num_tokens:] = 0
            self._positions_T[num_tokens:] = 0
            self._slots_T[num_tokens:] = self._padding_slots_T[num_tokens:]
        if num_seqs < len(self._seq_lens_S):
            self._query_start_S1[num_seqs + 1 :] = num_tokens
            self._seq_lens_S[num_seqs:] = 0
            self._block_table_SM[num_seqs:] = 0
        if len(self._rows_L):
            num_logits = len(batch.logits_rows_L)
            self._logits_rows_L[:num_logits] = batch.logits_rows_L
            self._logits_rows_L[num_logits:] = 0
            # Beside logits of prompts nothing is sampled on the GPU.
            num_sampled = 0 if step.prompt_rows else num_logits
            self._rows_L[:num_sampled] = step.rows[:num_sampled]
            self._rows_L[num_sampled:] = -1
