"""Every backend that this machine runs, as the tests of the operations make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from puna.cpu.ops import CpuOps, instruction_sets
from puna.memory import cpu_scratch_specs
from puna.native.library import find_library
from puna.ops.reference import ReferenceOps
from puna.quant import Array, Format

Backend = CpuOps | ReferenceOps


def cpu_ops(instruction_set: str | None = None, threads: int = 2) -> CpuOps:
    """The cpu device with room for the sizes of these tests; its scratch starts as NaN."""
    library = find_library()
    assert library is not None
    specs = cpu_scratch_specs(
        num_tokens=300,
        num_seqs=16,
        max_seq_len=1024,
        num_inputs=1000,
        num_heads=12,
        num_kv_heads=6,
        head_dim=80,
    )
    scratch = {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}
    for array in scratch.values():
        array.view(np.uint8)[:] = 255  # NaN as a float, -1 as an integer
    return CpuOps(library, scratch, threads, instruction_set)


def backends() -> dict[str, Callable[[], Backend]]:
    """Factories by name: the reference, and one for each instruction set."""
    found: dict[str, Callable[[], Backend]] = {"reference": ReferenceOps}
    library = find_library()
    if library is not None:
        found |= {f"cpu:{name}": partial(cpu_ops, name) for name in instruction_sets(library)}
    return found


def as_multiplied(x_TK: Array, fmt: Format, ops: Backend) -> Array:
    """Activations as the backend multiplies them by a matrix of some format, in float64.

    The cpu device rounds them to int8 in blocks where the matrix is quantised, and to bfloat16
    where the instruction set multiplies bfloat16.
    """
    if not isinstance(ops, CpuOps):
        return x_TK.astype(np.float64)
    if fmt.is_dense:
        is_rounded = fmt.dtype == "bfloat16" and multiplies_bfloat16(ops)
        return to_bfloat16(x_TK) if is_rounded else x_TK.astype(np.float64)
    size = 32 if fmt.group_size % 32 == 0 else 16
    out_TK = np.empty(x_TK.shape)
    for row, start in np.ndindex(len(x_TK), -(-x_TK.shape[1] // size)):
        block = x_TK[row, start * size : (start + 1) * size]
        largest = np.abs(block).max()
        q = np.rint(block * (np.float32(127) / largest)) if largest else np.zeros_like(block)
        scale = largest / np.float32(127)
        out_TK[row, start * size : (start + 1) * size] = q.astype(np.float64) * float(scale)
    return out_TK


def multiplies_bfloat16(ops: Backend) -> bool:
    return isinstance(ops, CpuOps) and ops.instruction_set == "avx512vnni"


def to_bfloat16(x: Array) -> Array:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)
    return rounded.view(np.float32).astype(np.float64)
