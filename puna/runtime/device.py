"""Device: what computes an engine's steps, and on which instruction set or which GPU.

Decides what `--device` means on this machine and what to say where the fast backend, or the GPU
that an engine was built for, is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.cpu.ops import CpuOps, instruction_sets
from puna.engine import EngineConfig
from puna.errors import EngineError
from puna.layout import LayoutName
from puna.memory import Device
from puna.native.library import find_library, why_missing
from puna.ops import Reduce
from puna.ops.reference import ReferenceOps
from puna.quant import Array
from puna.runtime.gpu import find_gpu
from puna.targets import TARGETS

DEVICES = ("auto", "cpu", "cuda", "reference")


@dataclass(frozen=True)
class Choice:
    """What runs the engine; `notice` tells the user, in a line, of something slower than usual."""

    device: Device
    instruction_set: str | None = None  # None: the best
    notice: str = ""
    layout: LayoutName = "tiles"  # how the engine's matrices are stored
    gpu: int = 0  # its number, as the driver counts those that this process sees


def choose_device(device: str, config: EngineConfig) -> Choice:
    """`device` is auto, reference, cpu, cpu with an instruction set ("cpu:avx2"), cuda, or cuda
    with the number of a GPU ("cuda:1")."""
    target = TARGETS.get(config.target)
    if target is None:
        raise EngineError(
            f"the engine was built for {config.target}, this version of puna runs engines for "
            f"{', '.join(TARGETS)}: build it again with one of these as --target"
        )
    name, colon, which = device.partition(":")
    if name not in DEVICES or (colon and (name not in ("cpu", "cuda") or not which)):
        raise EngineError(
            f"device {device!r} is not in this version of puna: use one of {', '.join(DEVICES)}"
        )
    if name == "reference":
        return Choice("reference", layout=target.layout)
    if name == "cpu" and target.is_gpu:
        raise EngineError(
            f"the engine was built for {target.name}, which device cpu does not run: use "
            "--device reference (slow), or build it again with --target cpu"
        )
    if name == "cuda" or target.is_gpu:
        return _choose_gpu(which, config)
    return _choose_cpu(name, which)


def _choose_cpu(name: str, instruction_set: str) -> Choice:
    library = find_library()
    if library is not None:
        usable = instruction_sets(library)
        if instruction_set and instruction_set not in usable:
            raise EngineError(
                f"{name}:{instruction_set}: this machine does not run {instruction_set!r}: use one "
                f"of {', '.join(usable)}, or cpu alone for the best"
            )
        return Choice("cpu", instruction_set or None)
    if name == "cpu":
        raise EngineError(f"{why_missing()} (or use --device reference, which is slow)")
    return Choice("reference", notice=f"running on NumPy, which is slow: {why_missing()}")


def _choose_gpu(which: str, config: EngineConfig) -> Choice:
    """The GPU with the number `which`, or the first."""
    if which and not which.isdecimal():
        raise EngineError(f"device cuda:{which} has no number of a GPU: use cuda, or cuda:0")
    return Choice("cuda", gpu=find_gpu(config, int(which or 0)).index)


def make_ops(
    chosen: Choice, threads: int | None, arrays: dict[str, Array], reduce: Reduce | None
) -> CpuOps | ReferenceOps:
    """The chosen backend over a session's workspace; `reduce` sums over ranks, where there are
    several."""
    if chosen.device == "reference":
        return ReferenceOps(threads, reduce, chosen.layout)
    library = find_library()
    assert library is not None, "chosen without a library"
    return CpuOps(library, arrays, threads, chosen.instruction_set, reduce)
