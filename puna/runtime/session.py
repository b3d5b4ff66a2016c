"""Session: one rank of an engine in memory, ready to run steps.

Decides how an engine is opened (everything is checked before the first token), where its arrays
lie, and which recorded program runs a step. Knows nothing of requests, text or other ranks' memory.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from puna.batch import ForwardBatch
from puna.cpu.ops import CpuOps, instruction_sets
from puna.engine import EngineConfig, RankMemory, read_config
from puna.errors import EngineError, LaunchError
from puna.huge_pages import empty, map_file
from puna.layout import ArraySpec
from puna.manifest import check_files, read_manifest
from puna.memory import (
    Device,
    available_bytes,
    human_bytes,
    kv_block_bytes,
    kv_cache_specs,
    rank_memory,
    workspace_specs,
)
from puna.models.llama.model import Activations
from puna.native.library import find_library, why_missing
from puna.ops import Program
from puna.ops.reference import ReferenceOps
from puna.ops.sampling import sample
from puna.quant import Array
from puna.rank_file import (
    rank_file,
    rank_file_name,
)
from puna.runtime.load import bind_model, generate_weights, map_weights
from puna.runtime.lower import Lowering
from puna.runtime.step import StepPlan, StepResult

DEVICES = ("auto", "cpu", "reference")
# Programs kept, one for each batch shape met lately; a decode batch meets few shapes.
MAX_PROGRAMS = 64

LoadProgress = Callable[[int, int], None]
Key = TypeVar("Key")
Value = TypeVar("Value")


class Session:
    """One rank of an engine. `submit` runs a step, `collect` returns its result.

    Made by `Session.open`. Steps must be run from one thread at a time.
    """

    def __init__(
        self,
        engine_dir: Path,
        config: EngineConfig,
        rank: int,
        chosen: _Choice,
        num_blocks: int,
        stored: dict[str, Array],
        stored_bytes: int,
        threads: int | None,
        report: Callable[[int], None],
    ) -> None:
        self.engine_dir = engine_dir
        self.config = config
        self.num_blocks = num_blocks
        self.block_size = config.limits.block_size
        self.device = chosen.device
        self.notice = chosen.notice
        self._arrays = _allocate(workspace_specs(config, rank, chosen.device))
        self._ops = _make_ops(chosen, threads, self._arrays)
        self.threads = self._ops.threads
        self.device_name: str = chosen.device  # as --device takes it
        if isinstance(self._ops, CpuOps):
            self.device_name += f":{self._ops.instruction_set}"
        self._kv = _allocate(kv_cache_specs(config, rank, num_blocks))
        self._weight_bytes = stored_bytes
        self._model = bind_model(config, rank, self._ops, stored, self._arrays, self._kv, report)
        self._programs: OrderedDict[tuple[int, int], tuple[ForwardBatch, Program]] = OrderedDict()
        self._heads: OrderedDict[tuple[int, int], tuple[Array, Program]] = OrderedDict()
        limits = config.limits
        self._lowering = Lowering(limits.block_size, limits.max_batch_size, limits.max_seq_len)
        self._result: StepResult | None = None

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
        rank: int = 0,
        world_size: int = 1,
        progress: LoadProgress | None = None,
    ) -> Session:
        """Check an engine and bring one rank of it into memory.

        `device` is auto, reference, cpu, or cpu with an instruction set ("cpu:avx2").
        `max_batch_size` and `max_num_tokens` may lower the engine's limits; `threads` limits those
        that compute (None: physical cores) and those that check digests. `progress` is told the
        bytes brought in (checked or generated, then bound to the model) and their total. Raises
        EngineError or LaunchError before anything large is allocated; a byte that differs from the
        manifest is found before this returns.
        """
        engine_dir = Path(engine_dir)
        if threads is not None and threads < 1:
            raise EngineError(f"threads is {threads}; it must be at least 1")
        num_readers = threads or os.cpu_count() or 1
        config = read_config(engine_dir)
        manifest = read_manifest(engine_dir)
        # The small files first: what the config says is believed only if it is what was written.
        check_files(engine_dir, manifest, (), num_readers)
        digest = config.digest()
        chosen = _choose_device(device, config)
        if config.world_size != world_size:
            raise LaunchError(
                f"Engine world size ({config.world_size}) != Runtime world size ({world_size}): "
                f"start {config.world_size} ranks, or build the engine with --tp and --pp for "
                f"{world_size}"
            )
        if not 0 <= rank < world_size:
            raise LaunchError(f"rank {rank} is not between 0 and {world_size - 1}: start it as one")
        config = _lower_limits(config, max_batch_size, max_num_tokens)
        num_blocks = _num_blocks(config, rank, kv_cache_bytes)
        _check_ram(config, rank, chosen.device, num_blocks)
        layout = rank_file(config, rank, digest)
        report = _meter(layout.num_bytes, progress)
        if config.dummy is not None:
            stored = generate_weights(config, rank, layout, report)
        else:
            path = engine_dir / rank_file_name(rank)
            maps = _try_map(path)
            check_files(engine_dir, manifest, (rank,), num_readers, report, maps)
            stored = map_weights(path, maps.get(path.name) or map_file(path), layout)
        return cls(
            engine_dir,
            config,
            rank,
            chosen,
            num_blocks,
            stored,
            layout.num_bytes,
            threads,
            report,
        )

    @property
    def memory(self) -> RankMemory:
        """Bytes this session holds, counted from its arrays."""
        return RankMemory(
            weights=self._weight_bytes,
            kv_cache=sum(array.nbytes for array in self._kv.values()),
            workspace=sum(array.nbytes for array in self._arrays.values()),
        )

    def submit(self, plan: StepPlan) -> None:
        """Run one step; its result waits for `collect`."""
        if plan.reset:
            self._result = None  # of a step that was broken off before it was collected
        assert self._result is None, "collect the step before"
        step = self._lowering.lower(plan)
        if len(step.copies_C2):
            self._ops.copy_blocks(tuple(self._kv.values()), step.copies_C2)
        num_tokens = self._forward(step.batch)
        logits_LV = self._logits(step.batch.logits_rows_L, num_tokens)
        sampled = sample(step.sample_logits(logits_LV), step.sampling)
        self._result = self._lowering.record(step, sampled, logits_LV)

    def collect(self) -> StepResult:
        """The result of the step submitted last."""
        assert self._result is not None, "submit a step first"
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Let go of all memory; the session cannot be used afterwards."""
        self._programs.clear()
        self._heads.clear()
        self._arrays.clear()
        self._kv.clear()
        del self._model

    def _forward(self, batch: ForwardBatch) -> int:
        num_tokens, num_seqs = batch.num_tokens, batch.num_seqs
        shape = (num_tokens, num_seqs)
        inputs, program = _cached(self._programs, shape, lambda: self._record(*shape))
        inputs.token_ids_T[:] = batch.token_ids_T
        inputs.positions_T[:] = batch.positions_T
        inputs.slots_T[:] = batch.slots_T
        inputs.query_start_S1[:] = batch.query_start_S1
        inputs.seq_lens_S[:] = batch.seq_lens_S
        inputs.block_table_SM[:, : batch.block_table_SM.shape[1]] = batch.block_table_SM
        program.run()
        return num_tokens

    def _record(self, num_tokens: int, num_seqs: int) -> tuple[ForwardBatch, Program]:
        arrays = self._arrays
        inputs = ForwardBatch(
            token_ids_T=arrays["token_ids_T"][:num_tokens],
            positions_T=arrays["positions_T"][:num_tokens],
            slots_T=arrays["slots_T"][:num_tokens],
            query_start_S1=arrays["query_start_S1"][: num_seqs + 1],
            seq_lens_S=arrays["seq_lens_S"][:num_seqs],
            block_table_SM=arrays["block_table_SM"][:num_seqs],
            logits_rows_L=arrays["logits_rows_L"],
        )
        act = self._activations()
        return inputs, self._ops.record(lambda: self._model.forward(self._ops, inputs, act))

    def _logits(self, rows_L: Array, num_tokens: int) -> Array:
        """float32 [L, V]. More rows than sequences (a prompt's logits) are computed in parts."""
        most, vocab_size = self.config.limits.max_batch_size, self.config.spec.vocab_size
        logits_LV = self._arrays["logits_LV"]
        if len(rows_L) <= most:
            self._head(rows_L, num_tokens)
            return logits_LV[: len(rows_L), :vocab_size]
        all_LV = np.empty((len(rows_L), vocab_size), np.float32)
        for start in range(0, len(rows_L), most):
            part = rows_L[start : start + most]
            self._head(part, num_tokens)
            all_LV[start : start + most] = logits_LV[: len(part), :vocab_size]
        return all_LV

    def _head(self, rows_L: Array, num_tokens: int) -> None:
        """Compute the logits of some rows into the first rows of logits_LV."""
        if not len(rows_L):
            return
        shape = (len(rows_L), num_tokens)
        inputs, program = _cached(self._heads, shape, lambda: self._record_head(*shape))
        inputs[:] = rows_L
        program.run()

    def _record_head(self, num_rows: int, num_tokens: int) -> tuple[Array, Program]:
        rows_L = self._arrays["logits_rows_L"][:num_rows]
        logits_LV = self._arrays["logits_LV"][:num_rows]
        act = self._activations()
        return rows_L, self._ops.record(
            lambda: self._model.logits(self._ops, rows_L, num_tokens, act, logits_LV)
        )

    def _activations(self) -> Activations:
        arrays = self._arrays
        return Activations(
            arrays["residual_TD"], arrays["partial_TD"], arrays["q_TQ"], arrays["act_TF"]
        )


