"""Choices: which implementation an operation gets, by the number of tokens. Tuned by hand.

The runtime never tunes; what is here was measured, and says where and when.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choices:
    """Bounds between implementations.

    `direct_tokens`: up to so many tokens products are skinny kernels that add into the residual,
    beyond it cuBLAS. `decode_programs`: attention of a decode batch is shared out
    among about so many programs. `overlaps`: kernels may start before those in front have ended.
    `swiglu_tokens`: from so many tokens on gate and up are one kernel with SiLU, where the target
    has one.
    """

    direct_tokens: int = 64
    decode_programs: int = 528
    overlaps: bool = True
    # 7B, first of 2,048 tokens: 43.25 to 42.5 ms; of 1,024: 21.1 to 21.25, worse (same machine).
    swiglu_tokens: int | None = 2048
