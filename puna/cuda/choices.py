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
    `stream_k_tokens`: up to so many tokens products of a target's own (`puna.cuda.stream_k`) stand
    in for the skinny ones, where it has some. `swiglu_tokens`: from so many tokens on gate and up
    are one kernel with SiLU, where the target has one. `attend_seqs`: up to so many sequences a
    decode batch attends by a kernel of the target's own, where it has one.
    """

    direct_tokens: int = 64
    decode_programs: int = 528
    overlaps: bool = True
    # Without these and `attend_seqs`, and with them, ms a step at context 192: 7B, 24, 32 and 64
    # sequences 5.17, 5.12 and 6.45, and 4.50, 4.78 and 6.02; 8B, 48 and 64 6.78 and 5.57, and 5.18
    # and 5.45; 1B, 64 1.30, and 1.34 (H200, 2026-11-26).
    stream_k_tokens: int = 64
    # 7B, first of 2,048 tokens: 43.25 to 42.5 ms; of 1,024: 21.1 to 21.25, worse (same machine).
    swiglu_tokens: int | None = 2048
    attend_seqs: int = 64
