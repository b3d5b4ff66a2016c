"""Launch: which rank of how many this process is, as its launcher says, and the cores it keeps to.

Reads the variables of puna launch, torchrun, mpirun (Open MPI; MPICH and its relatives) and srun:
the only file of puna that looks at the environment. Connects nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from puna.errors import LaunchError
from puna.native.cores import by_core

LOOPBACK = "127.0.0.1"
PUNA_LAUNCH, TORCHRUN = "puna launch", "torchrun"
# What puna launch tells its processes.
RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = (
    f"PUNA_{name}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
)
ADDRESS, PORT, JOB, PARENT = (
    f"PUNA_{name}" for name in ("MASTER_ADDR", "MASTER_PORT", "JOB", "PARENT")
)

# Variables by which Open MPI 4 passes on that its user bound the processes.
_OPEN_MPI_BINDING = (
    "hwloc_base_binding_policy",
    "hwloc_base_cpu_set",
    "rmaps_base_mapping_policy",
)


@dataclass(frozen=True)
class World:
    """This process among those of its job.

    `job` tells the job from others on the same hosts (empty: `port` does); rank 0 can be reached at
    one of `addresses`, at `port` (None: one that follows from `job`).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""
    job: str = ""
    addresses: tuple[str, ...] = ()
    port: int | None = None
    parent: int = 0  # process that started this one; 0: does not matter
    is_bound_by_default: bool = False  # to CPUs that the launcher chose, and its user did not

    @property
    def is_one_host(self) -> bool:
        return self.local_size == self.size


