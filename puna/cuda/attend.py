"""Attend: decode attention of sm_90 (csrc/attend_sm90.cu), given rotated queries and a cache to
which keys and values have been appended.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.attend_plan import EIGHT
from puna.cuda.driver import Driver
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import CacheMaps
from puna.ops import LayerCache

Tensor = Any


class Attend:
    """Over a session's workspace. `num_ctas`: multiprocessors of the GPU."""

    def __init__(
        self, kernels: Kernels, driver: Driver, arrays: dict[str, Tensor], num_ctas: int
    ) -> None:
        assert num_ctas <= len(arrays["attend_counts"]), num_ctas
        self._kernels = kernels
        self._maps = CacheMaps(driver)
        self._arrays = arrays
        self._num_ctas = num_ctas

    def attend(self, q_SQ: Tensor, batch: ForwardBatch, cache: LayerCache, out_SQ: Tensor) -> None:
        """Zeros for sequences without context. It begins while the kernel in front runs."""
        lens_S, table_SM = batch.seq_lens_S, batch.block_table_SM
        given = (
            q_SQ,
            cache.keys_NKEP,
            cache.values_NKPE,
            self._maps.cache(cache.keys_NKEP),
            self._maps.cache(cache.values_NKPE),
            self._maps.cache(cache.keys_NKEP, EIGHT),
            self._maps.cache(cache.values_NKPE, EIGHT),
            batch.slots_T,
            lens_S,
            table_SM,
            out_SQ,
            self._arrays["attend_pieces"],
            self._arrays["attend_counts"],
            table_SM.shape[1],
            len(lens_S),
        )
        self._kernels.launch("attend", (self._num_ctas, 1, 1), given, True)
