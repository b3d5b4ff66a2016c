"""Engines for a GPU on a machine without one: built, inspected, verified, damaged, run by NumPy.

Their kernels are stand-ins but in the last test, which compiles the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import remove, write
from small_models import DUMMY, Puna, Refused, listing

import puna.builder
import puna.cuda.compile
from puna import LLM, BuildConfig, build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.engine import EngineConfig
from puna.errors import ConfigError
from puna.manifest import read_manifest
from puna.nvidia import COMPILERS, missing_packages

ASK = ("--prompt", "Hello", "--max-new-tokens", 8)
REFERENCE = ("--device", "reference")
REAL = puna.cuda.compile.compile_kernels


def stand_ins(config: EngineConfig, progress: object = None) -> dict[str, bytes]:
    kernels = {"embed": {"file": "embed.cubin"}, "norm": {"file": "norm.cubin"}}
    table = {"target": config.target, "compilers": {"triton": "3.9.9"}, "kernels": kernels}
    files = {f"{name}.cubin": name.encode() * 1000 for name in kernels}
    return {"kernels.json": json.dumps(table).encode(), **files}


@pytest.fixture(scope="module", autouse=True)
def compilers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(puna.cuda.compile, "compile_kernels", stand_ins)
        patch.setattr(puna.builder, "missing_packages", lambda needed: ())
        yield


@pytest.fixture(scope="module")
def gpu_engine(hf_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `hf_checkpoint`, in float16; not to be changed."""
    config = BuildConfig("float16", target="sm_90", max_batch_size=4)
    return build(hf_checkpoint, tmp_path_factory.mktemp("engines") / "gpu", config).path


def test_build_says_what_it_is_for(hf_checkpoint: Path, puna: Puna, tmp_path: Path) -> None:
    found = puna("build", hf_checkpoint, "--target", "sm_90", "-o", tmp_path / "e")
    assert (found.status, found.err) == (0, "")
    assert f"{tmp_path / 'e'}: float16 for sm_90, " in found.out
    planned = json.loads(puna("plan", hf_checkpoint, "--target", "sm_90", "--json").out)
    assert planned["resolved"]["target"] == ["sm_90", "as asked"]
    assert planned["resolved"]["dtype"][0] == "float16"
    assert json.loads((tmp_path / "e" / "config.json").read_text())["memory"] == planned["ranks"]


def test_kernels_are_part_of_the_engine(gpu_engine: Path, puna: Puna) -> None:
    listed = {file.path for file in read_manifest(gpu_engine).files}
    names = {"kernels/kernels.json", "kernels/embed.cubin", "kernels/norm.cubin"}
    assert names <= listed and listed | {"manifest.json"} == listing(gpu_engine).keys()
    assert "all as built" in puna("verify", gpu_engine).out
    out = puna("inspect", gpu_engine).out
    assert "2 kernels for sm_90, compiled by triton 3.9.9:\nembed norm\n" in out
    found = json.loads(puna("inspect", gpu_engine, "--json").out)
    assert found["kernels"] == json.loads((gpu_engine / "kernels" / "kernels.json").read_text())


def test_an_engine_for_a_cpu_has_no_kernels(engine: Path, puna: Puna) -> None:
    assert not (engine / "kernels").exists()
    assert "kernels for" not in puna("inspect", engine).out
    assert json.loads(puna("inspect", engine, "--json").out)["kernels"] is None


def test_the_reference_computes_the_same_from_either_layout(
    gpu_engine: Path, hf_checkpoint: Path, tmp_path: Path
) -> None:
    """To the bit: the stored numbers are the same, and so is the order of every sum."""
    config = BuildConfig("float16", target="cpu")
    tiles = build(hf_checkpoint, tmp_path / "tiles", config).path
    tokens = [5, 1, 77, 200, 8, 31, 31, 9]
    with LLM(tiles, device="reference") as one, LLM(gpu_engine, device="reference") as other:
        assert (one.session.block_size, other.session.block_size) == (16, 64)
        expected, found = one.logits(tokens), other.logits(tokens)
        assert np.isfinite(expected).all() and np.array_equal(found, expected)


def test_it_runs_on_the_reference_and_not_on_a_cpu(
    gpu_engine: Path, puna: Puna, refused: Refused
) -> None:
    found = puna("run", gpu_engine, *ASK, *REFERENCE, "--json")
    assert (found.status, found.err) == (0, "")
    assert json.loads(found.out)["completion_tokens"] == 8
    line = refused("run", gpu_engine, *ASK, "--device", "cpu")
    assert "was built for sm_90, which device cpu does not run" in line
    assert "--device reference" in line and "--target cpu" in line


