"""Session: one rank of an engine in memory, ready to run steps.

Decides how an engine is opened (everything is checked before the first token), and keeps the
mirror of its sequences from which steps are lowered. What computes them is a `Runner`, of the
device that was chosen. Knows nothing of requests, text or other ranks' memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from puna.engine import EngineConfig, RankMemory, read_config
from puna.errors import EngineError, LaunchError
from puna.manifest import check_files, read_manifest
from puna.mapping import Mapping
from puna.memory import num_lanes
from puna.rank_file import rank_file
from puna.runtime.comm import Comm
from puna.runtime.device import choose_device
from puna.runtime.host_runner import open_host_runner
from puna.runtime.limits import check_ram, lower_limits, num_kv_blocks
from puna.runtime.lower import LoweredStep, Lowering
from puna.runtime.request import SamplingParams
from puna.runtime.runner import Opening, Runner
from puna.runtime.step import StepPlan, StepResult

LoadProgress = Callable[[int, int], None]


class Session:
    """One rank of an engine. `submit` runs a step, `collect` returns its result.

    Made by `Session.open`. Steps must be run from one thread at a time. Of several ranks each runs
    every step, and those of the last pipeline stage have its result; the others are told the tokens
    (`take`). Each lane has its own sequences, and its steps are collected in the order in which
    they were submitted: one at a time, or two where `can_run_ahead` holds for all sequences.
    """

    def __init__(self, opening: Opening, runner: Runner) -> None:
        config = opening.config
        self.engine_dir = opening.engine_dir
        self.config = config
        self.mapping = config.mapping(opening.rank)
        self.num_lanes = num_lanes(config)
        self.num_blocks = opening.num_blocks
        self.block_size = config.limits.block_size
        self.device = opening.chosen.device
        self.notice = opening.chosen.notice
        self.threads = runner.threads
        self.device_name = runner.device_name
        self._runner = runner
        limits = config.limits
        self._lowerings = [
            Lowering(limits.block_size, limits.max_batch_size, limits.max_seq_len)
            for _ in range(self.num_lanes)
        ]
        # By lane: started, and its tokens not known here yet; oldest first.
        self._steps: list[deque[LoweredStep]] = [deque() for _ in range(self.num_lanes)]

    @classmethod
    def open(
        cls,
        engine_dir: str | Path,
        *,
        device: str = "auto",
        kv_cache_bytes: int | None = None,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        threads: int | None = None,
        comm: Comm | None = None,
        deterministic: bool = False,
        progress: LoadProgress | None = None,
    ) -> Session:
        """Check an engine and bring one rank of it into memory.

        `device` is auto, reference, cpu, cpu with an instruction set ("cpu:avx2"), cuda, or one of
        several GPUs ("cuda:1"). `max_batch_size` and `max_num_tokens` may lower the engine's
        limits; `threads` limits those that compute (None: physical cores) and those that check
        digests. `comm` joins the ranks of an engine of several, each of which opens a session like
        this one. `deterministic` keeps a sequence's tokens independent of its company on a GPU too,
        which costs speed; on other devices they always are. `progress` is told the bytes brought in
        (checked or generated, then bound to the model) and their total. Raises EngineError or
        LaunchError before anything large is allocated; a byte that differs from the manifest is
        found before this returns.
        """
        engine_dir = Path(engine_dir)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}; it must be at least 1")
        num_readers = threads or os.cpu_count() or 1
        config = read_config(engine_dir)
        mapping = Mapping() if comm is None else comm.mapping
        rank = mapping.rank
        check_world_size(config, mapping.world_size)
        manifest = read_manifest(engine_dir)
        # The small files first: what the config says is believed only if it is what was written.
        check_files(engine_dir, manifest, (), num_readers)
        digest = config.digest()
        chosen = choose_device(device, config)
        config = lower_limits(config, max_batch_size, max_num_tokens)
        num_blocks = num_kv_blocks(config, kv_cache_bytes)
        layout = rank_file(config, rank, digest)
        opening = Opening(
            engine_dir=engine_dir,
            manifest=manifest,
            config=config,
            rank=rank,
            layout=layout,
            chosen=chosen,
            num_blocks=num_blocks,
            threads=threads,
            num_readers=num_readers,
            report=_meter(layout.num_bytes, progress),
            comm=comm,
            deterministic=deterministic,
        )
        return cls(opening, _open_runner(opening))

    @property
    def memory(self) -> RankMemory:
        """Bytes this session holds, counted from its arrays."""
        return self._runner.memory

    def can_run_ahead(self, params: SamplingParams) -> bool:
        """Whether a step of sequences that are sampled so may be submitted while the lane's step
        before it was not collected."""
        return self._runner.can_run_ahead(params)

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        """Start one step; on the last stage its result waits for `collect`."""
        steps = self._steps[lane]
        if plan.reset:
            # Of steps that were broken off before they were collected.
            steps.clear()
            self._runner.discard(lane)
        step = self._lowerings[lane].lower(plan)
        self._runner.start(step, lane)
        steps.append(step)

    def collect(self, lane: int = 0) -> StepResult:
        """The result of the lane's oldest step, which was submitted before. Last stage only."""
        step = self._steps[lane][0]
        sampled, logits_LV = self._runner.finish(step, lane)
        self._steps[lane].popleft()
        return self._lowerings[lane].record(step, sampled, logits_LV)

    def take(self, token_ids: tuple[int, ...], lane: int = 0) -> None:
        """Learn what the last stage sampled in the lane's step. Not on the last stage."""
        self._lowerings[lane].take(self._steps[lane].popleft(), token_ids)

    def close(self) -> None:
        """Let go of all memory; the session cannot be used afterwards."""
        self._runner.close()


def check_world_size(config: EngineConfig, world_size: int) -> None:
    """LaunchError unless as many ranks run as the engine was built for."""
    if config.world_size != world_size:
        raise LaunchError(
            f"Engine world size ({config.world_size}) != Runtime world size ({world_size}): start "
            f"{config.world_size} ranks (puna launch -n {config.world_size} -- run ..., or "
            f"mpirun), or build the engine with --tp and --pp for {world_size}"
        )


def _open_runner(opening: Opening) -> Runner:
    if opening.chosen.device == "cuda":
        # Here, since only this device needs torch.
        from puna.runtime.cuda_runner import open_cuda_runner

        return open_cuda_runner(opening)
    check_ram(opening.config, opening.rank, opening.chosen.device, opening.num_blocks)
    return open_host_runner(opening)


def _meter(num_bytes: int, progress: LoadProgress | None) -> Callable[[int], None]:
    """A function that adds up bytes, from any thread; every byte is met twice, when checked and
    when bound."""
    done, lock = 0, Lock()

    def report(more: int) -> None:
        nonlocal done
        with lock:
            done = min(done + more, 2 * num_bytes)
            if progress:
                progress(done, 2 * num_bytes)

    return report
