"""The native library under sanitizers: steps, packing, and the thread pool.

First that the sanitizers are really on: they find planted faults.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from puna.cpu.ops import instruction_sets
from puna.native.library import find_library

KINDS = ("address,undefined", "thread")
HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "puna" / "native" / "csrc"
INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2", "portable")

pytestmark = pytest.mark.slow
FAULTS = """
#include <thread>
extern "C" int beyond(int n) {
  int* numbers = new int[8]();
  int found = numbers[n];
  delete[] numbers;
  return found;
}
extern "C" int overflow(int n) { return n + 2147483647; }
extern "C" int race(int n) {
  int sum = 0;
  auto add = [&] { for (int i = 0; i < n; i++) sum += i; };
  std::thread one(add), other(add);
  one.join();
  other.join();
  return sum;
}
"""


@pytest.fixture(scope="module")
def faulty(
    sanitized_compiler: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """faulty(kind): a library with the faults above, built with the libpuna's sanitizers."""

    def build(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("faulty")
        (folder / "faults.cpp").write_text(FAULTS)
        command = [*sanitized_compiler(kind), "-shared", "-fPIC", str(folder / "faults.cpp"), "-o"]
        subprocess.run([*command, str(folder / "faults.so")], check=True)
        return folder / "faults.so"

    return build


@pytest.mark.parametrize(
    ("kind", "fault", "words"),
    [
        ("address,undefined", "beyond(9)", "heap-buffer-overflow"),
        ("address,undefined", "overflow(1)", "signed integer overflow"),
        ("thread", "race(100000)", "data race"),
    ],
)
def test_planted_faults_are_found(
    faulty: Callable[[str], Path],
    run_sanitized: Callable[..., subprocess.CompletedProcess[str]],
    kind: str,
    fault: str,
    words: str,
) -> None:
    program = f"import ctypes; ctypes.CDLL({str(faulty(kind))!r})."
    done = run_sanitized(program + fault, kind)
    assert done.returncode == 86 and words in done.stderr, done
    innocent = run_sanitized(program + fault.partition("(")[0] + "(0)", kind)
    assert (innocent.returncode, innocent.stderr) == (0, ""), innocent


@pytest.mark.parametrize("kind", KINDS)
def test_ours_loads_and_is_what_the_sources_say(
    run_sanitized: Callable[..., subprocess.CompletedProcess[str]], kind: str
) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nimport numpy\n"
        "from puna.native.library import find_library, why_missing\n"
        "path = Path(sys.argv[1])\n"
        "assert find_library(path), why_missing(path)"
    )
    done = run_sanitized(program, kind)
    assert (done.returncode, done.stderr) == (0, ""), done


@pytest.fixture
def check(run_sanitized: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., None]:
    """check(kind, call): a call of `sanitized_programs` ends well, without a word."""

    def run(kind: str, call: str) -> None:
        done = run_sanitized(
            f"import sys\nsys.path[:0] = [{str(HERE)!r}]\nimport sanitized_programs as it\n"
            f"it.use(sys.argv[1])\nit.{call}",
            kind,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr

    return run


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps(check: Callable[..., None], kind: str, instruction_set: str) -> None:
    library = find_library()
    if library is None or instruction_set not in instruction_sets(library):
        pytest.skip(f"needs {instruction_set}")
    first_seed = 100 * INSTRUCTION_SETS.index(instruction_set)
    num_seeds = 100 if kind != "thread" else 30
    check(kind, f"steps({instruction_set!r}, {first_seed}, {num_seeds})")


def test_packing(check: Callable[..., None]) -> None:
    check("address,undefined", "packing()")


@pytest.mark.parametrize("kind", KINDS)
def test_read_bandwidth(check: Callable[..., None], kind: str) -> None:
    check(kind, "bandwidth()")


@pytest.mark.parametrize("threads", [3, 4])
def test_programs_that_share_a_pool(check: Callable[..., None], threads: int) -> None:
    for first_seed in (0, 10, 20):
        check("thread", f"programs_of_one_pool({threads}, {first_seed})")


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_pools_that_come_and_go(check: Callable[..., None], kind: str, threads: int) -> None:
    check(kind, f"pools_that_come_and_go({threads})")


@pytest.mark.parametrize("kind", KINDS)
def test_pool_alone(
    sanitized_compiler: Callable[[str], list[str]],
    run_sanitized: Callable[..., subprocess.CompletedProcess[str]],
    kind: str,
    tmp_path: Path,
) -> None:
    """Python's own reads and writes are not instrumented; those of this driver are."""
    sources = [str(HERE / "pool_race.cpp"), str(CSRC / "pool.cpp")]
    out = str(tmp_path / "pool_race.so")
    options = ["-O1", f"-I{CSRC}", "-pthread", "-shared", "-fPIC"]
    subprocess.run([*sanitized_compiler(kind), *options, *sources, "-o", out], check=True)
    call = f"import ctypes, sys; sys.exit(ctypes.CDLL({out!r}).pool_race())"
    done = run_sanitized(call, kind)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