def flip(name: str) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip("kernels/norm.cubin"), "kernels/norm.cubin was changed: copy or build"),
        (flip("kernels/kernels.json"), "kernels/kernels.json was changed: copy or build"),
        (remove("kernels/embed.cubin"), "kernels/embed.cubin is missing: copy or build"),
        (write("kernels/more.cubin", "x"), "kernels/more.cubin is not in the manifest"),
    ],
    ids=["flipped kernel", "flipped table", "missing", "added"],
)
def test_damaged_kernels_are_found_when_the_engine_is_opened(
    damage: Any, message: str, gpu_engine: Path, copied: Any, refused: Refused
) -> None:
    path = copied(gpu_engine)
    damage(path)
    assert message in refused("run", path, *ASK, *REFERENCE)
    assert message in refused("verify", path)


@pytest.mark.parametrize(
    "damage", [remove("kernels/kernels.json"), write("kernels/kernels.json", "{")]
)
def test_inspect_says_that_the_table_is_damaged(
    damage: Any, gpu_engine: Path, copied: Any, refused: Refused
) -> None:
    path = copied(gpu_engine)
    damage(path)
    assert "kernels.json cannot be read" in refused("inspect", path)


def test_dummy_engines_have_kernels(puna: Puna, tmp_path: Path) -> None:
    out = tmp_path / "e"
    assert puna("build", "--dummy", DUMMY, "--target", "sm_90", "-o", out).status == 0
    assert listing(out).keys() == {
        "config.json",
        "manifest.json",
        "kernels/kernels.json",
        "kernels/embed.cubin",
        "kernels/norm.cubin",
    }
    assert "all as built" in puna("verify", out).out
    with LLM(out, device="reference") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
    (out / "kernels" / "norm.cubin").unlink()
    assert puna("build", "--dummy", DUMMY, "--target", "sm_90", "-o", out, "--force").status == 0
    assert (out / "kernels" / "norm.cubin").exists(), "--force replaces an engine with kernels"


def test_missing_compilers_are_said_before_anything_is_written(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.builder.missing_packages", lambda needed: ("triton", "cuda-core"))
    monkeypatch.setattr("puna.builder.workspace", lambda out: 1 / 0)
    line = refused("build", "--dummy", DUMMY, "--target", "sm_80", "-o", tmp_path / "e")
    assert "target sm_80 needs triton, cuda-core to compile its kernels" in line
    assert 'pip install "puna[cuda]"' in line and "--target cpu" in line
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_leaves_nothing(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: EngineConfig, progress: object = None) -> dict[str, bytes]:
        raise ConfigError("no such architecture: use another")

    monkeypatch.setattr("puna.cuda.compile.compile_kernels", fail)
    line = refused("build", "--dummy", DUMMY, "--target", "sm_90", "-o", tmp_path / "e")
    assert "no such architecture" in line and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_build_killed_while_it_compiles_leaves_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checkpoint = tmp_path / "e", DummyCheckpoint(parse_preset(DUMMY))
    config = BuildConfig(target="sm_90")

    def stuck(planned: EngineConfig, progress: object = None) -> dict[str, bytes]:
        (tmp_path / "compiling").touch()
        time.sleep(60)
        return {}

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr("puna.cuda.compile.compile_kernels", stuck)
            build(checkpoint, out, config, materialize=True)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while not (tmp_path / "compiling").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it was compiling"
    assert not out.exists() and len(list(tmp_path.glob("e.tmp-*"))) == 1
    build(checkpoint, out, config, materialize=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiling", "e"]


def test_quickstart_on_another_machine_is_not_built_again(
    hf_checkpoint: Path, puna: Puna, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is whole, there is only no GPU to run it."""
    monkeypatch.setattr("puna.runtime.gpu.find_driver", lambda: None)
    run = ("quickstart", "--model", hf_checkpoint, "--cache", tmp_path, "--target", "sm_90")
    found = puna(*run)
    assert found.status == 2 and "the engine was built for sm_90" in found.err
    assert found.out.startswith("built ") and "for sm_90 from" in found.out
    assert "again" not in found.out
    (engine,) = (tmp_path / "engines").iterdir()
    (engine / "kernels" / "norm.cubin").write_bytes(b"")
    assert "norm.cubin has 0 bytes instead of 4,000: copy" in (again := puna(*run)).out
    assert "building it again" in again.out


@pytest.mark.skipif(bool(missing_packages(COMPILERS)), reason="needs the compilers of puna[cuda]")
def test_real_kernels(puna: Puna, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without a GPU; every file of the table is there, and none beside them."""
    monkeypatch.setattr("puna.cuda.compile.compile_kernels", REAL)
    found = puna("build", "--dummy", DUMMY, "--target", "sm_90", "-o", tmp_path / "e")
    assert found.status == 0, found.err
    table = json.loads((tmp_path / "e" / "kernels" / "kernels.json").read_text())
    assert table["target"] == "sm_90" and "triton" in table["compilers"]
    files = {entry["file"] for entry in table["kernels"].values()}
    folder = tmp_path / "e" / "kernels"
    assert {path.name for path in folder.iterdir()} == files | {"kernels.json"}
    assert all((folder / name).read_bytes().startswith(b"\x7fELF") for name in files)
    assert "all as built" in puna("verify", tmp_path / "e").out
