"""The skinny products of a model, cut into programs in many ways, and cuBLAS beside them.

    python -m benchmarks.cuda_gemm [--model llama-2-7b] [--dtype float16] [--tiles 16 32 64]
                                   [--roles qkv o gate_up down head] [--all]
                                   [--library 128 2048]

Each way runs in a CUDA graph that goes over copies of the matrix which together are larger than the
L2 cache. Prints the fastest ways of each product, with TB/s of the weights, and what
`puna.cuda.gemm_shapes` would take; the table there is filled from here. With --library it times
torch's products of so many tokens instead: by either of its libraries, as W x^T, and added to
float32 numbers as a residual would be. Needs a GPU and Triton.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import Any

from puna.checkpoint.dummy import parse_preset
from puna.cuda.compile import _compile_triton
from puna.cuda.gemm_shapes import SHARED_LIMITS, GemmShape, early_columns
from puna.cuda.kernel_table import KERNELS_FILE, TritonKernel, triton_kernels
from puna.engine import EngineConfig, Provenance
from puna.plan import BuildConfig, CheckpointFacts, plan
from puna.spec import GenerationDefaults

LIBRARY_WAYS = ("x W^T", "W x^T", "+= x W^T")
MATRIX_BYTES = 400e6  # of all copies
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Time skinny products in many shapes.")
    parser.add_argument("--model", default="llama-2-7b", metavar="PRESET")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--tiles", type=int, nargs="+", default=[16, 32, 64])
    roles = ["qkv", "o", "gate_up", "down", "head"]
    parser.add_argument("--roles", nargs="+", default=roles, choices=roles)
    parser.add_argument("--all", action="store_true", help="print every way, not the best four")
    parser.add_argument("--library", type=int, nargs="+", metavar="M", help="torch's products")
    args = parser.parse_args()
    import torch

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    config = config_for(args.model, args.dtype, target)
    kernels = {kernel.name: kernel for kernel in triton_kernels(config)}
    libraries = "cublas", "cublaslt"
    if args.library:
        for role, num_tokens in product(args.roles, args.library):
            matrices = _Matrices(kernels[f"gemm_{role}_16"], torch, num_tokens)
            times = {
                f"{library} {way}": matrices.time_cublas(library, way)
                for library, way in product(libraries, LIBRARY_WAYS)
            }
            lines = ", ".join(f"{name} {matrices.line(us)}" for name, us in times.items())
            print(f"{role} {num_tokens}: {lines}", flush=True)
        return
    wanted = [kernels[f"gemm_{role}_{tile}"] for role in args.roles for tile in args.tiles]
    ways = [(kernel, way) for kernel in wanted for way in ways_of(kernel, target)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        compiled = list(pool.map(_compiled, [(way, config) for _, way in ways], chunksize=2))
    print(f"{torch.cuda.get_device_name()}, {target}, {args.model} {args.dtype}, {len(ways)} ways")
    for kernel in wanted:
        matrices = _Matrices(kernel, torch)
        found = []
        for (owner, way), made in zip(ways, compiled, strict=True):
            if owner is kernel and made is not None:
                found.append((matrices.time(way, made), way))
        found.sort(key=lambda pair: pair[0])
        print(f"\n{kernel.name}: cuBLAS {matrices.line(matrices.time_cublas())}")
        for us, way in found if args.all else found[:4]:
            print(f"  {matrices.line(us)}  {shape_of(way)}")
        mine = [us for us, way in found if way.constants == kernel.constants]
        print(f"  the table's: {matrices.line(mine[0]) if mine else '?'}  {shape_of(kernel)}")


def config_for(
    model: str,
    dtype: Any,
    target: str,
    num_layers: int | None = None,
    max_seq_len: int = 4096,
    max_batch_size: int = 64,
) -> EngineConfig:
    spec = parse_preset(model)
    spec = replace(spec, num_layers=num_layers or spec.num_layers)
    facts = CheckpointFacts(spec, {}, GenerationDefaults(), Provenance(model, "dummy", {}, "0", ()))
    sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    return plan(facts, BuildConfig(dtype=dtype, target=target, **sizes))


def shape_of(kernel: TritonKernel) -> GemmShape:
    found: dict[str, Any] = dict(kernel.constants)
    return GemmShape(found["BLOCK_N"], found["BLOCK_K"], kernel.num_warps, kernel.num_stages)


def ways_of(kernel: TritonKernel, target: str) -> Iterator[TritonKernel]:
    """The kernel as it is, and cut in other ways that fit."""
    yield kernel
    constants: dict[str, Any] = dict(kernel.constants)
    is_pair, tile = constants["EPILOGUE"] == "silu", constants["BLOCK_M"]
    rows = (16, 32, 64) if is_pair else (32, 64, 128)
    early = early_columns(target, constants["KP"], constants["SPLITS"])
    for block_n, block_k, stages, warps in product(rows, (64, 128), (3, 4, 5, 6), (4, 8)):
        block_bytes = (block_n * (2 if is_pair else 1) + tile) * block_k * 2
        if constants["KP"] % block_k or stages * block_bytes > SHARED_LIMITS[target]:
            continue
        if warps == 8 and block_n * tile < 4096:  # half of them would have nothing to do
            continue
        cut = {"BLOCK_N": block_n, "BLOCK_K": block_k, "EARLY": -(-early // block_k)}
        yield replace(
            kernel,
            constants=tuple({**constants, **cut}.items()),
            num_stages=stages,
            num_warps=warps,
        )


def _compiled(job: tuple[TritonKernel, EngineConfig]) -> tuple[bytes, dict[str, Any]] | None:
    """In a process of its own. None where it does not compile."""
    try:
        return _compile_triton(*job)
    except Exception:
        return None


class _Matrices:
    """Copies of one product's matrix, its tokens, and time on them."""

    def __init__(self, kernel: TritonKernel, torch: Any, num_tokens: int | None = None) -> None:
        """`num_tokens`: of x, if not those of the kernel's tile."""
        self.torch = torch
        self.constants: dict[str, Any] = dict(kernel.constants)
        pairs = 2 if self.constants["EPILOGUE"] == "silu" else 1
        rows = -(-self.constants["N"] // 16) * 16 * pairs
        dtype = torch.float16 if kernel.arguments[0][1] == "*fp16" else torch.bfloat16
        self.num_bytes = rows * self.constants["KP"] * 2
        copies = max(2, round(MATRIX_BYTES / self.num_bytes))
        shape = (rows, self.constants["KP"])
        self.weights = [torch.randn(shape, dtype=dtype, device="cuda") for _ in range(copies)]
        tokens = num_tokens or self.constants["BLOCK_M"]
        self.x = torch.randn((tokens, self.constants["K"]), dtype=dtype, device="cuda")
        out = torch.float32 if kernel.arguments[3][1] == "*fp32" else dtype
        most = self.constants["SPLITS"] * self.constants["PART_ROWS"]
        self.y = torch.zeros((most, self.constants["YS"]), dtype=out, device="cuda")
        self.full = torch.zeros((tokens, rows), dtype=dtype, device="cuda")
        self.bias = torch.zeros(rows, device="cuda")

    def line(self, us: float) -> str:
        return f"{us:7.2f} us {self.num_bytes / us / 1e6:5.2f} TB/s"

    def time(self, way: TritonKernel, made: tuple[bytes, dict[str, Any]]) -> float:
        """Microseconds of one product."""
        from puna.cuda.driver import Driver
        from puna.cuda.library import Library

        cubin, entry = made
        table = {"target": "", "kernels": {way.name: entry}}
        files = {entry["file"]: cubin, KERNELS_FILE: json.dumps(table).encode()}
        library = Library(files, Driver(), lambda: self.torch.cuda.current_stream().cuda_stream)
        tokens = len(self.x)
        splits = self.constants["SPLITS"] if self.constants["EPILOGUE"] == "parts" else 1
        grid = (1, -(-self.constants["N"] // shape_of(way).block_n), splits)

        def emit() -> None:
            for i, w in enumerate(self.weights):
                library.launch(way.name, grid, (self.x, w, self.bias, self.y, tokens), i > 0)

        return self._time(emit)

    def time_cublas(self, library: str = "cublas", way: str = LIBRARY_WAYS[0]) -> float:
        torch, num_cols = self.torch, self.constants["K"]
        full = self.full.T.contiguous() if way == "W x^T" else self.full
        sums = self.full.float()

        def emit() -> None:
            for w in self.weights:
                w_NK = w[:, :num_cols]
                if way == "W x^T":
                    torch.mm(w_NK, self.x.T, out=full)
                elif way == "+= x W^T":
                    torch.addmm(sums, self.x, w_NK.T, torch.float32, out=sums)
                else:
                    torch.mm(self.x, w_NK.T, out=full)

        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return self._time(emit)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    def _time(self, emit: Callable[[], None]) -> float:
        from puna.cuda.graphs import GraphRecorder

        torch, recorder = self.torch, GraphRecorder()
        recorder.prepare(emit)
        program = recorder.record(emit)
        program.run()
        best = float("inf")
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            program.run()
            program.run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) * 500 / len(self.weights))
        return best


if __name__ == "__main__":
    main()
