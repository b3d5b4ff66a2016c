"""Engines of several ranks, as users start them: the same tokens as one rank, and the same end.

A rank takes more than a second of a core to import torch, so that each launch checks much.
"""

from __future__ import annotations

import json
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

import numpy as np
import psutil
import pytest
from small_models import ROOT

from puna import BuildConfig, build
from puna.bench.latency import step_weight_bytes
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.engine import read_config

pytest.importorskip("torch")

# Llama 2 70B in miniature: 64 heads, 8 KV heads.
SHAPE = "hidden=512,layers=4,heads=64,kv_heads=8,head_dim=8,ffn=1376,vocab=1003,max_positions=256"
# What the ranks run: prompts in flight together, their tokens, and logits of prefill and decode.
PROGRAM = """\
import sys
import numpy as np
from puna import LLM, SamplingParams

engine, out, device, num_new = sys.argv[1:5]
with LLM(engine, device=device) as llm:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 1003, size=int(n)).tolist() for n in rng.integers(1, 40, size=8)]
    greedy = SamplingParams(max_new_tokens=int(num_new), temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=9, temperature=1.0, seed=3, n=2, repetition_penalty=1.2)
    outputs = llm.generate(prompts + prompts[:3], [greedy] * 8 + [drawn] * 3)
    whole = [*prompts[0], *outputs[0].token_ids]
    np.savez(
        out,
        tokens=np.array([output.token_ids for output in outputs[:8]]),
        sampled=np.array([c.token_ids for output in outputs[8:] for c in output.completions]),
        logits=llm.logits(whole, num_prefill=len(whole) - 8),
    )
"""
# Beams of several kinds, and who runs beside them.
BEAMS = """\
import json, sys
import numpy as np
from puna import LLM, SamplingParams

engine, out = sys.argv[1:3]
rng = np.random.default_rng(6)
prompts = [rng.integers(0, 1003, size=size).tolist() for size in (5, 21, 38, 12, 9)]
with LLM(engine) as llm:
    ends = tuple(rng.integers(0, 1003, size=60).tolist())
    outputs = llm.generate(prompts, [
        SamplingParams(max_new_tokens=15, num_beams=5, n=4),  # more than a lane of two has
        SamplingParams(max_new_tokens=15, num_beams=4, n=2, stop_token_ids=ends),
        SamplingParams(
            max_new_tokens=15, num_beams=3, length_penalty=2.0, early_stopping="never",
            repetition_penalty=1.2, stop_token_ids=ends,
        ),
        SamplingParams(max_new_tokens=24, temperature=0.0),
        SamplingParams(max_new_tokens=24, temperature=1.0, seed=3, n=2),
    ])
found = [[c.token_ids, c.score] for output in outputs for c in output.completions]
with open(out, "w") as file:
    json.dump(found, file)
"""
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

Engines = Callable[..., Path]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """engines(tp=, pp=): an engine of the miniature in float32, made once; not to be changed."""
    made: dict[tuple[int, int], Path] = {}

    def get(tp: int = 1, pp: int = 1) -> Path:
        if (tp, pp) not in made:
            checkpoint = DummyCheckpoint(parse_preset(SHAPE), seed=1)
            config = BuildConfig(dtype="float32", tp_size=tp, pp_size=pp)
            out = tmp_path_factory.mktemp("engines") / f"tp{tp}pp{pp}"
            made[tp, pp] = build(checkpoint, out, config, materialize=True).path
        return made[tp, pp]

    return get


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(text)
        return path

    return write


def environment() -> dict[str, str]:
    # Slots beyond this machine's cores, and root in CI's container.
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def ran(
    *argv: object, seconds: float = 120, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*prefix, *map(str, argv)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def launch(num_ranks: int, *command: object, options: tuple[object, ...] = ()) -> list[object]:
    return [sys.executable, "-m", "puna", "launch", "-n", num_ranks, *options, "--", *command]


@pytest.fixture(scope="module")
def expected(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], dict[str, np.ndarray]]:
    """What one rank computes, by device."""
    made: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def get(device: str, num_new: int) -> dict[str, np.ndarray]:
        if (device, num_new) not in made:
            folder = tmp_path_factory.mktemp("expected")
            (folder / "program.py").write_text(PROGRAM)
            out = folder / "out.npz"
            done = ran(sys.executable, folder / "program.py", engines(), out, device, num_new)
            assert done.returncode == 0, done.stderr
            made[device, num_new] = dict(np.load(out))
        return made[device, num_new]

    return get


