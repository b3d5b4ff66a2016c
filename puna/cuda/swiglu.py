"""Swiglu: gate_up of many tokens on sm_90 as one kernel (csrc/swiglu_sm90.cu)."""

from __future__ import annotations

from typing import Any

from puna.cuda.driver import Driver
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import TensorMaps
from puna.cuda.swiglu_plan import CHUNK_COLS, CLUSTER, TILE_ROWS, TILE_TOKENS, has_swiglu
from puna.engine import EngineConfig

Tensor = Any

_NONE = 0  # an address


class Swiglu:
    """`num_multiprocessors`: of the GPU."""

    def __init__(self, kernels: Kernels, driver: Driver, num_multiprocessors: int) -> None:
        self._kernels = kernels
        self._num_ctas = num_multiprocessors // CLUSTER * CLUSTER
        self._maps = TensorMaps(driver)

    def gate_up(
        self,
        x_TK: Tensor,
        weight_XK: Tensor,
        bias_N: Tensor | None,
        act_TF: Tensor,
        overlaps: bool,
    ) -> None:
        """act = silu(gate) * up, where the rows of `weight` are those of gate, then as many of up,
        each padded. `overlaps` as in `Kernels.launch`."""
        num_tokens, ffn = act_TF.shape
        (num_rows, num_cols), up_at = weight_XK.shape, len(weight_XK) // 2
        arguments = (
            self._maps.get(
                weight_XK, (num_cols, num_rows, 1), (CHUNK_COLS, TILE_ROWS, 1), is_swizzled=True
            ),
            self._maps.get(
                x_TK, (num_cols, num_tokens, 1), (CHUNK_COLS, TILE_TOKENS, 1), is_swizzled=True
            ),
            _NONE if bias_N is None else bias_N,
            act_TF,
            num_tokens,
            ffn,
            up_at,
            num_cols // CHUNK_COLS,
        )
        self._kernels.launch("swiglu", (self._num_ctas, 1, 1), arguments, overlaps)


def swiglu(
    config: EngineConfig, kernels: Kernels, driver: Driver, num_multiprocessors: int
) -> Swiglu | None:
    """None where the engine has no such kernel."""
    return Swiglu(kernels, driver, num_multiprocessors) if has_swiglu(config) else None
