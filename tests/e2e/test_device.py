"""--device: what is chosen, what is said without the native library, and shared weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from small_models import ROOT, Puna, Refused

import puna.runtime.device
import puna.runtime.session
from puna.cli import main
from puna.cpu.ops import instruction_sets
from puna.native.library import find_library, why_missing

needs_library = pytest.mark.skipif(find_library() is None, reason="needs the native library")
ASK = ("--prompt", "Hello", "--max-new-tokens", 8)
SLOW = "puna: running on NumPy, which is slow: "


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions find no native library; the value is what they are told of it."""
    nowhere = tmp_path / "libpuna.so"
    for function in (find_library, why_missing):
        name = function.__name__
        monkeypatch.setattr(puna.runtime.device, name, lambda it=function: it(nowhere))
    return f"there is no {nowhere}"


def test_without_the_library_numpy_runs_and_says_so(
    engine: Path, puna: Puna, no_library: str
) -> None:
    asked = puna("run", engine, *ASK, "--device", "reference")
    assert (asked.status, asked.err) == (0, ""), "who asks for it knows"
    for options in ((), ("--device", "auto"), ("--stream",)):
        found = puna("run", engine, *ASK, *options)
        assert (found.status, found.out) == (0, asked.out)
        assert found.err == f"{SLOW}{no_library}\n"
    assert puna("run", engine, *ASK, "--json").err == f"{SLOW}{no_library}\n"


@pytest.mark.parametrize("device", ["cpu", "cpu:portable", "cpu:nonsense"])
def test_cpu_without_the_library_is_refused(
    device: str, engine: Path, refused: Refused, no_library: str
) -> None:
    line = refused("run", engine, *ASK, "--device", device)
    assert line == f"puna: {no_library} (or use --device reference, which is slow)\n"


@needs_library
def test_an_instruction_set_that_is_not_there(engine: Path, refused: Refused) -> None:
    line = refused("run", engine, *ASK, "--device", "cpu:nonsense")
    library = find_library()
    assert library is not None
    usable = ", ".join(instruction_sets(library))
    assert f"does not run 'nonsense': use one of {usable}, or cpu alone for the best" in line


@pytest.mark.parametrize("device", ["reference:avx2", "auto:avx2", "gpu", "CPU", ""])
def test_a_device_that_is_not_there(device: str, engine: Path, refused: Refused) -> None:
    line = refused("run", engine, *ASK, "--device", device)
    assert f"device {device!r} is not in this version of puna" in line
    assert "use one of auto, cpu, cuda, reference" in line


@needs_library
def test_auto_is_cpu_and_each_instruction_set_answers(engine: Path, puna: Puna) -> None:
    library = find_library()
    assert library is not None
    best, *_ = names = instruction_sets(library)
    text = {name: puna("run", engine, *ASK, "--device", f"cpu:{name}") for name in names}
    assert all((found.status, found.err) == (0, "") and found.out for found in text.values())
    assert puna("run", engine, *ASK).out == text[best].out
    assert puna("run", engine, *ASK, "--device", "cpu").out == text[best].out
    with puna_session(engine) as session:
        assert (session.device, session.device_name, session.notice) == ("cpu", f"cpu:{best}", "")


@contextmanager
def puna_session(engine: Path) -> Iterator[puna.runtime.session.Session]:
    session = puna.runtime.session.Session.open(engine)
    yield session
    session.close()


RUN = """
import re, sys
from pathlib import Path
from puna import LLM, SamplingParams

def anonymous():  # memory of no file; Linux counts it as Shmem where it is mapped as shared
    status = Path("/proc/self/status").read_text()
    return sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+) kB", status)))

before = anonymous()
with LLM(sys.argv[1], device=sys.argv[2]) as llm:
    (out,) = llm.generate([[1, 2, 3]], SamplingParams(4, temperature=0.0, ignore_eos=True))
    print(1024 * (anonymous() - before), *out.token_ids, flush=True)
    sys.stdin.read()
"""


class Running(NamedTuple):
    """A process that has an engine in memory and has used all of it."""

    pid: int
    anonymous_growth: int
    token_ids: list[str]


@contextmanager
def running(engine: Path, device: str) -> Iterator[Running]:
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(engine), device],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        growth, *token_ids = process.stdout.readline().split()
        yield Running(process.pid, int(growth), token_ids)
        process.stdin.close()
        assert process.wait(60) == 0


def pages_of(pid: int, file: Path) -> dict[str, int]:
    """Bytes of /proc/PID/smaps, summed over the process's mappings of a file."""
    total: dict[str, int] = {}
    is_ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_ours = line.endswith(str(file))
        elif is_ours and words[-1] == "kB":
            total[words[0][:-1]] = total.get(words[0][:-1], 0) + 1024 * int(words[1])
    return total


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_share_the_weights(tmp_path: Path) -> None:
    shape = "hidden=512,layers=6,heads=8,kv_heads=4,ffn=1536,vocab=4000,max_positions=64"
    arguments = ["build", "--dummy", shape, "--materialize", "--dtype", "bfloat16"]
    limits = ["--max-batch-size", "1", "--max-num-tokens", "16"]
    assert main([*arguments, *limits, "-o", str(tmp_path / "engine")]) == 0
    file = tmp_path / "engine" / "rank0.safetensors"
    size = file.stat().st_size
    assert size > 40_000_000
    with ExitStack() as stack:
        both = [stack.enter_context(running(tmp_path / "engine", "cpu")) for _ in range(2)]
        assert both[0].token_ids == both[1].token_ids and len(both[0].token_ids) == 4
        for process in both:
            pages = pages_of(process.pid, file)
            assert pages["Private_Dirty"] == pages["Shared_Dirty"] == pages["Anonymous"] == 0
            assert pages["Rss"] > 0.9 * size, "the weights are used where they are mapped"
            assert pages["Shared_Clean"] > 0.9 * pages["Rss"], pages
            assert pages["Pss"] < 0.6 * size, "each process is charged for half"
            assert process.anonymous_growth < size / 4, "and there is no copy"
    with running(tmp_path / "engine", "reference") as process:
        assert process.anonymous_growth > size, "which this would show: the reference has copies"
