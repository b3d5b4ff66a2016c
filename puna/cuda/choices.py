"""Choices: which implementation an operation gets, by the number of tokens. Tuned by hand.

The runtime never tunes; what is here was measured, and says where and when.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choices:
    """Bounds between implementations.

    `direct_tokens`: up to so many tokens products are skinny kernels that add into the residual,
    beyond it cuBLAS. `biased_tokens`: up to so many cuBLAS adds a bias of zeros, since torch takes
    cublasLt then, which chooses faster kernels. `decode_programs`: attention of a decode batch is
    shared out among about so many programs. `overlaps`: a kernel may start before the one in front
    of it has ended, where both are puna's. `swiglu_tokens`: from so many tokens on gate and up are
    one kernel with SiLU, where the target has one.
    """

    direct_tokens: int = 64
    # Prompts of so many tokens, ms without and with it. 7B, float16: 80 4.64 and 4.39, 128 4.73
    # and 4.68, 160 5.20 and 4.95, 192 5.58 and 5.24, 224 6.01 and 5.89, 256 6.08 and 6.17. 8B,
    # bfloat16: 96 5.10 and 4.91, 192 6.15 and 6.13 (H200, 2026-11-27).
    biased_tokens: int = 224
    decode_programs: int = 528
    overlaps: bool = True
    # 7B, first of 2,048 tokens: 43.25 to 42.5 ms; of 1,024: 21.1 to 21.25, worse (same machine).
    swiglu_tokens: int | None = 2048