def _try_map(path: Path) -> dict[str, mmap.mmap]:
    """The map of a rank's file by name; none where it cannot be, and the check will say why."""
    try:
        return {path.name: map_file(path)}
    except (OSError, ValueError):
        return {}


def _meter(num_bytes: int, progress: LoadProgress | None) -> Callable[[int], None]:
    """A function that adds up bytes; every byte is met twice, when checked and when unpacked."""
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done = min(done + more, 2 * num_bytes)
        if progress:
            progress(done, 2 * num_bytes)

    return report


def _cached(cache: OrderedDict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """The entry, made if need be; the one used longest ago makes room."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > MAX_PROGRAMS:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


@dataclass(frozen=True)
class _Choice:
    """What runs the engine; `notice` tells the user, in a line, of something slower than usual."""

    device: Device
    instruction_set: str | None = None  # None: the best
    notice: str = ""


def _choose_device(device: str, config: EngineConfig) -> _Choice:
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
        return _Choice("reference")
    library = find_library()
    if library is not None:
        usable = instruction_sets(library)
        if instruction_set and instruction_set not in usable:
            raise EngineError(
                f"{device}: this machine does not run {instruction_set!r}: use one of "
                f"{', '.join(usable)}, or cpu alone for the best"
            )
        return _Choice("cpu", instruction_set or None)
    if name == "cpu":
        raise EngineError(f"{why_missing()} (or use --device reference, which is slow)")
    return _Choice("reference", notice=f"running on NumPy, which is slow: {why_missing()}")


def _make_ops(
    chosen: _Choice, threads: int | None, arrays: dict[str, Array]
) -> CpuOps | ReferenceOps:
    if chosen.device == "reference":
        return ReferenceOps(threads)
    library = find_library()
    assert library is not None, "chosen without a library"
    return CpuOps(library, arrays, threads, chosen.instruction_set)


def _allocate(specs: dict[str, ArraySpec]) -> dict[str, Array]:
    return {name: empty(shape, dtype) for name, (dtype, shape) in specs.items()}


def _lower_limits(
    config: EngineConfig, max_batch_size: int | None, max_num_tokens: int | None
) -> EngineConfig:
    limits = config.limits
    asked = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens}
    for name, value in asked.items():
        most = getattr(limits, name)
        if value is None:
            continue
        if not 1 <= value <= most:
            raise EngineError(
                f"{name} {value} is not between 1 and the engine's {most}: lower it, or build with "
                f"a larger --{name.replace('_', '-')}"
            )
    batch = max_batch_size or limits.max_batch_size
    if max_num_tokens is not None and max_batch_size is None:
        batch = min(batch, max_num_tokens)
    num_tokens = max_num_tokens or limits.max_num_tokens
    return replace(config, limits=replace(limits, max_batch_size=batch, max_num_tokens=num_tokens))


def _num_blocks(config: EngineConfig, rank: int, kv_cache_bytes: int | None) -> int:
    if kv_cache_bytes is None:
        return config.limits.num_blocks
    block = kv_block_bytes(config, rank)
    if kv_cache_bytes < 2 * block:
        raise EngineError(
            f"kv_cache_bytes {kv_cache_bytes} is too small: {config.limits.block_size} tokens take "
            f"{block} bytes, and two such blocks are the least"
        )
    return kv_cache_bytes // block


def _check_ram(config: EngineConfig, rank: int, device: Device, num_blocks: int) -> None:
    """Refuse now what would be killed later. Mapped weights can be dropped by the system, so they
    do not count; generated ones do."""
    memory = rank_memory(config, rank, device)
    kv_cache = num_blocks * kv_block_bytes(config, rank)
    needed = memory.workspace + kv_cache + (memory.weights if config.dummy else 0)
    available = available_bytes()
    if available is not None and needed > available:
        raise EngineError(
            f"the engine needs {human_bytes(needed)} of RAM ({human_bytes(kv_cache)} of it KV "
            f"cache), {human_bytes(available)} are free: lower --kv-cache-bytes, or build with a "
            "smaller --max-seq-len, --max-batch-size or --quant"
        )
