"""Session: one rank of an engine in memory, ready to run steps.

Decides how an engine is opened (everything is checked before the first token), where its arrays
lie, and which recorded program runs a step. Knows nothing of requests, text or other ranks' memory.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from puna.batch import ForwardBatch
from puna.cpu.ops import CpuOps
from puna.engine import EngineConfig, RankMemory, read_config
from puna.errors import EngineError, LaunchError
from puna.huge_pages import empty, map_file
from puna.layout import ArraySpec
from puna.manifest import check_files, read_manifest
from puna.mapping import Mapping
from puna.memory import first_token_id, kv_cache_specs, num_lanes, workspace_specs
from puna.models.llama.model import Activations
from puna.ops import Program, Reduce
from puna.ops.sampling import sample
from puna.quant import Array
from puna.rank_file import (
    rank_file,
    rank_file_name,
)
from puna.runtime.comm import Comm
from puna.runtime.device import Choice, choose_device, make_ops
from puna.runtime.limits import check_ram, lower_limits, num_kv_blocks
from puna.runtime.load import bind_model, generate_weights, map_weights
from puna.runtime.lower import LoweredStep, Lowering
from puna.runtime.step import StepPlan, StepResult

# Programs kept, one for each batch shape met lately; a decode batch meets few shapes.
MAX_PROGRAMS = 64

LoadProgress = Callable[[int, int], None]
Key = TypeVar("Key")
Value = TypeVar("Value")


class Session:
    """One rank of an engine. `submit` runs a step, `collect` returns its result.

    Made by `Session.open`. Steps must be run from one thread at a time. Of several ranks each runs
    every step, and those of the last pipeline stage have its result; the others are told the tokens
    (`take`). Each lane has its own sequences, and at most one step that was not collected.
    """

    def __init__(
        self,
        engine_dir: Path,
        config: EngineConfig,
        rank: int,
        chosen: Choice,
        num_blocks: int,
        stored: dict[str, Array],
        stored_bytes: int,
        threads: int | None,
        report: Callable[[int], None],
        comm: Comm | None,
    ) -> None:
        self.engine_dir = engine_dir
        self.config = config
        self.mapping = config.mapping(rank)
        self.num_lanes = num_lanes(config)
        self.num_blocks = num_blocks
        self.block_size = config.limits.block_size
        self.device = chosen.device
        self.notice = chosen.notice
        self._comm = comm
        self._arrays = _allocate(workspace_specs(config, rank, chosen.device))
        self._ops = make_ops(chosen, threads, self._arrays, self._reduce)
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
        # Token ids count from the rank's first row of the embedding.
        self._first_token_id = first_token_id(config, rank)
        self._lowerings = [
            Lowering(limits.block_size, limits.max_batch_size, limits.max_seq_len)
            for _ in range(self.num_lanes)
        ]
        self._steps: dict[int, LoweredStep] = {}  # by lane: run, and its tokens not known here yet
        self._results: dict[int, StepResult] = {}  # by lane

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
        progress: LoadProgress | None = None,
    ) -> Session:
        """Check an engine and bring one rank of it into memory.

        `device` is auto, reference, cpu, or cpu with an instruction set ("cpu:avx2").
        `max_batch_size` and `max_num_tokens` may lower the engine's limits; `threads` limits those
        that compute (None: physical cores) and those that check digests. `comm` joins the ranks of
        an engine of several, each of which opens a session like this one. `progress` is told the
        bytes brought in (checked or generated, then bound to the model) and their total. Raises
        EngineError or LaunchError before anything large is allocated; a byte that differs from the
        manifest is found before this returns.
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
        check_ram(config, rank, chosen.device, num_blocks)
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
            comm,
        )

    @property
    def memory(self) -> RankMemory:
        """Bytes this session holds, counted from its arrays."""
        return RankMemory(
            weights=self._weight_bytes,
            kv_cache=sum(array.nbytes for array in self._kv.values()),
            workspace=sum(array.nbytes for array in self._arrays.values()),
        )

    def submit(self, plan: StepPlan, lane: int = 0) -> None:
        """Run one step; on the last stage its result waits for `collect`."""
        if plan.reset:
            # Of a step that was broken off before it was collected.
            self._results.pop(lane, None)
        assert lane not in self._results and lane not in self._steps, "collect the step before"
        step = self._lowerings[lane].lower(plan)
        if len(step.copies_C2):
            self._ops.copy_blocks(tuple(self._kv.values()), step.copies_C2)
        num_tokens = step.batch.num_tokens
        if self._comm is not None and not self.mapping.is_first_stage:
            self._comm.receive_from_stage_before(self._stream(num_tokens))
        self._forward(step.batch)
        if not self.mapping.is_last_stage:
            self._send_stream(num_tokens, lane)
            self._steps[lane] = step
            return
        logits_LV = self._logits(step.batch.logits_rows_L, num_tokens)
        sampled = sample(step.sample_logits(logits_LV), step.sampling)
        self._results[lane] = self._lowerings[lane].record(step, sampled, logits_LV)

    def collect(self, lane: int = 0) -> StepResult:
        """The result of the lane's step, which was submitted before. Last stage only."""
        assert lane in self._results, "submit a step first"
        return self._results.pop(lane)

    def take(self, token_ids: tuple[int, ...], lane: int = 0) -> None:
        """Learn what the last stage sampled in the lane's step. Not on the last stage."""
        self._lowerings[lane].take(self._steps.pop(lane), token_ids)

    def close(self) -> None:
        """Let go of all memory; the session cannot be used afterwards."""
        self._programs.clear()
        self._heads.clear()
        if self._comm is not None:
            self._comm.close()
        self._arrays.clear()
        self._kv.clear()
        del self._model

    @property
    def _reduce(self) -> Reduce | None:
        """How operations sum over tensor-parallel ranks."""
        if self._comm is None or self.mapping.tp_size == 1:
            return None
        comm, gathered = self._comm, self._arrays["gathered"]
        return lambda partial_TD: comm.sum_call(partial_TD, gathered)

    def _stream(self, num_tokens: int) -> tuple[Array, Array]:
        arrays = self._arrays
        return arrays["residual_TD"][:num_tokens], arrays["partial_TD"][:num_tokens]

    def _send_stream(self, num_tokens: int, lane: int) -> None:
        """Hand the stream to the next stage; a copy, so that the next step may begin."""
        assert self._comm is not None
        self._comm.wait_sent(lane)
        names = ("sent_residual_TD", "sent_partial_TD")
        sent = tuple(self._arrays[name][lane, :num_tokens] for name in names)
        for copy_TD, array_TD in zip(sent, self._stream(num_tokens), strict=True):
            copy_TD[:] = array_TD
        self._comm.send_to_next_stage(sent, lane)

    def _forward(self, batch: ForwardBatch) -> None:
        shape = (batch.num_tokens, batch.num_seqs)
        inputs, program = _cached(self._programs, shape, lambda: self._record(*shape))
        np.subtract(batch.token_ids_T, self._first_token_id, out=inputs.token_ids_T)
        inputs.positions_T[:] = batch.positions_T
        inputs.slots_T[:] = batch.slots_T
        inputs.query_start_S1[:] = batch.query_start_S1
        inputs.seq_lens_S[:] = batch.seq_lens_S
        inputs.block_table_SM[:, : batch.block_table_SM.shape[1]] = batch.block_table_SM
        program.run()

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
        """float32 [L, V] of the whole vocabulary. More rows than sequences (a prompt's logits) are
        computed in parts."""
        most, vocab_size = self.config.limits.max_batch_size, self.config.spec.vocab_size
        if len(rows_L) <= most:
            return self._head(rows_L, num_tokens)[:, :vocab_size]
        all_LV = np.empty((len(rows_L), vocab_size), np.float32)
        for start in range(0, len(rows_L), most):
            part = rows_L[start : start + most]
            all_LV[start : start + most] = self._head(part, num_tokens)[:, :vocab_size]
        return all_LV

    def _head(self, rows_L: Array, num_tokens: int) -> Array:
        """Logits of some rows, in an array that the next call writes to."""
        arrays, num_rows = self._arrays, len(rows_L)
        logits_LV = arrays["logits_LV"][:num_rows]
        if self._comm is None or self.mapping.tp_size == 1:
            if num_rows:
                self._run_head(rows_L, num_tokens)
            return logits_LV
        joined_LV = arrays["joined_logits_LV"][:num_rows]
        if num_rows:
            # The rows are copied, since the head sums them in place.
            for name in ("residual", "partial"):
                np.take(
                    arrays[f"{name}_TD"], rows_L, axis=0, out=arrays[f"head_{name}_LD"][:num_rows]
                )
            self._run_head(np.arange(num_rows, dtype=np.int32), num_rows)
            self._comm.join_columns(logits_LV, arrays["gathered"], joined_LV)
        return joined_LV

    def _run_head(self, rows_L: Array, num_tokens: int) -> None:
        """Compute the logits of some rows into the first rows of logits_LV."""
        shape = (len(rows_L), num_tokens)
        inputs, program = _cached(self._heads, shape, lambda: self._record_head(*shape))
        inputs[:] = rows_L
        program.run()

    def _record_head(self, num_rows: int, num_tokens: int) -> tuple[Array, Program]:
        rows_L = self._arrays["logits_rows_L"][:num_rows]
        logits_LV = self._arrays["logits_LV"][:num_rows]
        act = self._activations("head_" if "head_partial_LD" in self._arrays else "")
        return rows_L, self._ops.record(
            lambda: self._model.logits(self._ops, rows_L, num_tokens, act, logits_LV)
        )

    def _activations(self, stream: str = "") -> Activations:
        arrays, rows = self._arrays, "LD" if stream else "TD"
        return Activations(
            arrays[f"{stream}residual_{rows}"],
            arrays[f"{stream}partial_{rows}"],
            arrays["q_TQ"],
            arrays["act_TF"],
        )


def check_world_size(config: EngineConfig, world_size: int) -> None:
    """LaunchError unless as many ranks run as the engine was built for."""
    if config.world_size != world_size:
        raise LaunchError(
            f"Engine world size ({config.world_size}) != Runtime world size ({world_size}): start "
            f"{config.world_size} ranks (puna launch -n {config.world_size} -- run ..., or "
            f"mpirun), or build the engine with --tp and --pp for {world_size}"
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


def _allocate(specs: dict[str, ArraySpec]) -> dict[str, Array]:
    return {name: empty(shape, dtype) for name, (dtype, shape) in specs.items()}