def find_world(
    master_addr: str | None = None,
    master_port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> World:
    """The world that the launcher set up; one rank where there is no launcher.

    `master_addr` and `master_port` say where rank 0 listens, in place of what the launcher tells.
    Raises LaunchError for variables that make no sense.
    """
    found = _from_environment(os.environ if environ is None else environ)
    if not 0 <= found.rank < found.size or not 0 <= found.local_rank < found.local_size:
        raise LaunchError(
            f"{found.launcher} says rank {found.rank} of {found.size} (on this host "
            f"{found.local_rank} of {found.local_size}): start the ranks again, or unset its "
            "variables for a single process"
        )
    if master_port is not None and not 0 < master_port < 65536:
        raise LaunchError(f"master port {master_port}: use a number from 1 to 65535")
    if found.size > 1 and not found.parent:
        found = replace(found, parent=os.getppid())
    if found.is_one_host:
        found = replace(found, addresses=(LOOPBACK,))
    if master_addr is not None:
        found = replace(found, addresses=(master_addr,))
    return found if master_port is None else replace(found, port=master_port)


def speaks_for_all(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this is rank 0, the one that prints what concerns all ranks."""
    try:
        return find_world(environ=environ).rank == 0
    except LaunchError:
        return True


def _from_environment(environ: Mapping[str, str]) -> World:
    if RANK in environ:
        return _from_puna(environ)
    if all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        return _from_torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_open_mpi(environ)
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:
        return _from_mpich(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return _from_slurm(environ)
    return World()


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise LaunchError(f"the variable {name} is {text!r}; it must be a whole number")
    return int(text)


def _from_puna(environ: Mapping[str, str]) -> World:
    return World(
        rank=_number(environ, RANK),
        size=_number(environ, SIZE),
        local_rank=_number(environ, LOCAL_RANK),
        local_size=_number(environ, LOCAL_SIZE),
        launcher=PUNA_LAUNCH,
        job=environ.get(JOB, ""),
        addresses=(environ.get(ADDRESS, LOOPBACK),),
        port=_number(environ, PORT) if PORT in environ else None,
        parent=_number(environ, PARENT, 0),
    )


def _from_torchrun(environ: Mapping[str, str]) -> World:
    # Its own store listens at MASTER_PORT, so that the port only serves to tell jobs apart.
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    return World(
        rank=_number(environ, "RANK"),
        size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        local_size=_number(environ, "LOCAL_WORLD_SIZE"),
        launcher=TORCHRUN,
        job=f"torchrun {address} {port} {environ.get('TORCHELASTIC_RUN_ID', '')}",
        addresses=(address,) if address else (),
    )


def _from_open_mpi(environ: Mapping[str, str]) -> World:
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    # Where mpirun itself listens: version 4 tells its processes, version 5 does not.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.search(r"tcp://([\d.,]+):\d+", uri)
    return World(
        rank=_number(environ, "OMPI_COMM_WORLD_RANK"),
        size=size,
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_size=_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", size),
        launcher="mpirun (Open MPI)",
        job=f"openmpi {environ.get('PMIX_NAMESPACE', '')} {uri}",
        addresses=tuple(found[1].split(",")) if found else (),
        # Version 4 gives each of two processes a single core unless it is told otherwise.
        is_bound_by_default=environ.get("OMPI_MCA_orte_bound_at_launch") == "1"
        and not any(f"OMPI_MCA_{name}" in environ for name in _OPEN_MPI_BINDING),
    )


def _from_mpich(environ: Mapping[str, str]) -> World:
    size = _number(environ, "PMI_SIZE")
    local_size = _number(environ, "MPI_LOCALNRANKS", size)
    return World(
        rank=_number(environ, "PMI_RANK"),
        size=size,
        local_rank=_number(environ, "MPI_LOCALRANKID", _number(environ, "PMI_RANK")),
        local_size=local_size,
        launcher="mpirun (MPICH)",
        # Nothing tells the job from others on all of its hosts: there, its port must.
        job=f"mpich {_ancestor('hydra_pmi_proxy')}" if local_size == size else "",
    )


def _from_slurm(environ: Mapping[str, str]) -> World:
    size, node = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_NODEID", 0)
    tasks = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    first = _first_host(environ.get("SLURM_STEP_NODELIST", ""))
    return World(
        rank=_number(environ, "SLURM_PROCID"),
        size=size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=tasks[node] if node < len(tasks) else size,
        launcher="srun",
        job=f"slurm {environ.get('SLURM_JOB_ID', '')} {environ.get('SLURM_STEP_ID', '')}",
        addresses=(first,) if first else (),
    )


def _tasks_per_node(text: str) -> list[int]:
    """What Slurm writes as "2(x3),1".

    >>> _tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
    """
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _first_host(nodes: str) -> str:
    """The first of a list of hosts as Slurm writes it.

    >>> _first_host("gpu[03-07,9],cpu1"), _first_host("a,b")
    ('gpu03', 'a')
    """
    found = re.match(r"([^\[,]*)(?:\[(\w+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def _ancestor(name: str) -> int:
    """The nearest ancestor of this process that is called so, or else its parent."""
    pid = os.getppid()
    while pid > 1:
        try:
            command, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(")")
        except OSError:
            break
        if command.partition("(")[2] == name:
            return pid
        pid = int(rest.split()[1])
    return os.getppid()


def keep_to_share(world: World) -> None:
    """Bind this process to its part of the host's CPUs, where nobody has done so on purpose.

    Ranks of one host that shared cores would wait for each other in every operation. The parts are
    of whole cores, where there are as many as ranks.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    if world.is_bound_by_default:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # those that the system lets it have
    elif world.local_size == 1 or _is_bound(world, os.sched_getaffinity(0)):
        return
    cores = by_core(os.sched_getaffinity(0))
    first = world.local_rank * len(cores) // world.local_size
    last = max(first + 1, (world.local_rank + 1) * len(cores) // world.local_size)
    os.sched_setaffinity(0, [cpu for core in cores[first:last] for cpu in core])


def _is_bound(world: World, cpus: set[int]) -> bool:
    """Whether this process has CPUs of its own already."""
    if world.launcher in (PUNA_LAUNCH, TORCHRUN):
        # These bind nothing: if it may use some CPUs only, then so may all ranks together.
        try:
            return cpus != os.sched_getaffinity(os.getppid())
        except OSError:
            pass
    return len(cpus) < (os.cpu_count() or 1)


@contextmanager
def on_every_cpu() -> Iterator[None]:
    """Threads that are begun meanwhile run on whichever CPUs the system lets them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def quiet_torch() -> None:
    """Before torch is imported: its C++ part warns of every address that has no name."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def has_launcher(world: World) -> bool:
    """Whether the process that started this one is still there."""
    return world.parent in (0, os.getppid())


def rank_environment(
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    address: str,
    job: str,
    port: int | None = None,
) -> dict[str, str]:
    """The variables by which puna launch tells a process who it is."""
    values = {
        RANK: rank,
        SIZE: size,
        LOCAL_RANK: local_rank,
        LOCAL_SIZE: local_size,
        ADDRESS: address,
        JOB: job,
    }
    if port is not None:
        values[PORT] = port
    return {name: str(value) for name, value in values.items()}


def parent_environment(pid: int) -> dict[str, str]:
    """The variable by which a process knows whose end is its own."""
    return {PARENT: str(pid)}


def remote_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What a process on another host is told: its rank, and where Python finds its modules."""
    path = os.environ.get("PYTHONPATH")
    return {**variables, **({} if path is None else {"PYTHONPATH": path})}


def process_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with changes, for a process on the same host."""
    return {**os.environ, **changes}
