"""The native library with sanitizers, and Python programs that use it.

It is built in pytest's cache, so that only changed sources cost time (all of them 70 s on 2 cores,
2026-11). A kind is what PUNA_SANITIZE in CMakeLists.txt takes: "address,undefined" or "thread".
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY_NAME = "libpuna.dylib" if sys.platform == "darwin" else "libpuna.so"
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
# A race or an overflow ends the program with this status, whatever Python would have returned.
FAILED_STATUS = 86
OPTIONS = f"exitcode={FAILED_STATUS}:halt_on_error=1"
BUILD_SECONDS = 600


@pytest.fixture(scope="session")
def sanitized_library(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """sanitized_library(kind): the path of libpuna, built with these sanitizers."""
    built: dict[str, Path] = {}
    cache = getattr(pytestconfig, "cache", None)  # none under -p no:cacheprovider
    make_folder = cache.mkdir if cache else tmp_path_factory.mktemp

    def build(kind: str) -> Path:
        if kind not in built:
            folder = make_folder(f"libpuna-{kind.replace(',', '-')}")
            with (folder / "lock").open("w") as lock:  # pytest's workers share the cache
                fcntl.flock(lock, fcntl.LOCK_EX)
                _build(kind, folder / "build")
            built[kind] = folder / "build" / LIBRARY_NAME
        return built[kind]

    return build


@pytest.fixture(scope="session")
def sanitized_compiler(sanitized_library: Callable[[str], Path]) -> Callable[[str], list[str]]:
    """sanitized_compiler(kind): the command that compiles a program to be linked with it."""

    def command(kind: str) -> list[str]:
        compiler = _compiler_of(sanitized_library(kind))
        return [compiler, "-std=c++17", "-g", f"-fsanitize={kind}", "-fno-sanitize-recover=all"]

    return command


@pytest.fixture(scope="session")
def run_sanitized(
    sanitized_library: Callable[[str], Path],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_sanitized(code, kind): run Python code in a process that has the sanitizers' runtime.

    sys.argv[1] of the code is the path of the library, for `find_library(Path(sys.argv[1]))`. A
    finding ends the process with FAILED_STATUS and is described on stderr.
    """

    def run(code: str, kind: str) -> subprocess.CompletedProcess[str]:
        library = sanitized_library(kind)
        compiler = _compiler_of(library)
        # The interpreter is not instrumented, so the runtime has to be there before it starts; and
        # libstdc++, whose functions the runtime wraps.
        preload = [_runtime(compiler, name) for name in (RUNTIMES[kind], "libstdc++.so.6")]
        environment = {
            "LD_PRELOAD": " ".join(preload),
            "ASAN_OPTIONS": f"{OPTIONS}:detect_leaks=0",  # Python leaks on purpose
            "UBSAN_OPTIONS": f"{OPTIONS}:print_stacktrace=1",
            "TSAN_OPTIONS": f"{OPTIONS}:ignore_noninstrumented_modules=1",
        }
        return subprocess.run(
            [*_same_addresses(), sys.executable, "-c", code, str(library)],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return run


def _build(kind: str, folder: Path) -> None:
    cmake, ninja = _program("cmake"), _program("ninja")
    if cmake is None or not (ninja or shutil.which("make")):
        pytest.skip("needs cmake, and ninja or make")
    name = "Ninja" if ninja else "Unix Makefiles"
    facts = {f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}", f"CMAKE_GENERATOR:INTERNAL={name}"}
    if not facts <= set(_cache_of(folder)):
        shutil.rmtree(folder, ignore_errors=True)  # another tree's, copied with it
    generator = ["-G", name, *([f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else [])]
    options = [f"-DPUNA_SANITIZE={kind}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"]
    configure = ["-S", str(ROOT), "-B", str(folder), *generator, *options]
    for arguments in (configure, ["--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(
            [cmake, *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS
        )
        if "No CMAKE_CXX_COMPILER could be found" in done.stderr:
            pytest.skip("needs a C++ compiler")
        assert done.returncode == 0, done.stdout + done.stderr


def _program(name: str) -> str | None:
    """A program on the PATH, or from a package beside this Python (its venv may not be active)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _cache_of(folder: Path) -> list[str]:
    path = folder / "CMakeCache.txt"
    return path.read_text().splitlines() if path.exists() else []


def _compiler_of(library: Path) -> str:
    lines = _cache_of(library.parent)
    return next(line.partition("=")[2] for line in lines if line.startswith("CMAKE_CXX_COMPILER:"))


def _runtime(compiler: str, name: str) -> str:
    """The path of a library that comes with the compiler; the test skips if it has none such."""
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"needs {name} of g++")
    return path


def _same_addresses() -> list[str]:
    """Run without address randomisation where that is allowed: TSan of GCC 12 refuses to start when
    the kernel randomises 32 bits of it."""
    command = ["setarch", "--addr-no-randomize"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return []
    return command if allowed else []
