"""--device: which one an engine gets by its target; what is refused."""

from __future__ import annotations

import pytest
from test_gpu import ALL, H200, engine

import puna.runtime.gpu
from puna.errors import EngineError
from puna.nvidia import Driver, Gpu
from puna.runtime.device import Choice, choose_device

SECOND = Gpu(1, "NVIDIA H100", (9, 0), 80 * 10**9)


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puna.runtime.gpu, "find_driver", lambda: Driver((13, 0), (H200, SECOND)))
    monkeypatch.setattr(puna.runtime.gpu, "find_packages", lambda needed: ALL)


def test_an_engine_for_a_gpu_gets_one() -> None:
    for device in ("auto", "cuda", "cuda:0"):
        assert choose_device(device, engine("sm_90")) == Choice("cuda", gpu=0)
    assert choose_device("cuda:1", engine("sm_90")) == Choice("cuda", gpu=1)
    assert choose_device("reference", engine("sm_90")) == Choice("reference", layout="rows")


def test_an_engine_for_the_cpu_does_not_look_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(puna.runtime.gpu, "find_driver")
    assert choose_device("auto", engine("cpu")).device in ("cpu", "reference")


@pytest.mark.parametrize(
    ("device", "target", "message"),
    [
        ("cpu", "sm_90", "built for sm_90, which device cpu does not run: use --device reference"),
        ("cpu:avx2", "sm_90", "built for sm_90, which device cpu does not run"),
        ("cuda", "cpu", "built for cpu, device cuda runs engines for a GPU: use --device cpu"),
        ("cuda:2", "sm_90", "device cuda:2 is not here, GPUs count from 0 and there are 2"),
        ("cuda:first", "sm_90", "device cuda:first has no number of a GPU: use cuda, or cuda:0"),
        ("cuda:-1", "sm_90", "has no number of a GPU"),
        ("cuda:", "sm_90", "device 'cuda:' is not in this version of puna: use one of auto, cpu"),
        ("auto", "sm_80", r"built for sm_80, GPU 0 is NVIDIA H200 .*--target sm_90"),
    ],
)
def test_what_is_refused(device: str, target: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        choose_device(device, engine(target))
