"""CUDA C++ kernels of puna on a CPU: compiled by g++ against `sm90.cuh` and `cluster.cuh` here.

For tests without a GPU. Every thread is a fiber, so barriers, copies and signals between threads
behave as on a GPU, if not in its order; memory models and speed do not.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from puna.cuda.compile import SOURCES
from puna.cuda.driver import TensorMap
from puna.cuda.source_table import CudaKernel, CudaSource

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")

_LAUNCH = """
#include <stdio.h>
#include <utility>
template <class... A, size_t... I>
std::function<void()> call_of(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  return [=] { kernel(*static_cast<std::remove_const_t<A>*>(args[I])...); };
}
template <class... A>
std::function<void()> call_of(void (*kernel)(A...), void** args) {
  return call_of(kernel, args, std::index_sequence_for<A...>());
}
extern "C" int launch(int which, int grid, int threads, int shared, int cluster, void** args) {
  std::function<void()> call;
  switch (which) { %s }
  return machine.run(grid, threads, shared, cluster, call);
}
"""


class EmulatedDriver:
    """Tensor maps as `sm90.cuh` here has them."""

    def tensor_map(
        self,
        address: int,
        dims: tuple[int, ...],
        box: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        is_swizzled: bool = False,
    ) -> TensorMap:
        more, contiguous = 5 - len(dims), (math.prod(dims[:i]) for i in range(1, len(dims)))
        numbers = *dims, *[1] * more, 1, *(strides or contiguous), *[0] * more, *box, *[1] * more
        packed = struct.pack("<Q10q5ii16x", address, *numbers, is_swizzled)
        memory = ctypes.create_string_buffer(packed, 128 + 64)
        start = -(-ctypes.addressof(memory) // 64) * 64
        ctypes.memmove(start, packed, 128)
        return TensorMap(memory, start)


class EmulatedLibrary:
    """The kernels of some sources by name; tensors are torch's on the CPU."""

    def __init__(self, sources: Iterable[CudaSource], folder: Path) -> None:
        self._kernels: dict[str, tuple[Any, int, CudaKernel, int]] = {}
        for source in sources:
            library = _compile(source, folder)
            for i, kernel in enumerate(source.kernels):
                # As the sources say: two for swiglu, of others as planned.
                default = 2 if kernel.entry == "swiglu" else 1
                cluster = int(dict(source.defines).get(f"CLUSTER_{kernel.entry}", default))
                self._kernels[kernel.name] = library, i, kernel, cluster

    def launch(
        self, name: str, grid: tuple[int, int, int], arguments: tuple[Any, ...], overlaps: bool
    ) -> None:
        library, which, kernel, cluster = self._kernels[name]
        values: list[Any] = []
        for value, (argument, kind) in zip(arguments, kernel.arguments, strict=True):
            if kind == "map":
                values.append(ctypes.c_char.from_address(value.address))
            elif kind == "i32":
                values.append(ctypes.c_int32(value))
            else:
                assert isinstance(value, int) or value.is_contiguous(), (name, argument)
                pointer = value if isinstance(value, int) else value.data_ptr()
                values.append(ctypes.c_void_p(pointer))
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        threads = kernel.num_warps * 32
        is_over = library.launch(which, grid[0], threads, kernel.shared, cluster, addresses)
        assert is_over, f"{name}: threads wait for what never comes"


def _compile(source: CudaSource, folder: Path) -> Any:
    """A library with the source's kernels."""
    made = folder / source.name
    shutil.copytree(SOURCES, made)
    for header in HERE.glob("*.cuh"):
        shutil.copy(header, made)
    cases = " ".join(
        f"case {i}: call = call_of({kernel.entry}, args); break;"
        for i, kernel in enumerate(source.kernels)
    )
    code = f'#include "{source.source}"\n{_LAUNCH % cases}'
    (made / "all.cpp").write_text(code)
    library = made / "kernels.so"
    command = [COMPILER or "g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC"]
    command += [f"-D{name}={value}" for name, value in source.defines]
    done = subprocess.run(
        [*command, str(made / "all.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))
