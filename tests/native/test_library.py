"""Which library is taken, and what is said when there is none: on copies of puna.native."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "libpuna.dylib" if sys.platform == "darwin" else "libpuna.so"
SOURCE = """
extern "C" const char* puna_source_digest(void) { return PUNA_SOURCE_DIGEST; }
"""
ASK = "from puna.native.library import find_library, why_missing as why\n"
WHICH = "library = find_library()\nprint(library and library._name, why())"


class Tree:
    """A copy of puna.native with sources of its own, as a source tree or as an installation."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        self.native = root / "puna" / "native"
        self.native.mkdir(parents=True)
        for path in ("__init__.py", "errors.py", "native/__init__.py", "native/library.py"):
            shutil.copy(ROOT / "puna" / path, root / "puna" / path)
        for name, text in files.items():
            (self.native / "csrc").mkdir(exist_ok=True)
            (self.native / "csrc" / name).write_text(text)

    @property
    def library(self) -> Path:
        return self.native / NAME

    def install(self) -> Path:
        """Make this an installation: with metadata, without sources."""
        metadata = self.root / "puna-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: puna\nVersion: 0.1.0\n")
        shutil.rmtree(self.native / "csrc", ignore_errors=True)
        return self.root

    def run(self, code: str, installed: Path | None = None) -> str:
        path = os.pathsep.join(str(root) for root in (self.root, installed) if root)
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],  # -S: no installed puna but the one that we give
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "tree", {"abi.cpp": SOURCE, "abi.h": "// none\n"})


@pytest.fixture
def compiled(tree: Tree, tmp_path: Path) -> Callable[..., None]:
    """compiled(path): a library at `path`, built from the sources of `tree`."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")

    def compile_to(path: Path, digest: str | None = None) -> None:
        if digest is None:
            digest = tree.run("import puna.native.library as it; print(it._sources_digest())")
        source = tree.native / "csrc" / "abi.cpp"
        define = f'-DPUNA_SOURCE_DIGEST="{digest}"'
        command = [compiler, "-shared", "-fPIC", define, str(source), "-o", str(path)]
        subprocess.run(command, check=True)

    return compile_to


def test_beside_the_python_files(tree: Tree, compiled: Callable[..., None]) -> None:
    compiled(tree.library)
    modules = "import sys; print('importlib.metadata' in sys.modules)"
    assert tree.run(f"{ASK}{WHICH}\n{modules}").split() == [str(tree.library), "False"]


def test_in_the_installation_while_the_sources_are_imported(
    tree: Tree, compiled: Callable[..., None], tmp_path: Path
) -> None:
    wheel = Tree(tmp_path / "site", {})
    compiled(wheel.library)
    assert tree.run(ASK + WHICH, wheel.install()) == str(wheel.library)


def test_an_installation_needs_no_sources(
    tree: Tree, compiled: Callable[..., None], tmp_path: Path
) -> None:
    wheel = Tree(tmp_path / "site", {})
    compiled(wheel.library, digest="whatever")
    wheel.install()
    assert wheel.run(ASK + WHICH) == str(wheel.library)


def test_none_anywhere(tree: Tree, tmp_path: Path) -> None:
    site = Tree(tmp_path / "site", {}).install()
    for installed in (None, site):
        found, _, why = tree.run(ASK + WHICH, installed).partition(" ")
        assert found == "None"
        assert "\n" not in why and "is not in this installation: install a C++ compiler" in why


@pytest.mark.parametrize("change", ["edit", "rename", "add"])
def test_other_sources(tree: Tree, compiled: Callable[..., None], change: str) -> None:
    compiled(tree.library)
    header = tree.native / "csrc" / "abi.h"
    if change == "edit":
        header.write_text("// some\n")
    elif change == "rename":
        header.rename(header.with_name("ab.h"))
    else:
        header.with_name("more.cpp").write_text("")
    found, _, why = tree.run(ASK + WHICH).partition(" ")
    assert found == "None"
    assert "\n" not in why and "was built from other sources" in why
    assert "cmake -S . -B build && cmake --build build" in why


def test_a_stale_one_here_does_not_hide_a_fresh_one_there(
    tree: Tree, compiled: Callable[..., None], tmp_path: Path
) -> None:
    compiled(tree.library, digest="old")
    wheel = Tree(tmp_path / "site", {})
    compiled(wheel.library)
    assert tree.run(ASK + WHICH, wheel.install()) == str(wheel.library)


def test_one_that_does_not_say_what_it_is(tree: Tree, compiled: Callable[..., None]) -> None:
    (tree.native / "csrc" / "abi.cpp").write_text("int puna_nothing;\n")
    compiled(tree.library)
    assert "was built from other sources" in tree.run(ASK + WHICH)


def test_one_that_cannot_be_loaded(tree: Tree) -> None:
    tree.library.write_bytes(b"\x7fELF of another machine")
    found, _, why = tree.run(ASK + WHICH).partition(" ")
    assert found == "None"
    assert "\n" not in why and "cannot be loaded" in why and "pip install ." in why


def test_one_that_is_named(tree: Tree, compiled: Callable[..., None], tmp_path: Path) -> None:
    compiled(tree.library)
    compiled(tmp_path / "other.so")
    named = f"{ASK}from pathlib import Path\npath = Path({str(tmp_path)!r})\n"
    found = "find_library(path / 'other.so')._name, find_library()._name, find_library(path / 'no')"
    printed = tree.run(f"{named}print({found}, why(path / 'no'))").split()
    assert printed[:3] == [str(tmp_path / "other.so"), str(tree.library), "None"]
    assert " ".join(printed[3:]) == f"there is no {tmp_path / 'no'}"


def test_cmake_and_python_agree_on_the_digest(tmp_path: Path) -> None:
    """The part of CMakeLists.txt that computes it, run as a script over names that sort apart."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        pytest.skip("needs cmake")
    names = (
        "b.cpp",
        "B.h",
        "a_b.cpp",
        "a.h",
        "ab.cpp",
        "a-b.h",
        "c.inl",
        "a.txt",
        "a.cpp~",
        "empty.cpp",
    )
    tree = Tree(tmp_path / "tree", {name: f"// {name}\r\n" * len(name) for name in names[:-1]})
    (tree.native / "csrc" / "empty.cpp").write_text("")
    text = (ROOT / "CMakeLists.txt").read_text()
    part = re.search(r"^file\(GLOB sources .*?^string\(SHA256[^\n]*\n", text, re.M | re.S)
    assert part
    lines = [line for line in part[0].splitlines() if "set_property" not in line]
    script = tmp_path / "digest.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        + f'set(csrc "{tree.native / "csrc"}")\n'
        + "\n".join(lines).replace(" CONFIGURE_DEPENDS", "")
        + '\nmessage("${digest}")\n'
    )
    done = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=True)
    assert len(done.stderr.strip()) == 64
    program = "import puna.native.library as it; print(it._sources_digest())"
    assert tree.run(program) == done.stderr.strip()


def test_finding_it_is_quick(tree: Tree, compiled: Callable[..., None]) -> None:
    compiled(tree.library)
    clock = "import time; start = time.perf_counter()\n"
    program = f"import puna\n{clock}{ASK}assert find_library()\nprint(time.perf_counter() - start)"
    assert min(float(tree.run(program)) for _ in range(5)) < 0.1
