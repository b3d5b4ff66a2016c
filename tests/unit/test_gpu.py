"""The GPU for an engine: the right one is taken, and everything else says what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import puna.runtime.gpu
from puna.builder import plan_checkpoint
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.engine import EngineConfig
from puna.errors import EngineError
from puna.nvidia import Driver, Gpu, Packages
from puna.plan import BuildConfig
from puna.runtime.gpu import choose_gpu, find_gpu

SHAPE = "hidden=64,layers=2,heads=4,ffn=90,vocab=100"
H200 = Gpu(0, "NVIDIA H200", (9, 0), 150 * 10**9)
L4 = Gpu(1, "NVIDIA L4", (8, 9), 24 * 10**9)
ORIN = Gpu(0, "Orin", (8, 7), 8 * 10**9)
HERE = Driver((13, 0), (H200, L4))
ALL = Packages((), (13, 0))


def engine(target: str, source: str = SHAPE) -> EngineConfig:
    planned = plan_checkpoint(DummyCheckpoint(parse_preset(SHAPE)), BuildConfig(target=target))
    return replace(planned, provenance=replace(planned.provenance, source=source))


def test_the_gpu_that_was_named_is_taken() -> None:
    assert choose_gpu(engine("sm_90"), 0, HERE, ALL) == H200
    assert choose_gpu(engine("sm_89"), 1, HERE, ALL) == L4


def test_another_gpu_says_which_and_how_to_rebuild() -> None:
    with pytest.raises(EngineError) as info:
        choose_gpu(engine("sm_90"), 1, HERE, ALL)
    assert str(info.value) == (
        "the engine was built for sm_90, GPU 1 is NVIDIA L4 (compute capability 8.9): build it "
        f"again: puna build --dummy {SHAPE} -o ENGINE --target sm_89"
    )
    config = engine("sm_80", "/models/my llama")
    config = replace(config, provenance=replace(config.provenance, kind="hf"))
    with pytest.raises(EngineError, match="puna build '/models/my llama' -o ENGINE --target sm_90"):
        choose_gpu(config, 0, HERE, ALL)
    with pytest.raises(EngineError, match=r"GPU 0 is Orin .*8\.7.* --target cpu$"):
        choose_gpu(engine("sm_86"), 0, Driver((13, 0), (ORIN,)), ALL)


@pytest.mark.parametrize(
    ("index", "driver", "packages", "message"),
    [
        (0, None, Packages((), None), r"sm_90, and there is no NVIDIA driver here: .*--target cpu"),
        (0, Driver((13, 0)), ALL, r"the driver finds no GPU: build it for the CPU \(puna build"),
        (2, HERE, ALL, "device cuda:2 is not here.*there are 2: use a lower one"),
        (0, Driver((13, 0), (), "broken (803)"), ALL, r"does not start: broken \(803\): mend it"),
        (0, Driver((11, 8), (H200,)), ALL, "runs CUDA 11.8, needed is 12.0"),
        (0, HERE, Packages(("torch",), None), r'needs torch, not installed: pip install "puna\['),
        (0, HERE, Packages((), None), "a torch with CUDA, the installed one has none"),
        (0, Driver((12, 4), (H200,)), ALL, "built for CUDA 13.0, the NVIDIA driver runs 12.4"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    index: int, driver: Driver | None, packages: Packages, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as info:
        choose_gpu(engine("sm_90"), index, driver, packages)
    assert "\n" not in str(info.value)


def test_an_engine_for_the_cpu_does_not_run_on_a_gpu() -> None:
    with pytest.raises(EngineError, match=r"built for cpu, device cuda .*--target sm_90"):
        choose_gpu(engine("cpu"), 0, HERE, ALL)


def test_compilers_are_not_needed_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    monkeypatch.setattr(puna.runtime.gpu, "find_driver", lambda: HERE)
    assert find_gpu(engine("sm_90")) == H200
