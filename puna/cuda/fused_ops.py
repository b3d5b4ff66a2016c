"""Which fused operations an engine's target has."""

from __future__ import annotations

from typing import Any

from puna.cuda.attend import Attend
from puna.cuda.driver import Driver
from puna.cuda.fused import FusedDecode
from puna.cuda.fused_plan import has_fused
from puna.cuda.interfaces import FusedOps, Kernels
from puna.cuda.shapes import fused_shapes
from puna.cuda.wide import WideDecode
from puna.cuda.wide_plan import has_wide, variants
from puna.engine import EngineConfig

Tensor = Any


def fused_ops(
    config: EngineConfig, kernels: Kernels, driver: Driver, arrays: dict[str, Tensor], num_ctas: int
) -> tuple[tuple[int, FusedOps], ...]:
    """Each with the number of tokens up to which it is used. `num_ctas`: multiprocessors of the
    GPU."""
    given = kernels, driver, arrays, num_ctas
    found: list[tuple[int, FusedOps]] = []
    if has_fused(config):
        found.append((1, FusedDecode(fused_shapes(config), *given)))
    if has_wide(config):
        found.append((variants(config)[-1], WideDecode(config, *given, Attend(*given))))
    return tuple(found)
