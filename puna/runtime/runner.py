"""Runner: what computes the steps of one rank, once they are arrays.

A session opens and checks an engine, mirrors its sequences, and gives each lowered step to a
runner; a runner has the arrays of one device and the model bound to them. This file decides what
passes between the two; it knows no device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from puna.engine import EngineConfig, RankMemory
from puna.manifest import Manifest
from puna.ops.sampling import SampleResult
from puna.quant import Array
from puna.rank_file import RankFile
from puna.runtime.comm import Comm
from puna.runtime.device import Choice
from puna.runtime.lower import LoweredStep
from puna.runtime.request import SamplingParams

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Opening:
    """What a runner is made from: an engine whose small files are checked, and the limits that a
    run takes of it. Nothing large is in memory yet."""

    engine_dir: Path
    manifest: Manifest
    config: EngineConfig  # with the limits of this run
    rank: int
    layout: RankFile  # of the rank's file
    chosen: Choice
    num_blocks: int
    threads: int | None  # that compute (None: physical cores)
    num_readers: int  # threads that check digests
    report: Callable[[int], None]  # told the bytes brought in, each twice: checked, then bound
    comm: Comm | None
    deterministic: bool  # on a GPU: rows do not depend on their company, which costs speed


class Runner(Protocol):
    """One device's part of a session. Steps are computed in the order in which they are started,
    each in a lane; a lane's steps are finished in that order too."""

    threads: int
    device_name: str  # as --device takes it

    @property
    def memory(self) -> RankMemory:
        """Bytes that the runner holds, counted from its arrays."""
        ...

    def can_run_ahead(self, params: SamplingParams) -> bool:
        """Whether a step may be started before the one before it is finished, where sequences are
        sampled by `params`: it may then be given tokens as `-1 - row` (see `puna.batch`)."""
        ...

    def start(self, step: LoweredStep, lane: int) -> None:
        """Begin to compute a step."""
        ...

    def finish(self, step: LoweredStep, lane: int) -> tuple[SampleResult, Array]:
        """Wait for the lane's oldest step, which is `step`: what was sampled, and the logits it
        asked for, which mean something only where it has `prompt_rows`. Last stage only."""
        ...

    def discard(self, lane: int) -> None:
        """Forget the lane's steps that were started and not finished."""
        ...

    def close(self) -> None:
        """Let go of all memory."""
        ...


def cached(
    programs: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int
) -> Value:
    """Return what was made for `key`, making it if need be; keep the `most` used last."""
    found = programs.get(key)
    if found is None:
        found = programs[key] = make()
        if len(programs) > most:
            programs.popitem(last=False)
    else:
        programs.move_to_end(key)
    return found
