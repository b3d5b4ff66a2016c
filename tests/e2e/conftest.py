"""What the tests of the command line share: checkpoints, engines, and `puna` in process."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rank_jobs import SHAPE, Engines
from small_models import (
    DUMMY,
    ROOT,
    Puna,
    Ran,
    Refused,
    Script,
    write_checkpoint,
    write_tokenizer,
)

from puna import BuildConfig, build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.cli import exit_status, main

EXAMPLES = ROOT / "examples" / "llama"
SCRIPTS = ("flags", "build_flags", "build", "run", "summarize")


@pytest.fixture
def puna(capsys: pytest.CaptureFixture[str]) -> Puna:
    """Run one command in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            status: object = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(puna: Puna) -> Refused:
    """Run a command that must end with 2 and one line on stderr; return that line."""

    def run(*arguments: object) -> str:
        found = puna(*arguments)
        assert (found.status, found.out) == (2, ""), found
        assert found.err.startswith("puna: ") and found.err.count("\n") == 1, found.err
        return found.err

    return run


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face checkpoint with a tokenizer; not to be changed (see `hf_copy`)."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "hf")


@pytest.fixture(scope="session")
def engine(hf_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of `hf_checkpoint`; not to be changed."""
    return build(hf_checkpoint, tmp_path_factory.mktemp("engines") / "engine").path


@pytest.fixture(scope="session")
def pair_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of two tensor-parallel ranks, without a tokenizer; not to be changed."""
    path = tmp_path_factory.mktemp("engines") / "pair"
    assert main(["build", "--dummy", DUMMY, "--materialize", "--tp", "2", "-o", str(path)]) == 0
    return path


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a checkpoint or an engine to where a test may damage it."""

    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / f"copy-of-{source.name}"))

    return copy


@pytest.fixture(scope="session")
def rank_engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """rank_engines(tp=, pp=): the miniature in float32, made once; not to be changed."""
    made: dict[tuple[int, int], Path] = {}

    def get(tp: int = 1, pp: int = 1) -> Path:
        if (tp, pp) not in made:
            checkpoint = DummyCheckpoint(parse_preset(SHAPE), seed=1)
            config = BuildConfig(dtype="float32", tp_size=tp, pp_size=pp)
            out = tmp_path_factory.mktemp("engines") / f"tp{tp}pp{pp}"
            made[tp, pp] = build(checkpoint, out, config, materialize=True).path
        return made[tp, pp]

    return get


@pytest.fixture(scope="session")
def examples() -> Iterator[dict[str, ModuleType]]:
    """The scripts of examples/llama, which import each other by their plain names."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield {name: importlib.import_module(name) for name in SCRIPTS}
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture
def run_example(examples: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> Script:
    """run_example(name, command line): run one of the scripts in this process; ␣ is a space."""

    def run(name: str, command: str) -> Ran:
        capsys.readouterr()
        module = examples[name]
        parser = examples["build_flags"].parser if name == "build" else module.parser
        words = [word.replace("␣", " ") for word in command.split()]
        try:
            status: object = exit_status(
                lambda: module.run(examples["flags"].Flags(parser(), module.DEFAULTS, words))
            )
        except SystemExit as error:
            status = error.code
        return Ran(status, *capsys.readouterr())

    return run
