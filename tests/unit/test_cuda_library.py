"""How launches are made: what a driver is handed for an engine's kernels, without one."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.cuda.driver import Driver, Function
from puna.cuda.kernel_table import KERNELS_FILE
from puna.cuda.library import Library, read_kernels
from puna.errors import EngineError


class FakeDriver:
    """Keeps what it is asked for; reads a launch's parameters as the driver would."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched: list[tuple[Function, Any, int, list[int], bool]] = []
        self.kinds: list[Any] = []
        self.most_shared = 0

    def load(self, cubin: bytes, what: str) -> int:
        self.loaded.append(what)
        return len(self.loaded)

    def function(
        self, module: int, entry: str, num_threads: int, shared_bytes: int, most_shared: int
    ) -> Function:
        self.most_shared = most_shared
        return Function(module, num_threads, shared_bytes)

    def launch(
        self, function: Function, grid: Any, arguments: Any, stream: int, *, is_programmatic: bool
    ) -> None:
        values = [
            ctypes.cast(address, ctypes.POINTER(kind)).contents.value
            for address, kind in zip(arguments, self.kinds, strict=True)
        ]
        self.launched.append((function, grid, stream, values, is_programmatic))


def files(**changes: Any) -> dict[str, bytes]:
    entry = {
        "file": "add.cubin",
        "entry": "add",
        "arguments": [["x", "*fp16"], ["n", "i32"], ["ids", "*i32"]],
        "null_arguments": 2,
        "constants": {"BLOCK": 64, "OVERLAPS": True},
        "num_warps": 4,
        "shared": 60000,
        **changes,
    }
    table = {"target": "sm_90", "compilers": {}, "kernels": {"add": entry, "twice": entry}}
    return {KERNELS_FILE: json.dumps(table).encode(), "add.cubin": b"cubin"}


def library(**changes: Any) -> tuple[Library, FakeDriver]:
    driver: Any = FakeDriver()
    driver.kinds = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    driver.kinds += [ctypes.c_void_p] * 2
    return Library(files(**changes), driver, lambda: 77), driver


def test_a_launch_hands_over_pointers_numbers_and_nulls() -> None:
    kernels, driver = library()
    assert driver.loaded == ["kernels/add.cubin"], "one module, loaded once"
    assert kernels.target == "sm_90" and kernels.constant("add", "BLOCK") == 64
    x = torch.zeros(8, dtype=torch.float16)
    ids = torch.zeros(9, dtype=torch.int32)[1:]  # a view that begins anywhere
    kernels.launch("add", (3, 2, 1), (x, -5, ids), True)
    function, grid, stream, values, is_programmatic = driver.launched[0]
    assert function == Function(1, 128, 60000) and grid == (3, 2, 1) and stream == 77
    assert values == [x.data_ptr(), -5, ids.data_ptr(), None, None]
    assert is_programmatic


def test_kernels_of_one_function_may_have_different_shared_memory() -> None:
    """What is allowed is the function's: the most of any of them, whichever is met last."""
    given = files()
    table = json.loads(given[KERNELS_FILE])
    table["kernels"]["twice"] = {**table["kernels"]["twice"], "shared": 50000}
    driver: Any = FakeDriver()
    Library({**given, KERNELS_FILE: json.dumps(table).encode()}, driver, lambda: 77)
    assert driver.most_shared == 60000


def test_scalars_of_every_kind_and_addresses() -> None:
    arguments = [["x", "*fp16"], ["scale", "fp32"], ["stride", "i64"]]
    kernels, driver = library(arguments=arguments, null_arguments=0)
    driver.kinds = [ctypes.c_void_p, ctypes.c_float, ctypes.c_int64]
    kernels.launch("add", (1, 1, 1), (4096, 0.5, 2**40), False)
    assert driver.launched[0][3] == [4096, 0.5, 2**40]


@pytest.mark.parametrize(("flag", "overlaps"), [(True, False), (False, True), (None, True)])
def test_only_kernels_that_wait_by_themselves_overlap(flag: bool | None, overlaps: bool) -> None:
    kernels, driver = library(constants={} if flag is None else {"OVERLAPS": flag})
    x, ids = torch.zeros(8, dtype=torch.float16), torch.zeros(8, dtype=torch.int32)
    kernels.launch("add", (1, 1, 1), (x, 1, ids), overlaps)
    assert driver.launched[0][-1] is False


def test_what_a_kernel_was_not_compiled_for_is_not_launched() -> None:
    kernels, driver = library()
    ids = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"add: x is torch\.float32"):
        kernels.launch("add", (1, 1, 1), (torch.zeros(8), 1, ids), True)
    with pytest.raises(AssertionError, match="x is unaligned"):
        kernels.launch("add", (1, 1, 1), (torch.zeros(9, dtype=torch.float16)[1:], 1, ids), True)
    assert not driver.launched


def test_read_kernels(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"kernels cannot be read .*: build the engine again"):
        read_kernels(tmp_path)
    (tmp_path / "kernels").mkdir()
    for name, data in files().items():
        (tmp_path / "kernels" / name).write_bytes(data)
    assert read_kernels(tmp_path) == files()


def test_without_a_driver_it_is_said() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(EngineError, match=r"no NVIDIA driver is here .*--target cpu"):
            Driver()
    else:
        pytest.skip("a driver is here")
