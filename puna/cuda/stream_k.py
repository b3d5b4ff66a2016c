"""StreamK: products of sm_90 for 17 to 64 tokens (csrc/stream_k_sm90.cu), in parts.

Decides which of the compiled variants runs, and with what. Who reads a product adds its parts:
`cut` tells how many there are (`puna.cuda.stream_k_plan`).

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from typing import Any

from puna.cuda.driver import Driver, TensorMap
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import TensorMaps
from puna.cuda.stream_k_plan import (
    BLOCK_ROWS,
    CHUNK_COLS,
    PART_TOKENS,
    TOKENS,
    stream_k_cuts,
)
from puna.engine import EngineConfig

Tensor = Any

_NONE = 0  # an address


class StreamK:
    """The products of an engine that has such cuts. `parts` is `stream_k_parts` of the workspace;
    `num_multiprocessors`: of the GPU."""

    most_tokens = PART_TOKENS

    def __init__(
        self,
        config: EngineConfig,
        kernels: Kernels,
        driver: Driver,
        parts: Tensor,
        num_multiprocessors: int,
    ) -> None:
        self.parts = parts
        self._num_multiprocessors = num_multiprocessors
        self._cuts = stream_k_cuts(config)
        self._kernels = kernels
        self._maps = TensorMaps(driver)

    def cut(self, role: str) -> tuple[int, int]:
        """Of a role's product: CTAs, and chunks of a block."""
        cut = self._cuts[role]
        return cut.num_ctas(self._num_multiprocessors), cut.num_chunks

    def product(
        self, role: str, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, overlaps: bool
    ) -> None:
        """`parts` = x W^T + bias, of which the parts of a block hold what is not zero."""
        bias, (num_ctas, _) = _NONE if bias_N is None else bias_N, self.cut(role)
        self._launch(role, x_MK, weight_NK, bias, self.parts, num_ctas, False, overlaps)

    def logits(self, x_LK: Tensor, weight_NK: Tensor, logits_LV: Tensor, overlaps: bool) -> None:
        """logits = x W^T, whole."""
        num_ctas = min(self._cuts["head"].num_blocks, self._num_multiprocessors)
        self._launch("head", x_LK, weight_NK, _NONE, logits_LV, num_ctas, True, overlaps)

    def _launch(
        self,
        role: str,
        x_MK: Tensor,
        weight_NK: Tensor,
        bias: Tensor | int,
        out: Tensor,
        num_ctas: int,
        is_whole: bool,
        overlaps: bool,
    ) -> None:
        cut = self._cuts[role]
        tokens = next(tokens for tokens in TOKENS if len(x_MK) <= tokens)
        arguments = (
            self._map(weight_NK, BLOCK_ROWS),
            self._map(x_MK, tokens),
            bias,
            out,
            len(x_MK),
            cut.num_rows,
            cut.num_blocks,
            cut.num_chunks,
            int(is_whole),
        )
        # Attention is resident beside the products in front of it and behind it.
        beside = "_beside" if role in ("qkv", "o") else ""
        name, grid = f"stream_k_{tokens}{beside}", (num_ctas, 1, 1)
        self._kernels.launch(name, grid, arguments, overlaps)

    def _map(self, array_NK: Tensor, num_rows: int) -> TensorMap:
        """Rows beyond those of the array are zeros."""
        dims = array_NK.shape[1], len(array_NK), 1
        return self._maps.get(array_NK, dims, (CHUNK_COLS, num_rows, 1), is_swizzled=True)


def stream_k(
    config: EngineConfig,
    kernels: Kernels,
    driver: Driver,
    arrays: dict[str, Tensor],
    num_multiprocessors: int,
) -> StreamK | None:
    """None where the engine has no such products."""
    if not stream_k_cuts(config):
        return None
    return StreamK(config, kernels, driver, arrays["stream_k_parts"], num_multiprocessors)
