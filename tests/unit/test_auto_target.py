"""Target auto: what is found on a machine, and what it means; with a driver made up here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import puna.auto_target
import puna.builder
from puna.auto_target import auto_target, choose_target
from puna.builder import plan_checkpoint
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.errors import ConfigError
from puna.nvidia import (
    COMPILERS,
    Driver,
    Gpu,
    Packages,
    find_driver,
    find_packages,
    missing_packages,
)
from puna.plan import BuildConfig
from puna.targets import TARGETS, target_of

H200 = Gpu(0, "NVIDIA H200", (9, 0), 150 * 10**9)
HERE = Driver((13, 0), (H200,))
ALL = Packages((), (13, 0))


class FakeDriver:
    """libcuda.so.1 as far as it is asked: the functions write to what `byref` points at."""

    def __init__(
        self, version: int = 13000, gpus: tuple[Gpu, ...] = (H200,), **failing: int
    ) -> None:
        self.version, self.gpus, self.failing = version, gpus, failing
        self.is_started = False
        self.opened: list[str] = []

    def open(self, name: str) -> FakeDriver:
        self.opened.append(name)
        return self

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name in self.failing:
                return self.failing[name]
            return getattr(self, f"do_{name}")(*arguments) or 0

        return call

    def do_cuGetErrorString(self, status: Any, words: Any) -> None:
        words._obj.value = {100: b"no CUDA-capable device is detected"}.get(status.value, b"broken")

    def do_cuDriverGetVersion(self, version: Any) -> None:
        version._obj.value = self.version

    def do_cuInit(self, flags: Any) -> None:
        assert flags.value == 0
        self.is_started = True

    def do_cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0 if self.is_started else 3  # CUDA_ERROR_NOT_INITIALIZED

    def do_cuDeviceGet(self, device: Any, index: Any) -> None:
        device._obj.value = 70 + index.value  # a handle is not an index

    def do_cuDeviceGetName(self, name: Any, size: Any, device: Any) -> None:
        assert size.value == len(name)
        name.value = self.gpus[device.value - 70].name.encode()

    def do_cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> None:
        value._obj.value = self.gpus[device.value - 70].capability[{75: 0, 76: 1}[attribute.value]]

    def do_cuDeviceTotalMem_v2(self, size: Any, device: Any) -> None:
        size._obj.value = self.gpus[device.value - 70].memory_bytes


def test_the_driver_is_asked_for_its_version_and_gpus() -> None:
    other = Gpu(1, "NVIDIA L4", (8, 9), 24 * 10**9)
    library = FakeDriver(12040, (H200, other))
    assert find_driver(library.open) == Driver((12, 4), (H200, other))
    assert library.opened == ["libcuda.so.1"]


def test_a_machine_without_a_driver_has_none() -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert find_driver(missing) is None


@pytest.mark.parametrize("status", [100, 34])
def test_a_driver_without_gpus_is_no_problem(status: int) -> None:
    """Of a container without GPUs, or a library that only stands in for the driver's."""
    assert find_driver(FakeDriver(cuInit=status).open) == Driver((13, 0))


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName"])
def test_a_driver_that_does_not_start_says_why(call: str) -> None:
    driver = find_driver(FakeDriver(**{call: 803}).open)
    assert driver == Driver((13, 0), (), "broken (803)")
    driver = find_driver(FakeDriver(cuDriverGetVersion=999).open)
    assert driver is not None and driver.problem == "broken (999)"


