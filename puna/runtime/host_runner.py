"""HostRunner: steps computed in this machine's memory, by the native library or by NumPy.

Decides where the arrays lie, which recorded program runs a step, and when arrays pass between
ranks. A step is computed and sampled before `start` returns. Knows no sequences and no plans.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from pathlib import Path

import numpy as np

from puna.batch import ForwardBatch
from puna.cpu.ops import CpuOps
from puna.engine import RankMemory
from puna.huge_pages import empty, map_file
from puna.layout import ArraySpec
from puna.manifest import check_files
from puna.memory import first_token_id, kv_cache_specs, workspace_specs
from puna.models.llama.model import Activations
from puna.ops import Program, Reduce
from puna.ops.sampling import SampleResult, sample
from puna.quant import Array
from puna.rank_file import rank_file_name
from puna.rope import rope_tables
from puna.runtime.device import make_ops
from puna.runtime.load import bind_model, generate_weights, layer_caches, map_weights
from puna.runtime.lower import LoweredStep
from puna.runtime.request import SamplingParams
from puna.runtime.runner import Opening, cached

# Programs kept, one for each batch shape met lately; a decode batch meets few shapes.
MAX_PROGRAMS = 64


class HostRunner:
    """The `Runner` of the devices cpu and reference, alone or as one of several ranks."""

    def __init__(self, opening: Opening, stored: dict[str, Array]) -> None:
        config, rank, chosen = opening.config, opening.rank, opening.chosen
        self.config = config
        self.mapping = config.mapping(rank)
        self._comm = opening.comm
        self._arrays = _allocate(workspace_specs(config, rank, chosen.device))
        self._ops = make_ops(chosen, opening.threads, self._arrays, self._reduce)
        self.threads = self._ops.threads
        self.device_name: str = chosen.device
        if isinstance(self._ops, CpuOps):
            self.device_name += f":{self._ops.instruction_set}"
        self._kv = _allocate(kv_cache_specs(config, rank, opening.num_blocks))
        self._weight_bytes = opening.layout.num_bytes
        rope = rope_tables(config.spec.rope, config.spec.head_dim, config.limits.max_seq_len)
        self._arrays["rope_cos_PE"][:], self._arrays["rope_sin_PE"][:] = rope
        caches = layer_caches(self._kv)
        self._model = bind_model(
            config, rank, self._ops, stored, self._arrays, caches, opening.report
        )
        self._programs: OrderedDict[tuple[int, int], tuple[ForwardBatch, Program]] = OrderedDict()
        self._heads: OrderedDict[tuple[int, int], tuple[Array, Program]] = OrderedDict()
        # Token ids count from the rank's first row of the embedding.
        self._first_token_id = first_token_id(config, rank)
        self._computed: dict[int, tuple[SampleResult, Array]] = {}  # by lane, to be collected

    @property
    def memory(self) -> RankMemory:
        return RankMemory(
            weights=self._weight_bytes,
            kv_cache=sum(array.nbytes for array in self._kv.values()),
            workspace=sum(array.nbytes for array in self._arrays.values()),
        )

    def can_run_ahead(self, params: SamplingParams) -> bool:
        """Never: what computes a step is what would plan the next one meanwhile."""
        return False

    def start(self, step: LoweredStep, lane: int) -> None:
        if len(step.copies_C2):
            self._ops.copy_blocks(tuple(self._kv.values()), step.copies_C2)
        num_tokens = step.batch.num_tokens
        if self._comm is not None and not self.mapping.is_first_stage:
            self._comm.receive_from_stage_before(self._stream(num_tokens))
        self._forward(step.batch)
        if not self.mapping.is_last_stage:
            self._send_stream(num_tokens, lane)
            return
        assert lane not in self._computed, "finish the step before"
        logits_LV = self._logits(step.batch.logits_rows_L, num_tokens)
        sampled = sample(step.sample_logits(logits_LV), step.sampling)
        if step.prompt_rows:
            # The next step's logits, of another lane perhaps, may lie in the same memory.
            logits_LV = logits_LV.copy()
        self._computed[lane] = sampled, logits_LV

    def finish(self, step: LoweredStep, lane: int) -> tuple[SampleResult, Array]:
        return self._computed.pop(lane)

    def discard(self, lane: int) -> None:
        self._computed.pop(lane, None)

    def close(self) -> None:
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
        inputs, program = cached(self._programs, shape, lambda: self._record(*shape), MAX_PROGRAMS)
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
        inputs, program = cached(
            self._heads, shape, lambda: self._record_head(*shape), MAX_PROGRAMS
        )
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


def open_host_runner(opening: Opening) -> HostRunner:
    """Bring the weights into memory, generated or mapped and checked, and bind the model to them.

    Raises EngineError for a byte that differs from the manifest.
    """
    config, rank, layout, report = opening.config, opening.rank, opening.layout, opening.report
    if config.dummy is not None:
        return HostRunner(opening, generate_weights(config, rank, layout, report))
    path = opening.engine_dir / rank_file_name(rank)
    maps = _try_map(path)
    check_files(opening.engine_dir, opening.manifest, (rank,), opening.num_readers, report, maps)
    return HostRunner(opening, map_weights(path, maps.get(path.name) or map_file(path), layout))


def _try_map(path: Path) -> dict[str, mmap.mmap]:
    """The map of a rank's file by name; none where it cannot be, and the check will say why."""
    try:
        return {path.name: map_file(path)}
    except (OSError, ValueError):
        return {}


def _allocate(specs: dict[str, ArraySpec]) -> dict[str, Array]:
    return {name: empty(shape, dtype) for name, (dtype, shape) in specs.items()}
