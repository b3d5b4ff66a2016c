"""Device: what computes an engine's steps, and on which instruction set.

Decides what `--device` means on this machine and what to say where the fast backend is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.cpu.ops import CpuOps, instruction_sets
from puna.engine import EngineConfig
from puna.errors import EngineError
from puna.memory import Device
from puna.native.library import find_library, why_missing
from puna.ops import Reduce
from puna.ops.reference import ReferenceOps
from puna.quant import Array

DEVICES = ("auto", "cpu", "reference")


@dataclass(frozen=True)
class Choice:
    """What runs the engine; `notice` tells the user, in a line, of something slower than usual."""

    device: Device
    instruction_set: str | None = None  # None: the best
    notice: str = ""


def choose_device(device: str, config: EngineConfig) -> Choice:
    """`device` is auto, reference, cpu, or cpu with an instruction set ("cpu:avx2")."""
    if config.target != "cpu":
        raise EngineError(
            f"the engine was built for {config.target}, this version of puna runs cpu engines: "
            "build it again with --target cpu"
        )
    name, colon, instruction_set = device.partition(":")
    if name not in DEVICES or (colon and (name != "cpu" or not instruction_set)):
        raise EngineError(
            f"device {device!r} is not in this version of puna: use one of {', '.join(DEVICES)}"
        )
    if name == "reference":
        return Choice("reference")
    library = find_library()
    if library is not None:
        usable = instruction_sets(library)
        if instruction_set and instruction_set not in usable:
            raise EngineError(
                f"{device}: this machine does not run {instruction_set!r}: use one of "
                f"{', '.join(usable)}, or cpu alone for the best"
            )
        return Choice("cpu", instruction_set or None)
    if name == "cpu":
        raise EngineError(f"{why_missing()} (or use --device reference, which is slow)")
    return Choice("reference", notice=f"running on NumPy, which is slow: {why_missing()}")


def make_ops(
    chosen: Choice, threads: int | None, arrays: dict[str, Array], reduce: Reduce | None
) -> CpuOps | ReferenceOps:
    """The chosen backend over a session's workspace; `reduce` sums over ranks, where there are
    several."""
    if chosen.device == "reference":
        return ReferenceOps(threads, reduce)
    library = find_library()
    assert library is not None, "chosen without a library"
    return CpuOps(library, arrays, threads, chosen.instruction_set, reduce)
