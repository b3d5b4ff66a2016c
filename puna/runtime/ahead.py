"""Running ahead: when the step after one that is in flight is certain before that one has ended.

Knows sequences and blocks. What is done with the answer is the scheduler's.
"""

from __future__ import annotations

from puna.runtime.request import Sequence
from puna.runtime.step import StepPlan


def full_after(flying: StepPlan, running: list[Sequence], block_size: int) -> list[Sequence] | None:
    """The sequences that need another block for the step after `flying`, if each of `running`
    decodes in that step whatever `flying` samples, but for an end token. None where that is not so:
    one is still reading its prompt, or others wait for it to have read it; one ends by its length;
    or one is sampled in a way that needs its tokens here first."""
    chunks = dict(flying.prefills)
    full: list[Sequence] = []
    for seq in running:
        # What `flying` computes, after which it samples one token more.
        num_computed = seq.num_computed + (1 if seq.is_decoding else chunks.get(seq.id, 0))
        if (
            num_computed < len(seq.token_ids)
            or num_computed + 1 >= seq.max_len
            or seq.followers
            or not seq.request.can_run_ahead
        ):
            return None
        if num_computed >= len(seq.block_ids) * block_size:
            full.append(seq)
    return full
