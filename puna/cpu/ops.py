"""CpuOps: every operation as a call of the native library, recorded once and replayed in C++.

This file turns arrays into pointers, and formats into what the kernels call them. How a program
runs, and in which order anything is summed, is decided in `puna/native/csrc`.

Shape suffixes as in `puna.ops`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from puna.batch import ForwardBatch
from puna.cpu import structs
from puna.errors import ConfigError
from puna.layout import TILE
from puna.native.cores import num_cores
from puna.ops import LayerCache, Linear, Norm, Program, Reduce, RopeTable, Stream
from puna.ops.kv_blocks import copy_blocks
from puna.quant import DTYPES, Array, Format

# MatrixKind and CacheKind of csrc/kernels.h.
_DENSE_KINDS = MappingProxyType({"float32": 0, "float16": 1, "bfloat16": 2})
_INTEGER_KINDS = MappingProxyType({8: 3, 4: 4})
_CACHE_KINDS = MappingProxyType(
    {**{DTYPES[name]: kind for name, kind in _DENSE_KINDS.items()}, np.dtype(np.int8): 3}
)
KV_BLOCK = 16  # BLOCK of csrc/kernels.h: tokens of a KV block are the lanes of a vector


@dataclass(frozen=True, slots=True)
class Packed:
    """A stored matrix: what C++ reads, and the arrays that must outlive it."""

    matrix: structs.Matrix
    arrays: tuple[Array, ...]


class CpuProgram:
    """A handle of a recorded program, and what its pointers point to."""

    def __init__(self, ops: CpuOps, handle: int) -> None:
        self._library, self.handle = ops.library, handle
        self.keep: list[Any] = [ops]
        weakref.finalize(self, ops.library.puna_program_free, handle)

    def run(self) -> None:
        if not self._library.puna_program_run(self.handle):
            raise MemoryError("the native library ran out of memory in a step")


@dataclass(frozen=True, slots=True)
class PartedProgram:
    """Native programs, and between them the sums over ranks."""

    parts: tuple[Callable[[], None], ...]

    def run(self) -> None:
        for part in self.parts:
            part()


class CpuOps:
    """Operations of one engine on a pool of `threads` threads of its own (None: physical cores).

    `instruction_set` is one of those that `instruction_sets` lists (None: the best); `scratch` are
    the arrays of `memory.cpu_scratch_specs`; `reduce` sums over tensor-parallel ranks (None: there
    is one).
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        scratch: dict[str, Array],
        threads: int | None = None,
        instruction_set: str | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self.library = structs.declare(library)
        usable = instruction_sets(library)
        self.instruction_set = instruction_set or usable[0]
        assert self.instruction_set in usable, f"{self.instruction_set} is not one of {usable}"
        self.threads = threads or num_cores()
        self._machine = self.library.puna_machine_new(self.threads, self.instruction_set.encode())
        if not self._machine:
            raise ConfigError(
                f"{self.threads} threads could not be started: lower --threads, or raise the "
                "system's limit (ulimit -u)"
            )
        weakref.finalize(self, self.library.puna_machine_free, self._machine)
        self._scratch = _scratch(scratch)
        self._scratch_arrays = scratch
        self._reduce = reduce
        self._is_recording = False
        self._program: CpuProgram | None = None  # begun, and not ended yet
        self._parts: list[Callable[[], None]] = []  # what was recorded before it

    def load_matrix(
        self,
        arrays: dict[str, Array],
        format_name: str,
        shape: tuple[int, int],
        out_NK: Array | None,
    ) -> Packed:
        assert out_NK is None, "the cpu device reads matrices as they are stored"
        fmt, (num_rows, num_cols) = Format.parse(format_name), shape
        data = arrays["data" if fmt.is_dense else "q"]
        assert data.shape[0] == -(-num_rows // TILE), (data.shape, shape)
        kind = _DENSE_KINDS[fmt.dtype] if fmt.is_dense else _INTEGER_KINDS[fmt.bits]
        assert fmt.group_size % 16 == 0, fmt.name
        scale, minimum = arrays.get("scale"), arrays.get("min")
        return Packed(
            structs.Matrix(
                kind,
                num_rows,
                num_cols,
                0 if fmt.is_dense else fmt.group_size,
                fmt.has_min,
                fmt.scale_dtype == "float32",
                _pointer(data),
                _pointer(scale),
                _pointer(minimum),
            ),
            tuple(array for array in (data, scale, minimum) if array is not None),
        )

    def record(self, emit: Callable[[], None]) -> Program:
        assert not self._is_recording, "already recording"
        self._is_recording = True
        try:
            emit()
            self._end_program()
            return PartedProgram(tuple(self._parts))
        finally:
            self._is_recording = False
            self._program, self._parts = None, []

    def _end_program(self) -> None:
        if self._program is not None:
            self._check(self.library.puna_program_end(self._program.handle))
            self._parts.append(self._program.run)
            self._program = None

    def _record_reduce(self, x: Stream) -> None:
        if self._reduce is not None:
            self._end_program()
            self._parts.append(self._reduce(x.partial_TD))

    def embed(self, token_ids_T: Array, table: Linear, x: Stream) -> None:
        program = self._recording(token_ids_T, table, x)
        self._check(
            self.library.puna_program_embed(
                program, _pointer(token_ids_T), _linear(table, self._scratch), _stream(x)
            )
        )

    def qkv(
        self,
        x: Stream,
        norm: Norm,
        linear: Linear,
        rope: RopeTable,
        batch: ForwardBatch,
        cache: LayerCache,
        q_TQ: Array,
    ) -> None:
        self._record_reduce(x)
        program = self._recording(x, norm, linear, rope, batch, cache, q_TQ)
        head_dim = cache.values_NKPE.shape[3]
        self._check(
            self.library.puna_program_qkv(
                program,
                _stream(x),
                _norm(norm),
                _linear(linear, self._scratch),
                structs.Rope(_pointer(rope.cos_PE), _pointer(rope.sin_PE)),
                _batch(batch),
                _cache(cache),
                _pointer(q_TQ),
                q_TQ.shape[1] // head_dim,
            )
        )

    def attention(
        self, q_TQ: Array, batch: ForwardBatch, cache: LayerCache, out: Linear, x: Stream
    ) -> None:
        program = self._recording(q_TQ, batch, cache, out, x)
        self._check(
            self.library.puna_program_attention(
                program,
                _pointer(q_TQ),
                q_TQ.shape[1] // cache.values_NKPE.shape[3],
                _batch(batch),
                _cache(cache),
                _linear(out, self._scratch),
                _stream(x),
            )
        )

    def gate_up(self, x: Stream, norm: Norm, linear: Linear, act_TF: Array) -> None:
        assert len(linear.weights) == 2, "gate and up are matrices of their own in layout tiles"
        self._record_reduce(x)
        program = self._recording(x, norm, linear, act_TF)
        self._check(
            self.library.puna_program_gate_up(
                program, _stream(x), _norm(norm), _linear(linear, self._scratch), _pointer(act_TF)
            )
        )

    def down(self, act_TF: Array, linear: Linear, x: Stream) -> None:
        program = self._recording(act_TF, linear, x)
        self._check(
            self.library.puna_program_down(
                program, _pointer(act_TF), _linear(linear, self._scratch), _stream(x)
            )
        )

    def head(self, x: Stream, rows_L: Array, norm: Norm, linear: Linear, logits_LV: Array) -> None:
        self._record_reduce(x)
        program = self._recording(x, rows_L, norm, linear, logits_LV)
        self._check(
            self.library.puna_program_head(
                program,
                _stream(x),
                _pointer(rows_L),
                len(rows_L),
                _norm(norm),
                _linear(linear, self._scratch),
                _pointer(logits_LV),
                logits_LV.shape[1],
            )
        )

    def copy_blocks(self, kv_arrays: tuple[Array, ...], copies_C2: Array) -> None:
        copy_blocks(kv_arrays, copies_C2)

    def _recording(self, *arguments: Any) -> int:
        """The handle of the program being recorded, which keeps the operation's arrays alive; begun
        where there is none."""
        num_rows = len(self._scratch_arrays["attended_TQ"])
        streams = (argument for argument in arguments if isinstance(argument, Stream))
        assert all(len(x.residual_TD) <= num_rows for x in streams), "scratch has too few rows"
        assert self._is_recording, "operations are called inside record() only"
        if self._program is None:
            handle = self.library.puna_program_new(self._machine, self._scratch)
            self._check(handle)
            self._program = CpuProgram(self, handle)
        self._program.keep += arguments
        return self._program.handle

    @staticmethod
    def _check(result: int | None) -> None:
        if not result:
            raise MemoryError("the native library ran out of memory while a step was recorded")


def instruction_sets(library: ctypes.CDLL) -> list[str]:
    """Instruction sets that both the library and this machine have, best first."""
    return structs.declare(library).puna_instruction_sets().decode().split(",")


def _pointer(array: Array | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous, "arrays of a program are contiguous"
    return array.ctypes.data


def _linear(linear: Linear, scratch: structs.Scratch) -> structs.Linear:
    parts: list[Packed] = list(linear.weights)
    assert all(part.matrix.k <= scratch.acts.stride for part in parts), "scratch is too narrow"
    matrices = (structs.Matrix * 3)(*(part.matrix for part in parts))
    return structs.Linear(len(parts), matrices, _pointer(linear.bias_N))


def _stream(x: Stream) -> structs.Stream:
    return structs.Stream(
        _pointer(x.residual_TD), _pointer(x.partial_TD), *map(int, x.residual_TD.shape)
    )


def _norm(norm: Norm) -> structs.Norm:
    return structs.Norm(_pointer(norm.weight_D), norm.eps)


def _batch(batch: ForwardBatch) -> structs.Batch:
    return structs.Batch(
        _pointer(batch.positions_T),
        _pointer(batch.slots_T),
        _pointer(batch.query_start_S1),
        _pointer(batch.seq_lens_S),
        _pointer(batch.block_table_SM),
        *map(int, batch.block_table_SM.shape),
    )


def _cache(cache: LayerCache) -> structs.Cache:
    _, num_kv_heads, block_size, head_dim = cache.values_NKPE.shape
    assert block_size == KV_BLOCK, f"KV blocks of {block_size} tokens"
    return structs.Cache(
        _CACHE_KINDS[cache.values_NKPE.dtype],
        num_kv_heads,
        head_dim,
        _pointer(cache.keys_NKEP),
        _pointer(cache.values_NKPE),
        _pointer(cache.key_scales_NKP),
        _pointer(cache.value_scales_NKP),
    )


def _scratch(arrays: dict[str, Array]) -> structs.Scratch:
    acts = structs.Acts(
        arrays["act_float_TK"].shape[1],
        *(
            _pointer(arrays[name])
            for name in ("act_float_TK", "act_bf16_TK", "act_q32_TX", "act_q16_TX")
        ),
    )
    attn_part = arrays["attn_part"]
    return structs.Scratch(
        acts,
        _pointer(arrays["kv_TX"]),
        _pointer(arrays["attended_TQ"]),
        _pointer(attn_part),
        attn_part.shape[1],
    )
