"""Variants of the kernels of one GPU's target, timed in turn in one process.

    python -m benchmarks.cuda_variants [NAME[:CONSTANT=VALUE[;CONSTANT=VALUE ...]] ...]
                                       [--model llama-2-7b] [--dtype float16] [--context 192 ...]
                                       [--decode 8 16 32 64] [--prefill 128] [--check]

A constant is one of `puna.cuda`, as attend_plan.REGISTERS, or a macro of the CUDA C++ sources,
which read it with #ifdef. H200s differ by 2 to 4 % among each other and as they get warm, so only
times of one process say anything about a variant. Logits are compared with those of the portable
kernels. `--check` compiles the variants only, which needs no GPU.
"""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.cuda_gemm import config_for
from puna.cuda import compile as compiling
from puna.cuda.choices import Choices
from puna.cuda.source_table import CudaSource, cuda_sources
from puna.engine import EngineConfig

if TYPE_CHECKING:
    from benchmarks.cuda_step import Steps

ROUNDS, REPEATS = 15, 4
MOST_ERROR = 5e-3  # of logits, relative: more is marked


@dataclass(frozen=True)
class Variant:
    """`constants`: module of puna.cuda, name, value."""

    name: str
    constants: tuple[tuple[str, str, Any], ...]
    macros: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """
        >>> Variant.parse("small:attend_plan.REGISTERS=192;EARLY=3").constants
        (('attend_plan', 'REGISTERS', 192),)
        """
        name, _, rest = text.partition(":")
        constants: list[tuple[str, str, Any]] = []
        macros: list[tuple[str, int]] = []
        for setting in filter(None, rest.split(";")):
            key, _, value = setting.partition("=")
            module, _, constant = key.rpartition(".")
            if module:
                constants.append((module, constant, ast.literal_eval(value)))
            else:
                macros.append((key, int(value)))
        return cls(name, tuple(constants), tuple(macros))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The constants have the variant's values; sources are compiled with its macros."""
        modules = [
            importlib.import_module(f"puna.cuda.{module}") for module, _, _ in self.constants
        ]
        names = [name for _, name, _ in self.constants]
        before = [getattr(module, name) for module, name in zip(modules, names, strict=True)]
        for module, (_, name, value) in zip(modules, self.constants, strict=True):
            setattr(module, name, value)
        compiling.cuda_sources = self.sources
        try:
            yield
        finally:
            compiling.cuda_sources = cuda_sources
            for module, name, value in zip(modules, names, before, strict=True):
                setattr(module, name, value)

    def sources(self, config: EngineConfig) -> tuple[CudaSource, ...]:
        return tuple(
            replace(source, defines=(*source.defines, *self.macros))
            for source in cuda_sources(config)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time variants of kernels in turn.")
    parser.add_argument("--model", default="llama-2-7b", metavar="PRESET")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--context", type=int, nargs="*", default=[192])
    parser.add_argument("--decode", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--check", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", default=["as it is"])
    args = parser.parse_args()
    sizes = {
        "max_seq_len": max([4096, *args.context]),
        "max_batch_size": max([64, *args.decode]),
    }
    config = config_for(args.model, args.dtype, "sm_90", **sizes)
    variants = [Variant.parse(text) for text in args.variants]
    if args.check:
        for variant in variants:
            with variant.in_place():
                for source in variant.sources(config):
                    compiling.compile_cuda(source, config.target)
            print(f"{variant.name}: compiles")
        return
    import torch

    from benchmarks.cuda_step import Steps

    found: list[Steps] = []
    for variant in variants:
        with variant.in_place():
            like = found[0] if found else None
            given = config, torch, Choices()
            found.append(Steps(*given, is_fused=True, is_profiled=False, like=like))
    print(f"{torch.cuda.get_device_name()}, {args.model} {args.dtype}: ms, against the first")
    for context in args.context:
        for batch in args.decode:
            title = f"decode {batch} at {context}"
            compare(title, variants, found, lambda it, b=batch, c=context: it.decode(b, c))
    for num_tokens in args.prefill:
        compare(f"prefill {num_tokens}", variants, found, lambda it, n=num_tokens: it.prefill(n))


def compare(
    title: str, variants: list[Variant], found: list[Steps], batch_of: Callable[[Steps], Any]
) -> None:
    torch = found[0].torch
    without = replace(Choices(), swiglu_tokens=None)
    portable = found[0].with_choices(without, is_fused=False)
    expected = found[0].step(batch_of(found[0]), portable)
    portable.record(expected.emit).run()
    torch.cuda.synchronize()
    expected_LV = expected.logits_LV.clone()
    steps, programs, errors = [], [], []
    for variant, it in zip(variants, found, strict=True):
        steps.append(it.step(batch_of(it), it.ops))
        with variant.in_place():
            programs.append(it.ops.record(steps[-1].emit))
        steps[-1].logits_LV.zero_()
        programs[-1].run()
        torch.cuda.synchronize()
        errors.append(float((steps[-1].logits_LV - expected_LV).norm() / expected_LV.norm()))
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(ROUNDS):
        for program, taken in zip(programs, times, strict=True):
            program.run()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPEATS):
                program.run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / REPEATS)
    first = median(times[0])
    words = [
        f"{variant.name} {median(taken):.3f} ({median(taken) / first - 1:+.1%}"
        + (f", logits {error:.0e} apart)" if error > MOST_ERROR else ")")
        for variant, taken, error in zip(variants, times, errors, strict=True)
    ]
    print(f"{title:20} {'  '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