def test_the_real_driver_of_this_machine_is_asked_without_harm() -> None:
    driver = find_driver()
    assert driver is None or driver.problem or driver.cuda >= (1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n", (13, 0)),
        ("cuda = '12.6'\n", (12, 6)),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = '13.0'\n", None),
        ("", None),
    ],
)
def test_packages_are_found_without_being_imported(
    text: str, expected: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "triton", "cuda/core", "cuda/bindings"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("torch", "triton", "cuda")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_packages() == Packages((), expected)
    assert missing_packages(COMPILERS) == ()
    (tmp_path / "triton").rename(tmp_path / "not-triton")
    (tmp_path / "cuda" / "bindings").rename(tmp_path / "cuda" / "other")
    assert missing_packages(COMPILERS) == find_packages().missing == ("triton", "cuda-bindings")
    (tmp_path / "cuda").rename(tmp_path / "not-cuda")
    (tmp_path / "torch").rename(tmp_path / "not-torch")
    sys.path_importer_cache.clear()
    assert find_packages() == Packages(("triton", "cuda-core", "cuda-bindings", "torch"), None)


def test_capabilities_and_their_targets() -> None:
    found = {name: target.capability for name, target in TARGETS.items()}
    assert found == {
        "cpu": None,
        "sm_80": (8, 0),
        "sm_86": (8, 6),
        "sm_89": (8, 9),
        "sm_90": (9, 0),
        "sm_100": (10, 0),
        "sm_120": (12, 0),
    }
    for name, capability in found.items():
        if capability is not None:
            assert target_of(capability) == TARGETS[name]
    for capability in ((6, 1), (7, 5), (8, 7), (10, 3), (11, 0), (12, 1), (13, 0)):
        assert target_of(capability) is None


def test_auto_is_the_gpu_that_is_here() -> None:
    assert choose_target(HERE, ALL) == ("sm_90", "NVIDIA H200 (compute capability 9.0)")
    old_torch = replace(ALL, torch_cuda=(12, 8))
    assert choose_target(HERE, old_torch)[0] == "sm_90", "a driver runs older CUDA as well"
    assert choose_target(replace(HERE, cuda=(12, 2)), old_torch)[0] == "sm_90", "and minor versions"
    two = replace(HERE, gpus=(replace(H200, capability=(8, 9)), H200))
    assert choose_target(two, ALL)[0] == "sm_89", "the first one"


def test_auto_is_cpu_where_there_is_no_gpu() -> None:
    nothing = Packages(("torch",), None)
    assert choose_target(None, nothing) == ("cpu", "there is no NVIDIA driver")
    assert choose_target(Driver((13, 0)), nothing) == ("cpu", "the NVIDIA driver finds no GPU")


@pytest.mark.parametrize(
    ("driver", "packages", "message"),
    [
        (replace(HERE, problem="broken (803)"), ALL, r"does not start: broken \(803\): mend it"),
        (HERE, replace(ALL, missing=("triton", "torch")), r'triton, torch.*install "puna\[cuda\]"'),
        (HERE, replace(ALL, torch_cuda=None), "with CUDA.*pip install --force-reinstall torch"),
        (replace(HERE, cuda=(11, 8)), ALL, "driver runs CUDA 11.8, needed is 12.0.*update the"),
        (
            replace(HERE, cuda=(12, 4)),
            ALL,
            "built for CUDA 13.0.*runs 12.4: update the driver.*, inst",
        ),
        (replace(HERE, gpus=(replace(H200, capability=(7, 5)),)), ALL, "7.5.*sm_80, sm_86"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_never_passed_over(
    driver: Driver, packages: Packages, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as info:
        choose_target(driver, packages)
    assert "build for the CPU with --target cpu" in str(info.value)
    assert "\n" not in str(info.value)


def test_auto_asks_for_packages_only_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(puna.auto_target, "find_driver", lambda: None)
    monkeypatch.setattr(puna.auto_target, "find_packages", lambda: 1 / 0)
    assert auto_target()[0] == "cpu"
    monkeypatch.setattr(puna.auto_target, "find_driver", lambda: HERE)
    monkeypatch.setattr(puna.auto_target, "find_packages", lambda: ALL)
    assert auto_target()[0] == "sm_90"


def test_a_build_looks_for_a_gpu_only_where_no_target_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = DummyCheckpoint(parse_preset("hidden=64,layers=2,heads=4,ffn=90,vocab=100"))
    monkeypatch.setattr(puna.builder, "auto_target", lambda: ("sm_89", "made up"))
    assert plan_checkpoint(checkpoint, BuildConfig()).resolved["target"] == ("sm_89", "made up")
    monkeypatch.setattr(puna.builder, "auto_target", lambda: 1 / 0)
    for target in ("cpu", "sm_90"):
        assert plan_checkpoint(checkpoint, BuildConfig(target=target)).target == target
