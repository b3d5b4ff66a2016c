"""CudaRunner: steps as CUDA graphs, one recorded for each padded shape.

Decides where a rank's arrays lie on the GPU, what is recorded when, and who samples. Tokens never
leave the GPU on their way to the next step; where rows want penalties, logprobs or candidates, the
logits come here and NumPy samples. How a step's integers get there and its tokens back is in
`puna.runtime.cuda_slots`. Knows no kernels.

Everything is computed in the order in which it is started, on torch's current stream, and nothing
waits before `finish`: a step may be started while the one before is under way.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from puna.batch import ForwardBatch
from puna.cuda.choices import Choices
from puna.cuda.draw import can_draw, draw_tokens
from puna.cuda.driver import Driver
from puna.cuda.fused_ops import fused_ops
from puna.cuda.graphs import GraphRecorder
from puna.cuda.library import Library, read_kernels
from puna.cuda.ops import CudaOps
from puna.cuda.swiglu import swiglu
from puna.engine import RankMemory
from puna.errors import EngineError
from puna.layout import ArraySpec
from puna.manifest import find_file
from puna.memory import human_bytes, kv_cache_specs, workspace_specs
from puna.models.llama.model import Activations
from puna.ops import LayerCache, Program
from puna.ops.sampling import SampleResult, sample
from puna.quant import Array
from puna.rank_file import rank_file_name
from puna.rope import rope_tables
from puna.runtime.cuda_inputs import InputPlaces, StepShape, StepShapes, most_ints
from puna.runtime.cuda_load import TORCH_DTYPES, generate_weights_on, reading, weight_views
from puna.runtime.cuda_slots import Buffers, Slot, Streams
from puna.runtime.limits import check_gpu_memory
from puna.runtime.load import bind_model
from puna.runtime.lower import LoweredStep
from puna.runtime.request import SamplingParams
from puna.runtime.runner import Opening, cached

# Graphs kept, of the shapes met lately: all decode sizes of a batch of 64, twice, and most others.
MAX_PROGRAMS = 120
# Decode sizes recorded while the engine loads; the others when they are met.
COMMON_SIZES = (1, 2, 3, 4, 6, 8)
# Steps in flight at once, each in a slot.
MAX_IN_FLIGHT = 2

# The arrays of `puna.memory` that here are parts of one buffer.
_INPUTS = ("token_ids_T", "positions_T", "slots_T", "query_start_S1", "seq_lens_S")
_INPUTS += ("block_table_SM", "logits_rows_L")
# A torch.Tensor. The model's types say Array: what it passes on are its operations' arrays.
Tensor = Any


@dataclass(frozen=True, slots=True)
class Flying:
    """A step that was started: where its result will be, and what kind of result."""

    slot: Slot
    num_sampled: int
    logits_LV: Array | None  # to be sampled here; None: the GPU has sampled


class CudaRunner:
    """The `Runner` of the device cuda, for engines of one rank.

    `make_ops` makes the operations over the workspace, whose arrays are torch tensors on `device`.
    """

    threads = 1  # of the CPU: the one that starts steps

    def __init__(
        self,
        opening: Opening,
        device: torch.device,
        make_ops: Callable[[dict[str, Tensor]], CudaOps],
    ) -> None:
        config, rank = opening.config, opening.rank
        limits = config.limits
        self.device_name = str(device)
        self._opening = opening
        self._device = device
        self._limits = limits
        self._shapes = StepShapes(limits)
        self._max_blocks = -(-limits.max_seq_len // limits.block_size)
        self._data = torch.zeros(opening.layout.num_bytes, dtype=torch.uint8, device=device)
        specs = workspace_specs(config, rank, "cuda")
        self._arrays = _allocate({k: v for k, v in specs.items() if k not in _INPUTS}, device)
        rope = rope_tables(config.spec.rope, config.spec.head_dim, limits.max_seq_len)
        for name, table_PE in zip(("rope_cos_PE", "rope_sin_PE"), rope, strict=True):
            self._arrays[name].copy_(torch.from_numpy(np.asarray(table_PE, np.float32)))
        rows = {"head_rows_L": (np.dtype(np.int32), (limits.max_batch_size,))}
        self._arrays |= _allocate(rows, device)
        self._shared, *own = (
            Buffers.make(i, most_ints(limits), limits.max_batch_size, device)
            for i in range(1 + MAX_IN_FLIGHT)
        )
        streams = Streams(device)
        self._slots = [Slot(buffers, streams) for buffers in own]
        self._kv = _allocate(kv_cache_specs(config, rank, opening.num_blocks), device)
        self._ops = make_ops(self._arrays)
        caches = [LayerCache(keys, values) for keys, values in self._kv["kv_cache"]]
        self._stored = weight_views(self._data, opening.layout)
        self._model = bind_model(
            config,
            rank,
            self._ops,
            self._stored,
            self._arrays,
            caches,
            opening.report,
        )
        # By shape, and by the buffers that they read.
        self._programs: OrderedDict[tuple[StepShape, int], tuple[InputPlaces, Program]] = (
            OrderedDict()
        )
        self._heads: OrderedDict[int, Program] = OrderedDict()
        self._flying: deque[Flying] = deque()
        self._num_started = 0
        self._nothing = np.zeros((0, 0), np.float32)  # of logits and logprobs that nobody asked for
        self._host_logits_LV: Tensor | None = None  # pinned, made when first needed

    @property
    def memory(self) -> RankMemory:
        return RankMemory(
            weights=self._data.nbytes,
            kv_cache=sum(array.nbytes for array in self._kv.values()),
            workspace=sum(array.nbytes for array in self._arrays.values())
            + sum(
                buffers.inputs.nbytes + buffers.out_tokens_L.nbytes
                for buffers in (self._shared, *(slot.buffers for slot in self._slots))
            ),
        )

    def load(self) -> None:
        """Bring in the weights, and record the common shapes meanwhile, which need none."""
        opening, layout, report = self._opening, self._opening.layout, self._opening.report
        if opening.config.dummy is not None:
            generate_weights_on(opening.config, opening.rank, self._stored, report)
            self._record_common()
            return
        file = find_file(opening.engine_dir, opening.manifest, rank_file_name(opening.rank))
        threads = opening.num_readers
        self._synchronise()  # the buffer is zeroed before other streams write to it
        with reading(opening.engine_dir, file, layout, self._data, threads, report) as wait:
            self._record_common()
            wait()

    def _record_common(self) -> None:
        for size in COMMON_SIZES:
            if size <= self._limits.max_batch_size:
                for slot in self._slots:
                    self._program(self._shapes.decode(size), slot.buffers)

    def can_run_ahead(self, params: SamplingParams) -> bool:
        """Where the GPU samples: the next step finds the token there."""
        return not params.has_penalties and params.logprobs is None and params.num_beams == 1

    def start(self, step: LoweredStep, lane: int) -> None:
        assert len(self._flying) < MAX_IN_FLIGHT, "finish the step before"
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        if len(step.copies_C2):
            self._copy_blocks(step.copies_C2)
        slot = self._slots[self._num_started % MAX_IN_FLIGHT]
        self._num_started += 1
        shape = self._shapes.of(step)
        buffers = slot.buffers if shape.is_decode else self._shared
        places, program = self._program(shape, buffers)
        slot.send(step, places, self._limits.block_size, buffers)
        program.run()
        logits_rows_L, logits_LV = step.batch.logits_rows_L, None
        if can_draw(step.sampling) and not step.prompt_rows:
            if step.sampling.temperature_L.any():
                self._draw(step, buffers)
            slot.fetch_tokens(buffers)
        elif len(logits_rows_L) <= shape.num_logits:
            logits_LV = self._fetch_logits(len(logits_rows_L))
            slot.mark()
        else:
            logits_LV = self._all_logits(logits_rows_L, shape.num_tokens)
            slot.mark()
        self._flying.append(Flying(slot, len(step.rows), logits_LV))

    def finish(self, step: LoweredStep, lane: int) -> tuple[SampleResult, Array]:
        flying = self._flying.popleft()
        flying.slot.wait()
        if flying.logits_LV is None:
            token_ids_L = flying.slot.tokens_L[: flying.num_sampled].copy()
            if len(token_ids_L) and token_ids_L.min() < 0:
                raise EngineError(
                    "a kernel waited in vain for another one's results: is another program using "
                    "the GPU, or a debugger? End it, or run with --deterministic"
                )
            sampled = SampleResult(token_ids_L, self._nothing, self._nothing, self._nothing)
            return sampled, self._nothing
        return sample(step.sample_logits(flying.logits_LV), step.sampling), flying.logits_LV

    def discard(self, lane: int) -> None:
        self._synchronise()  # also with what was started and went wrong
        self._flying.clear()

    def close(self) -> None:
        self._synchronise()
        self._programs.clear()
        self._heads.clear()
        self._arrays.clear()
        self._kv.clear()
        self._stored.clear()
        self._slots.clear()
        del self._model, self._ops, self._data, self._shared
        self._host_logits_LV = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _program(self, shape: StepShape, buffers: Buffers) -> tuple[InputPlaces, Program]:
        key = shape, buffers.index
        return cached(self._programs, key, lambda: self._record(shape, buffers), MAX_PROGRAMS)

    def _record(self, shape: StepShape, buffers: Buffers) -> tuple[InputPlaces, Program]:
        """Record layers, head and greedy sampling of a shape, as one program."""
        places, arrays = InputPlaces.of(shape, self._max_blocks), self._arrays
        tokens, seqs, num_logits = shape.num_tokens, shape.num_seqs, shape.num_logits

        def view(start: int, size: int) -> Tensor:
            return buffers.inputs[start : start + size]

        table = view(places.block_table, seqs * self._max_blocks)
        batch = ForwardBatch(
            token_ids_T=view(places.token_ids, tokens),
            positions_T=view(places.positions, tokens),
            slots_T=view(places.slots, tokens),
            query_start_S1=view(places.query_start, seqs + 1),
            seq_lens_S=view(places.seq_lens, seqs),
            block_table_SM=table.view(seqs, self._max_blocks),
            logits_rows_L=view(places.logits_rows, num_logits),
            is_decode=shape.is_decode,
        )
        rows_L = view(places.rows, num_logits)
        logits_LV = arrays["logits_LV"][:num_logits]
        out_tokens_L = buffers.out_tokens_L[:num_logits]
        act = self._activations()

        def emit() -> None:
            self._model.forward(self._ops, batch, act)
            if num_logits:
                rows = batch.logits_rows_L
                self._model.logits(self._ops, rows, tokens, act, logits_LV)
                self._ops.sample_greedy(logits_LV, rows_L, arrays["last_tokens_R"], out_tokens_L)

        return places, self._ops.record(emit)

    def _activations(self) -> Activations:
        arrays = self._arrays
        return Activations(*(arrays[k] for k in ("residual_TD", "partial_TD", "q_TQ", "act_TF")))

    def _draw(self, step: LoweredStep, buffers: Buffers) -> None:
        """Put drawn tokens in the place of the largest ones, where rows have a temperature."""
        arrays, vocab = self._arrays, self._opening.config.spec.vocab_size
        logits_LV = arrays["logits_LV"][: len(step.rows), :vocab]
        last_tokens_R = arrays["last_tokens_R"]
        draw_tokens(logits_LV, step.sampling, step.rows, last_tokens_R, buffers.out_tokens_L)

    def _fetch_logits(self, num_rows: int) -> Array:
        """Begin to copy the first rows of the step's logits here; at most one step in flight has
        its logits copied, since nothing runs ahead of it."""
        logits_LV = self._arrays["logits_LV"]
        if self._host_logits_LV is None:
            pin = self._device.type == "cuda"
            self._host_logits_LV = torch.zeros(logits_LV.shape, pin_memory=pin)
        assert all(flying.logits_LV is None for flying in self._flying)
        copied_LV = self._host_logits_LV[:num_rows]
        copied_LV.copy_(logits_LV[:num_rows], non_blocking=True)
        return copied_LV.numpy()

    def _all_logits(self, rows_L: Array, num_tokens: int) -> Array:
        """Logits of any number of rows of the stream that was computed last, waiting for them."""
        most = self._limits.max_batch_size
        out_LV = np.empty((len(rows_L), self._opening.config.spec.vocab_size), np.float32)
        program = cached(
            self._heads, num_tokens, lambda: self._record_head(num_tokens), MAX_PROGRAMS
        )
        for start in range(0, len(rows_L), most):
            part = rows_L[start : start + most]
            rows = np.zeros(most, np.int32)
            rows[: len(part)] = part
            self._arrays["head_rows_L"].copy_(torch.from_numpy(rows))
            program.run()
            logits_LV = self._arrays["logits_LV"][: len(part)].cpu().numpy()
            out_LV[start : start + most] = logits_LV[:, : out_LV.shape[1]]
        return out_LV

    def _record_head(self, num_tokens: int) -> Program:
        rows_L, logits_LV = self._arrays["head_rows_L"], self._arrays["logits_LV"]
        act = self._activations()
        return self._ops.record(
            lambda: self._model.logits(self._ops, rows_L, num_tokens, act, logits_LV)
        )

    def _copy_blocks(self, copies_C2: Array) -> None:
        """A layer at a time: the blocks on their way then take little memory."""
        pairs_C2 = torch.from_numpy(copies_C2.astype(np.int64)).to(self._device)
        for array in self._kv.values():
            layers = tuple(array[i : i + 1] for i in range(len(array)))
            self._ops.copy_blocks(layers, pairs_C2)


def open_cuda_runner(opening: Opening) -> CudaRunner:
    """Bring an engine onto its GPU. Raises EngineError where that has not enough memory, or a byte
    differs from the manifest."""
    config, rank = opening.config, opening.rank
    device = torch.device("cuda", opening.chosen.gpu)
    name = str(device)
    try:
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        free_bytes, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        said, *_ = str(error).splitlines()
        raise EngineError(
            f"{name} cannot be used: {said}: see what nvidia-smi says of it"
        ) from error
    check_gpu_memory(config, rank, opening.num_blocks, name, free_bytes)
    num_ctas = torch.cuda.get_device_properties(device).multi_processor_count
    driver = Driver()
    library = Library(
        read_kernels(opening.engine_dir),
        driver,
        lambda: torch.cuda.current_stream().cuda_stream,
    )

    def make_ops(arrays: dict[str, Tensor]) -> CudaOps:
        return CudaOps(
            config,
            rank,
            library,
            arrays,
            GraphRecorder(),
            Choices(),
            deterministic=opening.deterministic,
            fused=fused_ops(config, library, driver, arrays, num_ctas),
            swiglu=swiglu(config, library, driver, num_ctas),
        )

    try:
        runner = CudaRunner(opening, device, make_ops)
        runner.load()
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError(
            f"{name} ran out of memory while the engine was loaded; {human_bytes(free_bytes)} were "
            "free before: end what else uses it, or lower --kv-cache-bytes"
        ) from error
    return runner


def _allocate(specs: dict[str, ArraySpec], device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype], device=device)
        for name, (dtype, shape) in specs.items()
    }
