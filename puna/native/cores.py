"""Which CPUs are threads of one physical core: a core's second thread adds no arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def by_core(cpus: Iterable[int], topology: Path = _TOPOLOGY) -> list[list[int]]:
    """CPUs, those of one core together, in the order of each core's first."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        try:
            core = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def num_cores() -> int:
    """Physical cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len(by_core(os.sched_getaffinity(0)))
