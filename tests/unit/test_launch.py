"""Which rank this is, from the variables of each launcher; where rank 0 is; who prints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

import puna.runtime.launch
from puna.errors import LaunchError
from puna.native.cores import by_core
from puna.runtime.launch import (
    World,
    find_world,
    keep_to_share,
    on_every_cpu,
    process_environment,
    rank_environment,
    speaks_for_all,
)
from puna.runtime.rendezvous import candidate_ports

HNP = "1.0;tcp://10.0.0.1,192.168.0.1:4000;tcp6://[fd00::2]:58503"
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": HNP,
    "PMIX_NAMESPACE": "77",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
}
PUNA = rank_environment(3, 4, 1, 2, "node1", "secret", 4321)


@pytest.mark.parametrize(
    ("environ", "addresses"),
    [
        (OPEN_MPI, ("10.0.0.1", "192.168.0.1")),
        (TORCHRUN, ("node1",)),
        (MPICH, ()),
        (SLURM, ("gpu07",)),
        (PUNA, ("node1",)),
    ],
    ids=["open mpi", "torchrun", "mpich", "srun", "puna launch"],
)
def test_each_launcher_tells_the_rank(environ: dict[str, str], addresses: tuple[str, ...]) -> None:
    world = find_world(environ=environ)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert world.addresses == addresses and not world.is_one_host
    assert find_world("other", 99, environ).addresses == ("other",)
    assert find_world("other", 99, environ).port == 99
    assert not speaks_for_all(environ)


def test_one_host_meets_on_the_loopback() -> None:
    environ = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert find_world(environ=environ).addresses == ("127.0.0.1",)


def test_mpich_tells_jobs_apart_on_one_host_only() -> None:
    assert find_world(environ={**MPICH, "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3"}).job
    assert find_world(environ=MPICH).job == ""  # a process of each host's own would be its name


def test_no_launcher_is_one_rank() -> None:
    for environ in ({}, {"RANK": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}):
        world = find_world(environ=environ)
        assert (world.rank, world.size) == (0, 1)
    assert speaks_for_all({})


@pytest.mark.parametrize("rank", ["4", "-1", "one", ""])
def test_variables_that_make_no_sense_are_refused(rank: str) -> None:
    with pytest.raises(LaunchError, match=r"(?i)open mpi|OMPI_COMM_WORLD_RANK"):
        find_world(environ={**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank})
    assert speaks_for_all({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank})


def test_each_job_has_ports_of_its_own() -> None:
    first = candidate_ports(find_world(environ=OPEN_MPI))
    other = candidate_ports(find_world(environ={**OPEN_MPI, "PMIX_NAMESPACE": "78"}))
    same = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert first == candidate_ports(find_world(environ=same))
    assert not set(first) & set(other)
    # Below the range from which Linux hands out ports by itself.
    assert all(20000 <= port < 32768 for port in first)
    assert candidate_ports(find_world(environ=PUNA)) == [4321]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@pytest.mark.parametrize("launcher", ["puna launch", "mpirun (Open MPI)"])
def test_ranks_of_a_host_share_its_cpus(launcher: str) -> None:
    before = os.sched_getaffinity(0)
    if len(by_core(before)) < 2 or before != os.sched_getaffinity(os.getppid()):
        pytest.skip("needs two cores, and all that its parent has")
    shares = []
    try:
        for local_rank in range(2):
            os.sched_setaffinity(0, before)
            keep_to_share(World(local_rank, 2, local_rank, 2, launcher))
            shares.append(os.sched_getaffinity(0))
            keep_to_share(World(1 - local_rank, 2, 1 - local_rank, 2, launcher))  # bound already
            assert os.sched_getaffinity(0) == shares[-1]
        os.sched_setaffinity(0, before)
        keep_to_share(World(0, 2, 0, 1, launcher))  # alone on its host
        assert os.sched_getaffinity(0) == before
        os.sched_setaffinity(0, shares[0])
        with on_every_cpu():
            assert os.sched_getaffinity(0) == set(range(os.cpu_count() or 1))
        assert os.sched_getaffinity(0) == shares[0]
    finally:
        os.sched_setaffinity(0, before)
    assert shares[0] | shares[1] == before and not shares[0] & shares[1]


def test_a_job_keeps_to_the_cpus_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """puna launch binds nothing: if all its ranks may use only some CPUs, they share those."""
    bound: list[list[int]] = []
    monkeypatch.setattr(puna.runtime.launch, "by_core", lambda cpus: [[c] for c in sorted(cpus)])
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: bound.append(cpus))
    allowed = {0: {60, 61}, os.getppid(): {60, 61}}
    monkeypatch.setattr(os, "sched_getaffinity", allowed.__getitem__)
    keep_to_share(World(1, 2, 1, 2, "puna launch"))
    assert bound == [[61]]
    keep_to_share(World(1, 2, 1, 2, "mpirun (Open MPI)"))  # may have given each rank its own
    allowed[os.getppid()] = set(range(64))
    keep_to_share(World(1, 2, 1, 2, "puna launch"))
    assert bound == [[61]]


def test_open_mpi_binds_two_processes_to_a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is its default; what its user asked for stays."""
    now = [{5}]

    def bind(_: int, cpus: Iterable[int]) -> None:
        now.append(set(cpus) & set(range(4, 12)))  # the system lets this process have 4 to 11

    monkeypatch.setattr(puna.runtime.launch, "by_core", lambda cpus: [[c] for c in sorted(cpus)])
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: now[-1])
    bound = {**OPEN_MPI, "OMPI_MCA_orte_bound_at_launch": "1"}
    keep_to_share(find_world(environ={**bound, "OMPI_MCA_hwloc_base_binding_policy": "core"}))
    assert now == [{5}]
    keep_to_share(find_world(environ=bound))
    assert now[-1] == {8, 9, 10, 11}
    one_each = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    keep_to_share(find_world(environ={**bound, **one_each}))
    assert now[-1] == set(range(4, 12))


def test_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    for cpu in range(8):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(
            f"{cpu % 4},{cpu % 4 + 4}\n"
        )
    assert by_core(range(8), tmp_path) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert by_core([7, 2, 3], tmp_path) == [[2], [3, 7]]
    assert by_core([9, 8], tmp_path) == [[8], [9]]


def test_processes_keep_the_environment() -> None:
    found = process_environment({"PUNA_RANK": "1"})
    assert found["PUNA_RANK"] == "1" and found["PATH"] == os.environ["PATH"]
