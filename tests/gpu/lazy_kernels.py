"""An engine's kernels, each compiled for this GPU when it is first launched.

Tests have many small configurations and use few kernels of each; an engine has them all.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from puna.cuda.compile import _compile_triton, _cuda_entry, compile_cuda
from puna.cuda.driver import Driver
from puna.cuda.kernel_table import KERNELS_FILE, triton_kernels
from puna.cuda.library import Library
from puna.cuda.source_table import cuda_sources
from puna.engine import EngineConfig


def local_target() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class LazyKernels:
    def __init__(self, config: EngineConfig) -> None:
        torch.zeros(1, device="cuda")  # a context
        self.config = replace(config, target=local_target())
        self._specs = {kernel.name: kernel for kernel in triton_kernels(self.config)}
        sources = cuda_sources(self.config)
        self._sources = {it.name: (it, source) for source in sources for it in source.kernels}
        self._driver = Driver()
        self._loaded: dict[str, Library] = {}

    def constant(self, name: str, key: str) -> Any:
        return dict(self._specs[name].constants)[key]

    def _compile(self, name: str) -> tuple[bytes, dict[str, Any]]:
        if name not in self._sources:
            return _compile_triton(self._specs[name], self.config)
        kernel, source = self._sources[name]
        return compile_cuda(source, self.config.target), _cuda_entry(kernel, f"{name}.cubin")

    def launch(
        self, name: str, grid: tuple[int, int, int], arguments: tuple[Any, ...], overlaps: bool
    ) -> None:
        if name not in self._loaded:
            cubin, entry = self._compile(name)
            table = {"target": self.config.target, "kernels": {name: entry}}
            files = {entry["file"]: cubin, KERNELS_FILE: json.dumps(table).encode()}
            self._loaded[name] = Library(files, self._driver, current_stream)
        self._loaded[name].launch(name, grid, arguments, overlaps)