@pytest.mark.parametrize(
    ("tp", "pp"), [(2, 1), (4, 1), (8, 1), (16, 1), (1, 2), (1, 4), (2, 2)], ids=str
)
def test_the_same_tokens_as_one_rank(
    tp: int, pp: int, engines: Engines, expected, script, tmp_path: Path
) -> None:
    """8 prompts in flight together; on the native backend 64 tokens each (16 ranks: 8 tokens)."""
    num_new = 8 if tp == 16 else 64
    path, out = script(PROGRAM), tmp_path / "out.npz"
    done = ran(*launch(tp * pp, path, engines(tp, pp), out, "auto", num_new), seconds=400)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    check(dict(np.load(out)), expected("auto", num_new))


def test_the_reference_device(engines: Engines, expected, script, tmp_path: Path) -> None:
    path, out = script(PROGRAM), tmp_path / "out.npz"
    done = ran(*launch(4, path, engines(2, 2), out, "reference", 5))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    check(dict(np.load(out)), expected("reference", 5))


@pytest.fixture(scope="module")
def beams_of_one_rank(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = tmp_path_factory.mktemp("beams")
    (folder / "program.py").write_text(BEAMS)
    done = ran(sys.executable, folder / "program.py", engines(), folder / "out.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_beams(
    tp: int, pp: int, engines: Engines, beams_of_one_rank: list, script, tmp_path: Path
) -> None:
    path, out = script(BEAMS), tmp_path / "out.json"
    done = ran(*launch(tp * pp, path, engines(tp, pp), out))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    found = json.loads(out.read_text())
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in beams_of_one_rank]
    for (_, score), (_, expected) in zip(found, beams_of_one_rank, strict=True):
        assert score == (expected and pytest.approx(expected, abs=1e-5))


def check(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
    np.testing.assert_array_equal(found["sampled"], wanted["sampled"])
    error = np.linalg.norm(found["logits"] - wanted["logits"]) / np.linalg.norm(wanted["logits"])
    assert error < 1e-5, error


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LAUNCHERS = {
    "puna launch": lambda n: [sys.executable, "-m", "puna", "launch", "-n", n, "--"],
    "torchrun": lambda n: [*TORCHRUN, "--standalone", "--nproc-per-node", n],
    "open mpi": lambda n: ["mpirun.openmpi", "-n", n, sys.executable],
    "mpich": lambda n: ["mpirun.mpich", "-n", n, sys.executable],
}


def launcher_argv(launcher: str, num_ranks: int) -> list[str]:
    argv = [*map(str, LAUNCHERS[launcher](num_ranks))]
    if shutil.which(argv[0]) is None:
        pytest.skip(f"needs {argv[0]}")
    return argv


@pytest.mark.parametrize("launcher", ["torchrun", "mpich"])
def test_other_launchers(launcher: str, engines: Engines, expected, script, tmp_path: Path) -> None:
    path, out = script(PROGRAM), tmp_path / "out.npz"
    done = ran(*launcher_argv(launcher, 2), path, engines(2), out, "auto", 8)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    check(dict(np.load(out)), expected("auto", 8))


@pytest.mark.parametrize("launcher", ["puna launch", "open mpi"])
def test_two_jobs_at_once(
    launcher: str, engines: Engines, expected, script, tmp_path: Path
) -> None:
    """Two jobs on one host find each its own rank 0."""
    argv, path = launcher_argv(launcher, 2), script(PROGRAM)
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    jobs = [
        subprocess.Popen(
            [*argv, str(path), str(engines(2)), str(out), "auto", "8"], cwd=ROOT, env=environment()
        )
        for out in outs
    ]
    assert [job.wait(120) for job in jobs] == [0, 0]
    for out in outs:
        check(dict(np.load(out)), expected("auto", 8))


def test_srun_by_its_variables(engines: Engines, expected, script, tmp_path: Path) -> None:
    """There is no Slurm here: two processes with the variables that it would set."""
    path, out = script(PROGRAM), tmp_path / "out.npz"
    processes = []
    for rank in range(2):
        variables = {
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_STEP_TASKS_PER_NODE": 2,
            "SLURM_JOB_ID": os.getpid(),
            "SLURM_STEP_ID": 0,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, path, engines(2), out, "auto", "8"],
                env=environment() | {name: str(value) for name, value in variables.items()},
            )
        )
    assert [process.wait(120) for process in processes] == [0, 0]
    check(dict(np.load(out)), expected("auto", 8))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_wrong_world_size_stops_every_rank(num_ranks: int, engines: Engines) -> None:
    argv = launch(num_ranks, "run", engines(2), "--prompt", "x")
    expected = f"puna: Engine world size (2) != Runtime world size ({num_ranks}): start 2 ranks"
    seconds = []
    while not seconds or (min(seconds) > 5 and len(seconds) < 3):  # other tests use this machine
        start = time.monotonic()
        done = ran(*argv if num_ranks > 1 else [sys.executable, "-m", "puna", *argv[-4:]])
        seconds.append(time.monotonic() - start)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr
    assert min(seconds) < 5, seconds


