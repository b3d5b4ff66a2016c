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
    # 7B, 24, 32, 48 and 64 sequences at context 192: 4.97 (at 128), 5.14, 7.77 and 6.52 ms a step
    # without, 4.42, 4.92, 5.91 and 6.57 with; 8B, 64: 5.55 and 5.77 (H200, 2026-11-26).
    stream_k_tokens: int = 64
    # 7B, first of 2,048 tokens: 43.25 to 42.5 ms; of 1,024: 21.1 to 21.25, worse (same machine).
    swiglu_tokens: int | None = 2048
    attend_seqs: int = 64
