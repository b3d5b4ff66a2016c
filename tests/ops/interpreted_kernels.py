"""CudaOps on the CPU: Triton's kernels under its interpreter, those in CUDA C++ emulated.

Only for a process in which TRITON_INTERPRET is set: see `interpreter`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from cuda_bench import TestDevice
from emulator import COMPILER, EmulatedDriver, EmulatedLibrary
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from puna.cuda.choices import Choices
from puna.cuda.fused_ops import fused_ops
from puna.cuda.kernel_table import triton_kernels
from puna.cuda.ops import CudaOps
from puna.cuda.source_table import CudaSource, cuda_sources
from puna.cuda.swiglu import swiglu
from puna.engine import EngineConfig


@cache
def emulated(source: CudaSource) -> EmulatedLibrary:
    return EmulatedLibrary([source], Path(mkdtemp()))


class InterpretedKernels:
    """`Kernels` that calls Triton's functions themselves, and emulates the others."""

    def __init__(self, config: EngineConfig) -> None:
        self._kernels = {kernel.name: kernel for kernel in triton_kernels(config)}
        sources = cuda_sources(config)
        self._sources = {it.name: source for source in sources for it in source.kernels}

    def constant(self, name: str, key: str) -> Any:
        return dict(self._kernels[name].constants)[key]

    def launch(
        self, name: str, grid: tuple[int, int, int], arguments: tuple[Any, ...], overlaps: bool
    ) -> None:
        if source := self._sources.get(name):
            emulated(source).launch(name, grid, arguments, overlaps)
            return
        kernel = self._kernels[name]
        module = importlib.import_module(f"puna.cuda.kernels.{kernel.module}")
        names = [argument for argument, _ in kernel.arguments]
        given = dict(zip(names, arguments, strict=True))
        constants = {**dict(kernel.constants), "OVERLAPS": False}  # one after the other
        getattr(module, kernel.function)[grid](**given, **constants)


def float32_of(handle: TensorHandle) -> Any:
    if str(handle.dtype.scalar) != "bf16":
        return handle.data.astype(np.float32)
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> Any:
    return TensorHandle(float32_of(a) @ float32_of(b) + d.data, d.dtype.scalar)


cast = InterpreterBuilder.cast_impl


def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> Any:
    if str(dst_type.scalar) != "bf16" or src.data.dtype != np.float32:
        return cast(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return TensorHandle(rounded.astype(np.uint16), dst_type.scalar)


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as integers, multiplies them as such, and cuts float32
    off instead of rounding it."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@pytest.fixture(autouse=True)
def rows_apart_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AMX torch.mm of bfloat16 lets NaNs of a row into the next (torch 2.13)."""
    multiply = torch.mm

    def mm(x_TK: torch.Tensor, w_KN: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(multiply(x_TK.float(), w_KN.float()))

    monkeypatch.setattr(torch, "mm", mm)


@dataclass(frozen=True)
class Done:
    def run(self) -> None:
        """It ran when it was recorded."""


class EagerRecorder:
    def prepare(self, call: Callable[[], None]) -> None:
        pass

    def record(self, emit: Callable[[], None]) -> Done:
        emit()
        return Done()


def make_ops(
    config: EngineConfig,
    arrays: dict[str, torch.Tensor],
    choices: Choices,
    deterministic: bool,
    has_fused: bool,
) -> CudaOps:
    kernels, recorder = InterpretedKernels(config), EagerRecorder()
    driver: Any = EmulatedDriver()
    return CudaOps(
        config,
        0,
        kernels,
        arrays,
        recorder,
        choices,
        deterministic=deterministic,
        # The CPU emulates a few CTAs.
        fused=fused_ops(config, kernels, driver, arrays, 4) if COMPILER and has_fused else (),
        swiglu=swiglu(config, kernels, driver, 4) if COMPILER else None,
    )


@pytest.fixture
def device() -> TestDevice:
    return TestDevice("cpu", make_ops)
