"""Engines of several ranks, as users start them: the same tokens as one rank.

A rank takes more than a second of a core to import torch, so that each launch checks much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rank_jobs import Engines, environment, launch, launcher_argv, ran
from small_models import ROOT

from puna.bench.latency import step_weight_bytes
from puna.engine import read_config

pytest.importorskip("torch")

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
        logits=llm.logits(whole, num_prefill=len(prompts[0])),
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


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="module")
def expected(
    rank_engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], dict[str, np.ndarray]]:
    """What one rank computes, by device."""
    made: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def get(device: str, num_new: int) -> dict[str, np.ndarray]:
        if (device, num_new) not in made:
            folder = tmp_path_factory.mktemp("expected")
            (folder / "program.py").write_text(PROGRAM)
            out = folder / "out.npz"
            done = ran(sys.executable, folder / "program.py", rank_engines(), out, device, num_new)
            assert done.returncode == 0, done.stderr
            made[device, num_new] = dict(np.load(out))
        return made[device, num_new]

    return get


@pytest.mark.parametrize(
    ("tp", "pp"), [(2, 1), (4, 1), (8, 1), (16, 1), (1, 2), (1, 4), (2, 2)], ids=str
)
def test_the_same_tokens_as_one_rank(
    tp: int,
    pp: int,
    rank_engines: Engines,
    expected,
    script,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """8 prompts in flight together; on the native backend 64 tokens each (16 ranks: 8 tokens)."""
    num_new = 8 if tp == 16 else 64
    path, out = script(PROGRAM), tmp_path / "out.npz"
    done = ran(*launch(tp * pp, path, rank_engines(tp, pp), out, "auto", num_new), seconds=400)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    error = check(dict(np.load(out)), expected("auto", num_new))
    record_property("tokens", f"8 x {num_new} equal")
    record_property("logits_relative_l2", f"{error:.1e}")


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2)])
def test_the_reference_device(
    tp: int, pp: int, rank_engines: Engines, expected, script, tmp_path: Path
) -> None:
    path, out = script(PROGRAM), tmp_path / "out.npz"
    done = ran(*launch(tp * pp, path, rank_engines(tp, pp), out, "reference", 5))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    check(dict(np.load(out)), expected("reference", 5))


@pytest.fixture(scope="module")
def beams_of_one_rank(rank_engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = tmp_path_factory.mktemp("beams")
    (folder / "program.py").write_text(BEAMS)
    done = ran(sys.executable, folder / "program.py", rank_engines(), folder / "out.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_beams(
    tp: int, pp: int, rank_engines: Engines, beams_of_one_rank: list, script, tmp_path: Path
) -> None:
    path, out = script(BEAMS), tmp_path / "out.json"
    done = ran(*launch(tp * pp, path, rank_engines(tp, pp), out))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    found = json.loads(out.read_text())
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in beams_of_one_rank]
    for (_, score), (_, expected) in zip(found, beams_of_one_rank, strict=True):
        assert score == (expected and pytest.approx(expected, abs=1e-5))


def check(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """How far the logits are off, relative L2; tokens must be equal."""
    np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
    np.testing.assert_array_equal(found["sampled"], wanted["sampled"])
    error = np.linalg.norm(found["logits"] - wanted["logits"]) / np.linalg.norm(wanted["logits"])
    assert error < 1e-5, error
    return float(error)


@pytest.mark.parametrize("launcher", ["torchrun", "mpich"])
def test_other_launchers(
    launcher: str, rank_engines: Engines, expected, script, tmp_path: Path
) -> None:
    path, out = script(PROGRAM), tmp_path / "out.npz"
    done = ran(*launcher_argv(launcher, 2), path, rank_engines(2), out, "auto", 8)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    check(dict(np.load(out)), expected("auto", 8))


@pytest.mark.parametrize("launcher", ["puna launch", "open mpi"])
def test_two_jobs_at_once(
    launcher: str, rank_engines: Engines, expected, script, tmp_path: Path
) -> None:
    """Two jobs on one host find each its own rank 0."""
    argv, path = launcher_argv(launcher, 2), script(PROGRAM)
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    jobs = [
        subprocess.Popen(
            [*argv, str(path), str(rank_engines(2)), str(out), "auto", "8"],
            cwd=ROOT,
            env=environment(),
        )
        for out in outs
    ]
    assert [job.wait(120) for job in jobs] == [0, 0]
    for out in outs:
        check(dict(np.load(out)), expected("auto", 8))


def test_srun_by_its_variables(rank_engines: Engines, expected, script, tmp_path: Path) -> None:
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
                [sys.executable, path, rank_engines(2), out, "auto", "8"],
                env=environment() | {name: str(value) for name, value in variables.items()},
            )
        )
    assert [process.wait(120) for process in processes] == [0, 0]
    check(dict(np.load(out)), expected("auto", 8))


def test_bench_over_ranks(rank_engines: Engines) -> None:
    options = ("--isl", 8, "--osl", 4, "--rounds", 1, "--json")
    done = ran(*launch(2, "bench", "latency", rank_engines(2), *options))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["osl"], found["ranks"]) == (4, 2)
    config = read_config(rank_engines(2))
    assert found["weight_bytes"] == step_weight_bytes(config)
    assert found["gb_s"] == pytest.approx(
        (found["weight_bytes"] + found["kv_bytes"]) / found["decode_ms"] / 1e6, rel=1e-4
    )
