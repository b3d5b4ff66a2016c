"""Library: an engine's compiled kernels on a GPU, launched by name.

Reads `kernels/` of an engine. Decides how arguments become what the driver wants, and checks them
against what the kernel was compiled for. Compiles nothing.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puna.cuda.driver import Driver, Function
from puna.cuda.kernel_table import KERNELS_FILE
from puna.engine import KERNELS_DIR
from puna.errors import EngineError

_SCALARS = MappingProxyType(
    {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "fp64": ctypes.c_double}
)
_ALIGNMENT = 16  # of pointers to floats, as the kernels were compiled for


@dataclass(frozen=True, slots=True)
class _Kernel:
    function: Function
    arguments: tuple[tuple[str, str], ...]
    num_null: int
    constants: Mapping[str, Any]


def read_kernels(engine_dir: Path) -> dict[str, bytes]:
    """Files of an engine's `kernels/` by name, as `compile_kernels` made them."""
    folder = engine_dir / KERNELS_DIR
    try:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    except OSError as error:
        raise EngineError(
            f"{folder} cannot be read ({error.strerror}): build the engine again"
        ) from error


class Library:
    """Every kernel of an engine, loaded into torch's current context.

    `stream` gives the stream that launches go to, as the driver's handle: torch's current one.
    """

    def __init__(self, files: Mapping[str, bytes], driver: Driver, stream: Callable[[], int]):
        self._driver = driver
        self._stream = stream
        table = json.loads(files[KERNELS_FILE])
        self.target: str = table["target"]
        modules: dict[str, int] = {}
        most_shared: dict[tuple[str, str], int] = {}
        for entry in table["kernels"].values():
            key = entry["file"], entry["entry"]
            most_shared[key] = max(entry["shared"], most_shared.get(key, 0))
        self._kernels: dict[str, _Kernel] = {}
        for name, entry in table["kernels"].items():
            file = entry["file"]
            if file not in modules:
                modules[file] = driver.load(files[file], f"{KERNELS_DIR}/{file}")
            num_threads = entry["num_warps"] * 32
            self._kernels[name] = _Kernel(
                driver.function(
                    modules[file],
                    entry["entry"],
                    num_threads,
                    entry["shared"],
                    most_shared[file, entry["entry"]],
                ),
                tuple((argument, kind) for argument, kind in entry["arguments"]),
                entry["null_arguments"],
                entry["constants"],
            )

    def constant(self, name: str, key: str) -> int:
        """What the kernel was compiled with."""
        return self._kernels[name].constants[key]

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        overlaps: bool,
    ) -> None:
        """Run on the current stream; tensors are passed as pointers, numbers as what the kernel
        takes, tensor maps as they are; a number for a pointer is an address.

        `overlaps`: it may start before the kernel in front has ended, if it was compiled with the
        constant OVERLAPS, which says that it waits by itself.
        """
        kernel = self._kernels[name]
        assert len(arguments) == len(kernel.arguments), (name, len(arguments))
        values: list[Any] = []
        for value, (argument, kind) in zip(arguments, kernel.arguments, strict=True):
            if kind == "map":
                values.append(ctypes.c_char.from_address(value.address))
                continue
            if not kind.startswith("*"):
                values.append(_SCALARS[kind](value))
                continue
            if isinstance(value, int):  # an address
                values.append(ctypes.c_void_p(value))
                continue
            pointer = value.data_ptr()
            assert value.element_size() == _size(kind), f"{name}: {argument} is {value.dtype}"
            assert kind == "*i32" or pointer % _ALIGNMENT == 0, f"{name}: {argument} is unaligned"
            values.append(ctypes.c_void_p(pointer))
        values += [ctypes.c_void_p(None)] * kernel.num_null
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        overlaps = overlaps and bool(kernel.constants.get("OVERLAPS", False))
        self._driver.launch(
            kernel.function, grid, addresses, self._stream(), is_programmatic=overlaps
        )


def _size(kind: str) -> int:
    """Bytes of what a pointer of Triton's type points to."""
    return int(kind.lstrip("*bfpiu")) // 8
