"""auto_target: what an engine is built for where nothing was asked: the GPU that is here, or CPUs.

A GPU is never passed over in silence: where one is here and cannot be used, the build stops and
says what mends it. Knows what was found (`puna.nvidia`), not how it was found.
"""

from __future__ import annotations

from puna.errors import ConfigError
from puna.nvidia import Driver, Packages, find_driver, find_packages, why_not
from puna.targets import TARGETS, target_of

_OR_CPU = "or build for the CPU with --target cpu"


def auto_target() -> tuple[str, str]:
    """Target for this machine, and why. Raises ConfigError where its GPU cannot be used yet."""
    driver = find_driver()
    return choose_target(driver, find_packages() if driver else Packages((), None))


def choose_target(driver: Driver | None, packages: Packages) -> tuple[str, str]:
    """The same for what was found."""
    if driver is None:
        return "cpu", "there is no NVIDIA driver"
    if not driver.gpus and not driver.problem:
        return "cpu", "the NVIDIA driver finds no GPU"
    target = target_of(driver.gpus[0].capability) if driver.gpus else None
    if target is None and not driver.problem:
        gpus = ", ".join(name for name, known in TARGETS.items() if known.is_gpu)
        raise ConfigError(
            f"{driver.gpus[0]} is none of those that engines are built for ({gpus}): build for the "
            "CPU with --target cpu"
        )
    if reason := why_not(driver, packages):
        raise ConfigError(f"{reason}, {_OR_CPU}")
    assert target is not None
    return target.name, str(driver.gpus[0])