def test_only_rank_0_prints(engines: Engines) -> None:
    for command, message in (
        (("run", engines(2), "--prompt", "x"), "the engine has no tokenizer"),
        (("run", engines(2)), "the following arguments are required: --prompt"),
        (("run", "nowhere", "--prompt", "x"), "nowhere does not exist"),
    ):
        done = ran(*launch(2, *command))
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_engines_from_different_builds_are_refused(engines: Engines, tmp_path: Path) -> None:
    other = build(
        DummyCheckpoint(parse_preset(SHAPE), seed=2), tmp_path / "other", BuildConfig(tp_size=2)
    ).path
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom puna.cli import main\nfrom puna.runtime.launch import find_world\n"
        "sys.exit(main(['run', sys.argv[1 + find_world().rank], '--prompt', 'x']))\n"
    )
    done = ran(*launch(2, program, engines(2), other))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "rank 1 (host" in done.stderr and "from another build" in done.stderr


def test_a_damaged_file_of_one_rank(engines: Engines, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(engines(2), tmp_path / "engine"))
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


@pytest.mark.parametrize(
    ("launcher", "tp", "pp", "victim"),
    [("puna launch", 2, 1, 0), ("puna launch", 2, 2, 2), ("open mpi", 2, 1, 1)],
)
def test_a_killed_rank_ends_all(
    launcher: str, tp: int, pp: int, victim: int, engines: Engines, tmp_path: Path
) -> None:
    with endless(launcher, engines(tp, pp), tp * pp, tmp_path) as job:
        os.kill(job.pids[victim], signal.SIGKILL)
        _, err = job.process.communicate(timeout=30)
        assert job.process.returncode != 0
        assert f"rank {victim} " in err and "Traceback" not in err, err
        gone(job.pids)


@pytest.mark.parametrize("launcher", ["puna launch", "open mpi"])
def test_a_killed_launcher_leaves_no_orphans(
    launcher: str, engines: Engines, tmp_path: Path
) -> None:
    with endless(launcher, engines(2), 2, tmp_path) as job:
        job.process.kill()
        gone(job.pids)


@pytest.mark.parametrize("launcher", ["puna launch", "open mpi"])
def test_an_interrupt_ends_all(launcher: str, engines: Engines, tmp_path: Path) -> None:
    with endless(launcher, engines(2), 2, tmp_path) as job:
        for pid in job.pids if launcher == "puna launch" else ():
            found = psutil.Process(pid).net_connections("tcp")
            listening = {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
            assert listening == {"127.0.0.1"}, "what ranks of one host say stays on it"
        job.process.send_signal(signal.SIGTERM)
        job.process.communicate(timeout=30)
        assert job.process.returncode != 0
        gone(job.pids)


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


def test_bench_over_ranks(engines: Engines) -> None:
    options = ("--isl", 8, "--osl", 4, "--rounds", 1, "--json")
    done = ran(*launch(2, "bench", "latency", engines(2), *options))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["osl"], found["ranks"]) == (4, 2)
    config = read_config(engines(2))
    assert found["weight_bytes"] == step_weight_bytes(config)
    assert found["gb_s"] == pytest.approx(
        (found["weight_bytes"] + found["kv_bytes"]) / found["decode_ms"] / 1e6, rel=1e-4
    )
