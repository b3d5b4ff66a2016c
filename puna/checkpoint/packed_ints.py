"""Integers of 4 or 8 bits packed into int32 words, as GPTQ, AWQ and compressed-tensors store them.

Decides how words become numbers; knows neither names nor what the numbers mean. The first number of
a word is in its lowest bits.

Shape suffixes: N output rows, X columns (inputs or groups); L lines of words, J words a line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.checkpoint.stored import span
from puna.quant import Array


@dataclass(frozen=True)
class PackedInts:
    """A matrix [N, X] of unsigned numbers. A word packs neighbours: of a row, or of a column.

    `words_LJ` (uint32, a view of the file) has a line for each row, each word holding consecutive
    columns; with `is_by_column` a line for each column, each word holding consecutive rows. `size`
    is how many numbers a line has: the last word may have room for more. `order` says which
    neighbour each field of a word is (empty: as they come). `added` is added to every word, modulo
    2^32, before its fields are read.
    """

    words_LJ: Array
    bits: int
    size: int
    is_by_column: bool = False
    order: tuple[int, ...] = ()
    added: int = 0

    @property
    def a_word(self) -> int:
        """Numbers a word."""
        return 32 // self.bits

    def unpack(self, rows: slice, cols: slice) -> Array:
        """uint8 [N, X] of a slice."""
        fields, lines = (rows, cols) if self.is_by_column else (cols, rows)
        first, last = span(fields, self.size)
        word = first // self.a_word
        words_LJ = self.words_LJ[lines, word : -(-last // self.a_word)]
        words_LJ = np.ascontiguousarray(words_LJ, np.dtype("<u4")) + np.uint32(self.added)
        num_lines, num_words = words_LJ.shape
        out_LX = words_LJ.view(np.uint8).reshape(num_lines, 4 * num_words)
        if self.bits == 4:
            out_LX = np.stack((out_LX & 15, out_LX >> 4), axis=2)
        if self.order:
            fields_LJF = out_LX.reshape(num_lines, num_words, self.a_word)
            out_LX = fields_LJF[:, :, np.argsort(self.order)]
        out_LX = out_LX.reshape(num_lines, num_words * self.a_word)
        skip = first - word * self.a_word
        out_LX = out_LX[:, skip : skip + last - first]
        return out_LX.T if self.is_by_column else out_LX

    def holds_only(self, number: int) -> bool:
        """Whether every number is `number`; compares words, which unpacks nothing."""
        pattern = number * (0xFFFFFFFF // (2**self.bits - 1))
        num_whole, num_left = divmod(self.size, self.a_word)
        wanted = np.uint32((pattern - self.added) % 2**32)
        if not (self.words_LJ[:, :num_whole] == wanted).all():
            return False
        assert not (num_left and self.order), "a line of reordered fields has whole words only"
        mask = np.uint32((1 << num_left * self.bits) - 1)
        rest_LJ = self.words_LJ[:, num_whole:] + np.uint32(self.added)
        return bool(((rest_LJ & mask) == (np.uint32(pattern) & mask)).all())
