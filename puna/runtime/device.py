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
from puna.nvidia import Driver, Gpu, find_driver, find_packages
from puna.ops import Reduce
from puna.ops.reference import ReferenceOps
from puna.quant import Array
from puna.targets import TARGETS, Target, target_of

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
    if name == "cuda" and not target.is_gpu:
        raise EngineError(
            f"the engine was built for {target.name}, which device cuda does not run: leave "
            "--device out, or build it again with --target auto on a machine with a GPU"
        )
    if name == "cpu" and target.is_gpu:
        raise EngineError(
            f"the engine was built for {target.name}, which device cpu does not run: use "
            "--device reference (slow), or build it again with --target cpu"
        )
    if target.is_gpu:
        return _choose_gpu(device, which or "0", target)
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


def _choose_gpu(device: str, which: str, target: Target) -> Choice:
    """A GPU that runs what was built for `target`; EngineError says what is in the way."""
    driver = find_driver()
    gpus = () if driver is None else driver.gpus
    if driver is None or driver.problem or not gpus:
        found = "no NVIDIA driver is here"
        if driver is not None:
            found = driver.problem or "the NVIDIA driver finds no GPU"
        raise EngineError(
            f"the engine was built for {target.name} and {found}: run it where such a GPU is, use "
            "--device reference (slow), or build it again with --target cpu"
        )
    if not which.isdecimal() or int(which) >= len(gpus):
        raise EngineError(
            f"device {device!r}: the GPUs here are "
            f"{', '.join(f'cuda:{gpu.index} ({gpu.name})' for gpu in gpus)}: use one of them"
        )
    gpu = gpus[int(which)]
    _check_gpu(gpu, driver, target)
    return Choice("cuda", layout=target.layout, gpu=gpu.index)


def _check_gpu(gpu: Gpu, driver: Driver, target: Target) -> None:
    """EngineError unless the GPU runs the target's machine code, and torch runs on the GPU."""
    mine, least = target_of(gpu.capability), target.capability
    assert least is not None, f"{target.name} is no GPU"
    # Machine code runs on later GPUs of the same major number.
    if mine is None or gpu.capability[0] != least[0] or gpu.capability < least:
        again = "--target cpu" if mine is None else f"--target {mine.name}"
        raise EngineError(
            f"the engine was built for {target.name}, here is {gpu}: build it again with {again}"
        )
    packages = find_packages()
    if "torch" in packages.missing:
        raise EngineError(
            f"the engine runs on {gpu.name} with PyTorch, which is not installed: "
            'pip install "puna[cuda]"'
        )
    if packages.torch_cuda is None:
        raise EngineError(
            f"the engine runs on {gpu.name}, and the installed PyTorch was built without CUDA: "
            "pip install --force-reinstall torch"
        )
    if packages.torch_cuda[0] > driver.cuda[0]:
        raise EngineError(
            f"the installed PyTorch needs CUDA {packages.torch_cuda[0]}, the NVIDIA driver runs "
            f"{driver.cuda[0]}.{driver.cuda[1]}: update the driver, or install a PyTorch for "
            f"CUDA {driver.cuda[0]} (https://pytorch.org/get-started)"
        )


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
