"""How engines of several ranks end, when something is wrong with them or happens to them: all at
once, with a message, and without leaving a process behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from rank_jobs import SHAPE, Engines, environment, launch, launcher_argv, ran
from small_models import ROOT

from puna import BuildConfig, build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset

pytest.importorskip("torch")

ENDLESS = """\
import os, sys
from puna import LLM, SamplingParams
from puna.runtime.launch import find_world

with open(f"{sys.argv[2]}.{find_world().rank}", "w") as file:
    file.write(str(os.getpid()))
with LLM(sys.argv[1]) as llm:
    with open(f"{sys.argv[2]}.started", "w"):
        pass
    while True:
        llm.generate([[1, 2, 3]] * 4, SamplingParams(max_new_tokens=99, ignore_eos=True))
"""
Record = Callable[[str, object], None]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_wrong_world_size_stops_every_rank(
    num_ranks: int, rank_engines: Engines, record_property: Record
) -> None:
    argv = launch(num_ranks, "run", rank_engines(2), "--prompt", "x")
    expected = f"puna: Engine world size (2) != Runtime world size ({num_ranks}): start 2 ranks"
    start = time.monotonic()
    done = ran(*argv if num_ranks > 1 else [sys.executable, "-m", "puna", *argv[-4:]])
    seconds = time.monotonic() - start
    record_property("seconds", round(seconds, 2))
    assert seconds < 5
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr


def test_only_rank_0_prints(rank_engines: Engines) -> None:
    for command, message in (
        (("run", rank_engines(2), "--prompt", "x"), "the engine has no tokenizer"),
        (("run", rank_engines(2)), "the following arguments are required: --prompt"),
        (("run", "nowhere", "--prompt", "x"), "nowhere does not exist"),
    ):
        done = ran(*launch(2, *command))
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_engines_from_different_builds_are_refused(rank_engines: Engines, tmp_path: Path) -> None:
    other = build(
        DummyCheckpoint(parse_preset(SHAPE), seed=2), tmp_path / "other", BuildConfig(tp_size=2)
    ).path
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom puna.cli import main\nfrom puna.runtime.launch import find_world\n"
        "sys.exit(main(['run', sys.argv[1 + find_world().rank], '--prompt', 'x']))\n"
    )
    done = ran(*launch(2, program, rank_engines(2), other))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "rank 1 (host" in done.stderr and "from another build" in done.stderr


def test_a_damaged_file_of_one_rank(rank_engines: Engines, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(rank_engines(2), tmp_path / "engine"))
    with (damaged / "rank1.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    done = ran(*launch(2, "run", damaged, "--prompt", "x"))
    assert done.returncode == 2, done.stderr
    assert "puna: rank 1: " in done.stderr and "rank1.safetensors was changed" in done.stderr
    assert "Traceback" not in done.stderr


@dataclass
class Job:
    process: subprocess.Popen[str]
    pids: list[int]  # by rank


@contextmanager
def endless(launcher: str, engine: Path, num_ranks: int, tmp_path: Path) -> Iterator[Job]:
    """A job in the middle of its work."""
    program, mark = tmp_path / "program.py", tmp_path / "mark"
    program.write_text(ENDLESS)
    argv = [*launcher_argv(launcher, num_ranks), str(program), str(engine), str(mark)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment(), stderr=pipe, stdout=pipe, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while not Path(f"{mark}.started").exists():
            assert process.poll() is None and time.monotonic() < deadline, "it did not start"
            time.sleep(0.05)
        time.sleep(0.5)
        pids = [int(Path(f"{mark}.{rank}").read_text()) for rank in range(num_ranks)]
        yield Job(process, pids)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["puna launch", "open mpi"])
def job(request: pytest.FixtureRequest, rank_engines: Engines, tmp_path: Path) -> Iterator[Job]:
    """Four ranks in the middle of their work."""
    with endless(request.param, rank_engines(2, 2), 4, tmp_path) as found:
        yield found


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_all(victim: int, job: Job, record_property: Record) -> None:
    start = time.monotonic()
    os.kill(job.pids[victim], signal.SIGKILL)
    _, err = job.process.communicate(timeout=30)
    assert job.process.returncode != 0
    assert f"rank {victim} " in err and "Traceback" not in err, err
    gone(job.pids)
    record_property("seconds", round(time.monotonic() - start, 2))


def test_a_killed_launcher_leaves_no_orphans(job: Job, record_property: Record) -> None:
    start = time.monotonic()
    job.process.kill()
    gone(job.pids)
    record_property("seconds", round(time.monotonic() - start, 2))


def test_an_interrupt_ends_all(job: Job) -> None:
    job.process.send_signal(signal.SIGTERM)
    job.process.communicate(timeout=30)
    assert job.process.returncode != 0
    gone(job.pids)


def test_what_ranks_of_one_host_say_stays_on_it(rank_engines: Engines, tmp_path: Path) -> None:
    with endless("puna launch", rank_engines(2), 2, tmp_path) as job:
        for pid in job.pids:
            found = psutil.Process(pid).net_connections("tcp")
            listening = {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
            assert listening == {"127.0.0.1"}


def is_running(pid: int) -> bool:
    try:
        # In a container, nobody may ask how an orphan ended: it stays in the table without a life.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)
