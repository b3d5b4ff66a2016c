"""auto_target: what an engine is built for where nothing was asked: the GPU that is here, or CPUs.

A GPU is never passed over in silence: where one is here and cannot be used, the build stops and
says what mends it. Knows what was found (`puna.nvidia`), not how it was found.
"""

from __future__ import annotations

from puna.errors import ConfigError
from puna.nvidia import Driver, Packages, find_driver, find_packages
from puna.targets import TARGETS, target_of

# Launches with attributes (programmatic dependent launch) came with CUDA 12.
MIN_CUDA = (12, 0)
INSTALL = 'pip install "puna[cuda]"'
_OR_CPU = "or build for the CPU with --target cpu"


def auto_target() -> tuple[str, str]:
    """Target for this machine, and why. Raises ConfigError where its GPU cannot be used yet."""
    driver = find_driver()
    return choose_target(driver, find_packages() if driver else Packages((), None))


def choose_target(driver: Driver | None, packages: Packages) -> tuple[str, str]:
    """The same for what was found."""
    if driver is None:
        return "cpu", "there is no NVIDIA driver"
    if driver.problem:
        raise ConfigError(
            f"the NVIDIA driver does not start: {driver.problem}: mend it (nvidia-smi says more), "
            f"{_OR_CPU}"
        )
    if not driver.gpus:
        return "cpu", "the NVIDIA driver finds no GPU"
    gpu = driver.gpus[0]
    target = target_of(gpu.capability)
    if target is None:
        gpus = ", ".join(name for name, known in TARGETS.items() if known.is_gpu)
        raise ConfigError(
            f"{gpu} is none of those that GPU engines are for ({gpus}): {_OR_CPU[3:]}"
        )
    if driver.cuda < MIN_CUDA:
        raise ConfigError(
            f"{gpu} has a driver for CUDA {_dotted(driver.cuda)}, needed is "
            f"{_dotted(MIN_CUDA)} or newer: update the NVIDIA driver, {_OR_CPU}"
        )
    if packages.missing:
        raise ConfigError(
            f"{gpu} needs {', '.join(packages.missing)}, not installed: {INSTALL}, {_OR_CPU}"
        )
    if packages.torch_cuda is None:
        raise ConfigError(
            f"{gpu} needs a torch with CUDA, the installed one has none: "
            f"pip install --force-reinstall torch, {_OR_CPU}"
        )
    if packages.torch_cuda[0] > driver.cuda[0]:
        raise ConfigError(
            f"torch was built for CUDA {_dotted(packages.torch_cuda)}, the NVIDIA driver runs "
            f"{_dotted(driver.cuda)}: update the driver, install a torch for CUDA "
            f"{driver.cuda[0]} (https://pytorch.org/get-started), {_OR_CPU}"
        )
    return target.name, str(gpu)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
