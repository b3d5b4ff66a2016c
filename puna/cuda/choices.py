"""Choices: which implementation an operation gets, by the number of tokens. Tuned by hand.

The runtime never tunes; what is here was measured, and says where and when.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choices:
    """Bounds between implementations.

    `direct_tokens`: up to so many tokens products are skinny kernels that add into the residual,
    beyond it cuBLAS. `fused_tokens`: up to so many tokens of a decode batch the target's fused
    kernels run, where it has any. `decode_programs`: attention of a decode batch is shared out
    among about so many programs. `overlaps`: kernels may start before those in front have ended.
    """

    direct_tokens: int = 64
    fused_tokens: int = 0
    decode_programs: int = 528
    overlaps: bool = True


def choices_for(fused_rows: tuple[int, ...]) -> Choices:
    """The table. `fused_rows`: as `puna.cuda.fused_plan` has it."""
    return Choices(fused_tokens=max(fused_rows, default=0))
