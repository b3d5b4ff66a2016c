"""Mapping: which part of the model one rank holds. Pure arithmetic, no communication.

Ranks are numbered tensor-parallel first: rank = pp_rank * tp_size + tp_rank, so that the ranks that
exchange most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.errors import ConfigError
from puna.spec import ModelSpec


@dataclass(frozen=True)
class Mapping:
    """The place of `rank` in a tp_size x pp_size grid.

    >>> m = Mapping(rank=5, tp_size=2, pp_size=4)
    >>> m.world_size, m.tp_rank, m.pp_rank
    (8, 1, 2)
    >>> m.layers(10)
    range(5, 7)
    """

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def layers(self, num_layers: int) -> range:
        """Layers of this rank's stage; stages differ by at most one layer."""
        start = self.pp_rank * num_layers // self.pp_size
        stop = (self.pp_rank + 1) * num_layers // self.pp_size
        return range(start, stop)


def check_parallel(spec: ModelSpec, tp_size: int, pp_size: int) -> None:
    """Raise ConfigError unless the model can be split over tp_size x pp_size ranks."""
    if tp_size < 1 or pp_size < 1:
        raise ConfigError(f"tp {tp_size}, pp {pp_size}: both must be at least 1")
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        legal = [
            str(n)
            for n in range(1, heads + 1)
            if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
        ]
        raise ConfigError(
            f"{heads} heads and {kv_heads} KV heads cannot be split over tp {tp_size}: "
            f"use tp {', '.join(legal)}"
        )
    if pp_size > spec.num_layers:
        raise ConfigError(
            f"{spec.num_layers} layers cannot be split over pp {pp_size}: "
            f"use pp {spec.num_layers} or fewer"
        )
