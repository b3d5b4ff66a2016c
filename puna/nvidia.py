"""nvidia: what of NVIDIA is on this machine: the driver, its GPUs, and the packages of puna[cuda].

Asks the driver itself (libcuda.so.1, through ctypes) and Python's package finder, and imports none
of the packages: an answer takes milliseconds. Decides which versions get along. Knows neither
targets nor engines.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DRIVER_LIBRARY = "libcuda.so.1"
# Module by module, how pip calls what is needed to compile kernels, and to run them.
COMPILERS = (("triton", "triton"), ("cuda.core", "cuda-core"), ("cuda.bindings", "cuda-bindings"))
RUNTIME = (("torch", "torch"),)
INSTALL = 'pip install "puna[cuda]"'
# Launches with attributes (programmatic dependent launch) came with CUDA 12.
MIN_CUDA = (12, 0)

_NO_DEVICE, _STUB_LIBRARY = 100, 34  # CUDA_ERROR_...
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as the driver counts them (CUDA_VISIBLE_DEVICES may hide some)."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: the newest CUDA that it runs, and its GPUs. `problem`, where it does not
    start, in its own words."""

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Packages:
    """What of puna[cuda] is installed. `torch_cuda` is the CUDA that torch was built for (None: for
    none, or there is no torch)."""

    missing: tuple[str, ...]  # as pip calls them
    torch_cuda: tuple[int, int] | None


class _Refused(Exception):
    """The driver's answer to a call that failed: its number, and its words for it."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{words} ({status})")
        self.status = status


def find_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver | None:
    """The driver of this machine; None where there is none. `load` opens a shared library."""
    try:
        library = load(DRIVER_LIBRARY)
    except OSError:
        return None
    version = ctypes.c_int(0)
    try:
        _call(library, "cuDriverGetVersion", ctypes.byref(version))
        cuda = version.value // 1000, version.value % 1000 // 10
    except _Refused as refused:
        return Driver((0, 0), problem=str(refused))
    try:
        _call(library, "cuInit", ctypes.c_uint(0))
        count = ctypes.c_int(0)
        _call(library, "cuDeviceGetCount", ctypes.byref(count))
        return Driver(cuda, tuple(_gpu(library, index) for index in range(count.value)))
    except _Refused as refused:
        if refused.status in (_NO_DEVICE, _STUB_LIBRARY):
            return Driver(cuda)
        return Driver(cuda, problem=str(refused))


def _gpu(library: Any, index: int) -> Gpu:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call(library, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int(0)
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        capability.append(value.value)
    memory = ctypes.c_size_t(0)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(index, name.value.decode(), (capability[0], capability[1]), memory.value)


def _call(library: Any, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        words = ctypes.c_char_p()
        library.cuGetErrorString(ctypes.c_int(status), ctypes.byref(words))
        raise _Refused(status, (words.value or b"unknown error").decode())


def why_not(driver: Driver, packages: Packages) -> str:
    """What keeps these packages from running on this driver's GPUs, and what mends it. Empty if
    nothing does."""
    if driver.problem:
        return f"the NVIDIA driver does not start: {driver.problem}: mend it (nvidia-smi says more)"
    if driver.cuda < MIN_CUDA:
        return (
            f"the NVIDIA driver runs CUDA {_dotted(driver.cuda)}, needed is {_dotted(MIN_CUDA)} or "
            "newer: update the driver (https://www.nvidia.com/drivers)"
        )
    if packages.missing:
        return f"the GPU needs {', '.join(packages.missing)}, not installed: {INSTALL}"
    if packages.torch_cuda is None:
        return (
            "the GPU needs a torch with CUDA, the installed one has none: "
            "pip install --force-reinstall torch"
        )
    if packages.torch_cuda[0] > driver.cuda[0]:
        return (
            f"torch was built for CUDA {_dotted(packages.torch_cuda)}, the NVIDIA driver runs "
            f"{_dotted(driver.cuda)}: update the driver (https://www.nvidia.com/drivers), install "
            f"a torch for CUDA {driver.cuda[0]} (https://pytorch.org/get-started)"
        )
    return ""


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def find_packages(needed: tuple[tuple[str, str], ...] = (*COMPILERS, *RUNTIME)) -> Packages:
    """What of puna[cuda] is installed, without importing it."""
    return Packages(missing_packages(needed), _torch_cuda())


def missing_packages(needed: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """How pip calls what is not installed of these."""
    return tuple(pip for module, pip in needed if not _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it would lie in
        return False


def _torch_cuda() -> tuple[int, int] | None:
    """From torch's version.py, which says it before torch, which takes seconds, is imported."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            text = (Path(folder) / "version.py").read_text()
        except OSError:
            continue
        if match := re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE):
            return int(match[1]), int(match[2])
    return None
