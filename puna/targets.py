"""Targets: what an engine can be laid out for, and what each takes.

Decides for every target how matrices are stored, how long a KV block is, which number formats there
are, and which GPUs a target is for. Knows neither how kernels are made nor which GPU is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from puna.layout import LayoutName
from puna.quant import DTYPES, KV_DTYPES


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to build for. `capability` is the compute capability of its GPUs (None: not a
    GPU)."""

    name: str
    capability: tuple[int, int] | None
    layout: LayoutName
    block_size: int  # tokens of a KV block
    dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    has_quantised: bool  # whether weights may be quantised
    has_ranks: bool  # whether an engine may have several

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None


CPU = Target(
    "cpu",
    None,
    "tiles",
    16,
    tuple(DTYPES),
    tuple(KV_DTYPES),
    has_quantised=True,
    has_ranks=True,
)
_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
_HALVES = ("float16", "bfloat16")
TARGETS: MappingProxyType[str, Target] = MappingProxyType(
    {"cpu": CPU}
    | {
        f"sm_{major}{minor}": Target(
            f"sm_{major}{minor}",
            (major, minor),
            "rows",
            64,
            _HALVES,
            _HALVES,
            has_quantised=False,
            has_ranks=False,
        )
        for major, minor in _CAPABILITIES
    }
)


def target_of(capability: tuple[int, int]) -> Target | None:
    """The target for a GPU of exactly this compute capability; None where there is none.

    From 9.0 on kernels are compiled for one architecture ("sm_90a"), whose machine code no other
    runs, of the same major number neither; 8.7 is a module beside an Arm CPU, which does not run
    what is compiled for cards.
    """
    return next((found for found in TARGETS.values() if found.capability == capability), None)
