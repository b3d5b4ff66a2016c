"""gpu: the GPU that an engine runs on, or why it does not, and the command that mends it.

Decides whether an engine's target, this machine's driver, its GPUs and packages get along. Asks the
driver only (`puna.nvidia`): torch is not imported, nothing is allocated.
"""

from __future__ import annotations

import shlex

from puna.engine import EngineConfig
from puna.errors import EngineError
from puna.nvidia import RUNTIME, Driver, Gpu, Packages, find_driver, find_packages, why_not
from puna.targets import TARGETS, target_of

_OR_SLOW = "or use --device reference, which is slow"


def find_gpu(config: EngineConfig, index: int = 0) -> Gpu:
    """GPU `index` of this machine, for which the engine was built. Raises EngineError otherwise."""
    driver = find_driver()
    packages = find_packages(RUNTIME) if driver else Packages((), None)
    return choose_gpu(config, index, driver, packages)


def choose_gpu(config: EngineConfig, index: int, driver: Driver | None, packages: Packages) -> Gpu:
    """The same for what was found."""
    if not TARGETS[config.target].is_gpu:
        raise EngineError(
            f"the engine was built for {config.target}, device cuda runs engines for a GPU: use "
            f"--device cpu, or build it again: {_rebuild(config, 'sm_90')} (see puna build --help)"
        )
    if driver is None or not (driver.gpus or driver.problem):
        found = "there is no NVIDIA driver here" if driver is None else "the driver finds no GPU"
        raise EngineError(
            f"the engine was built for {config.target}, and {found}: build it for the CPU "
            f"({_rebuild(config, 'cpu')}), {_OR_SLOW}"
        )
    if driver.gpus and index >= len(driver.gpus):
        raise EngineError(
            f"device cuda:{index} is not here, GPUs count from 0 and there are "
            f"{len(driver.gpus)}: use a lower one"
        )
    if driver.gpus:
        _check_target(config, driver.gpus[index])
    if reason := why_not(driver, packages):
        raise EngineError(f"{reason}, {_OR_SLOW}")
    return driver.gpus[index]


def _check_target(config: EngineConfig, gpu: Gpu) -> None:
    target = target_of(gpu.capability)
    if target is None or target.name != config.target:
        raise EngineError(
            f"the engine was built for {config.target}, GPU {gpu.index} is {gpu}: build it again: "
            f"{_rebuild(config, 'cpu' if target is None else target.name)}"
        )


def _rebuild(config: EngineConfig, target: str) -> str:
    """The command that builds the engine again, but for options that were given then."""
    source = shlex.quote(config.provenance.source)
    checkpoint = f"--dummy {source}" if config.provenance.kind == "dummy" else source
    return f"puna build {checkpoint} -o ENGINE --target {target}"
