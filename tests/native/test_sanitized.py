"""That the sanitizers are really on: they find planted faults, and none in loading our library."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

KINDS = ("address,undefined", "thread")

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
