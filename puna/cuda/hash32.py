"""The hash of `puna.dummy_values` on torch's int32, whose arithmetic wraps on every device.

A shift to the right keeps the sign there, so what it brings in is masked out.
"""

from __future__ import annotations

from typing import Any

import torch

from puna.dummy_values import MULTIPLIERS

Tensor = Any  # a torch.Tensor


def mix32(x: Tensor, spare: Tensor) -> None:
    """`puna.dummy_values.mix32` in place; `spare` is scratch of x's shape and dtype."""
    for shift, multiplier in ((16, MULTIPLIERS[0]), (15, MULTIPLIERS[1]), (16, None)):
        torch.bitwise_right_shift(x, shift, out=spare)
        spare &= (1 << (32 - shift)) - 1
        x ^= spare
        if multiplier is not None:
            x *= signed(int(multiplier))


def signed(word: int) -> int:
    """A 32-bit word as int32 has it."""
    return word - 2**32 if word >= 2**31 else word
