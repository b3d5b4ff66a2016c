"""Attend: decode attention of sm_90 (csrc/attend_sm90.cu), given rotated queries and a cache to
which keys and values have been appended.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.attend_plan import MAX_SEQS, has_attend
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import CacheMaps
from puna.engine import EngineConfig
from puna.ops import LayerCache

Tensor = Any


class Attend:
    """Over a session's workspace. `num_ctas`: multiprocessors of the GPU."""

    most_seqs = MAX_SEQS

    def __init__(
        self, kernels: Kernels, driver: Driver, arrays: dict[str, Tensor], num_ctas: int
    ) -> None:
        assert num_ctas <= len(arrays["attend_counts"]), num_ctas
        self._kernels = kernels
        self._maps = CacheMaps(driver)
        self._arrays = arrays
        self._num_ctas = num_ctas

    def attend(
        self, q_SQ: Tensor, batch: ForwardBatch, cache: LayerCache, out_SQ: Tensor, overlaps: bool
    ) -> None:
        """Zeros for sequences without context. `overlaps` as in `Kernels.launch`."""
        given = q_SQ, *self._of_cache(cache), batch.slots_T, *self._of_batch(batch, out_SQ)
        self._kernels.launch("attend", (self._num_ctas, 1, 1), given, overlaps)

    def attend_fresh(
        self, batch: ForwardBatch, cache: LayerCache, out_SQ: Tensor, layer: int
    ) -> None:
        """Of what the kernel in front computes, the projection of few tokens: it is told of each
        number as it is there. `layer`: that kernel's."""
        arrays = self._arrays
        given = arrays["fused_fresh"], *self._of_cache(cache), arrays["fused_epoch"]
        given += *self._of_batch(batch, out_SQ), layer, arrays["fused_error"]
        self._kernels.launch("attend_fresh", (self._num_ctas, 1, 1), given, True)

    def _of_cache(self, cache: LayerCache) -> tuple[Tensor | TensorMap, ...]:
        arrays = cache.keys_NKEP, cache.values_NKPE
        return *arrays, *(self._maps.cache(array) for array in arrays)

    def _of_batch(self, batch: ForwardBatch, out_SQ: Tensor) -> tuple[Tensor | int, ...]:
        lens_S, table_SM = batch.seq_lens_S, batch.block_table_SM
        scratch = self._arrays["attend_pieces"], self._arrays["attend_counts"]
        return lens_S, table_SM, out_SQ, *scratch, table_SM.shape[1], len(lens_S)


def attend(
    config: EngineConfig,
    kernels: Kernels,
    driver: Driver,
    arrays: dict[str, Tensor],
    num_ctas: int,
) -> Attend | None:
    """None where the engine has no such kernel."""
    return Attend(kernels, driver, arrays, num_ctas) if has_attend(config) else None
