"""ForwardBatch: one step's complete input to the model, as arrays. The model reads nothing else.

Shape suffixes: T tokens in the step, S sequences, L rows wanted as logits, M blocks a sequence
(most).
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.quant import Array


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Tokens of all sequences of a step, packed one after the other; all arrays int32.

    The tokens of sequence s are rows query_start_S1[s] to query_start_S1[s + 1]; they are the last
    of its seq_lens_S[s] tokens of context. Block 0 of the KV cache is never read.
    """

    token_ids_T: Array  # -1 - row: the token last sampled for that row, which the device knows
    positions_T: Array
    slots_T: Array  # where the token's K and V go: block * block_size + offset
    query_start_S1: Array
    seq_lens_S: Array  # context length, this step's tokens included
    block_table_SM: Array  # unused entries are 0
    logits_rows_L: Array  # rows of T whose logits are wanted, ascending
    # Every token is a sequence of its own, the last of its context: a backend may have faster
    # kernels for that. Only said of a batch that stays so as long as its program is used.
    is_decode: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_S)
