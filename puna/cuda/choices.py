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
    `stream_k`: products of a target's own (`puna.cuda.stream_k`) in place of both, for as many
    tokens as they are for; `swiglu_tokens`: from so many tokens on gate and up are one kernel with
    SiLU, where the target has one. Both are off until they have been measured on a GPU.
    """

    direct_tokens: int = 64
    decode_programs: int = 528
    overlaps: bool = True
    stream_k: bool = False
    swiglu_tokens: int | None = None
