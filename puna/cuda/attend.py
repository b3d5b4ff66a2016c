"""Attend: decode attention of sm_90 (csrc/attend_sm90.cu), given rotated queries and a cache to
which keys and values have been appended.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.attend_plan import MAX_SEQS, has_attend
from puna.cuda.driver import Driver
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
        """Rows of sequences without context are left as they are. `overlaps` as in
        `Kernels.launch`."""
        arguments = (
            q_SQ,
            cache.keys_NKEP,
            cache.values_NKPE,
            self._maps.cache(cache.keys_NKEP),
            self._maps.cache(cache.values_NKPE),
            batch.slots_T,
            batch.seq_lens_S,
            batch.block_table_SM,
            out_SQ,
            self._arrays["attend_pieces"],
            self._arrays["attend_counts"],
            batch.block_table_SM.shape[1],
            len(q_SQ),
        )
        self._kernels.launch("attend", (self._num_ctas, 1, 1), arguments, overlaps)


def attend(
    config: EngineConfig,
    kernels: Kernels,
    driver: Driver,
    arrays: dict[str, Tensor],
    num_ctas: int,
) -> Attend | None:
    """None where the engine has no such kernel."""
    return Attend(kernels, driver, arrays, num_ctas) if has_attend(config) else None
