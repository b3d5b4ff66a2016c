"""Steps of a model on a GPU, without a scheduler: ms a step, and where they go.

    python -m benchmarks.cuda_step [--model llama-2-7b] [--dtype float16] [--context 128 ...]
                                   [--decode 1 8 16 32 64] [--prefill 128 2048]
                                   [--plain] [--unfused] [--compare] [--profile]

Weights are random; a step is one CUDA graph: forward, head, greedy sampling. For each batch it also
times graphs of one operation over all layers. `--plain` launches kernels one after the other,
`--unfused` does without the target's own kernels. `--compare` times every step also without them,
in turn, and says how far the logits are apart.
`--profile` says what each kernel of a step took, by torch's profiler.
Needs a GPU and Triton.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.cuda_gemm import config_for
from puna.batch import ForwardBatch
from puna.cuda.choices import Choices
from puna.cuda.compile import compile_kernels
from puna.cuda_memory import padded_cols, padded_rows
from puna.engine import EngineConfig
from puna.memory import workspace_specs
from puna.models.llama.model import Activations, Layer, Llama
from puna.ops import LayerCache, Linear, Norm, RopeTable

if TYPE_CHECKING:
    from puna.cuda.ops import CudaOps

Tensor = Any
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description="Time steps and their operations.")
    parser.add_argument("--model", default="llama-2-7b", metavar="PRESET")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--context", type=int, nargs="*", default=[128])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 8, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--plain", action="store_true", help="without overlapping kernels")
    parser.add_argument("--unfused", action="store_true", help="portable kernels only")
    parser.add_argument(
        "--compare", action="store_true", help="also without the target's own kernels"
    )
    parser.add_argument("--profile", action="store_true", help="what each kernel of a step took")
    parser.add_argument("--direct", type=int, help="direct_tokens instead of the table's")
    args = parser.parse_args()
    import torch

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    longest = max(4096, *args.context)
    config = config_for(args.model, args.dtype, target, max_seq_len=longest)
    choices = Choices(overlaps=not args.plain)
    if args.direct is not None:
        choices = replace(choices, direct_tokens=args.direct)
    start = time.perf_counter()
    bench = Steps(config, torch, choices, is_fused=not args.unfused, is_profiled=args.profile)
    print(
        f"{torch.cuda.get_device_name()}, {target}, {args.model} {args.dtype}: kernels and weights "
        f"made in {time.perf_counter() - start:.1f} s, {bench.weight_bytes / 1e9:.2f} GB"
    )
    steps = {
        f"decode {batch} at {context}": bench.decode(batch, context)
        for context in args.context
        for batch in args.decode
    }
    steps |= {f"prefill {num_tokens}": bench.prefill(num_tokens) for num_tokens in args.prefill}
    without = replace(choices, swiglu_tokens=None)
    others = bench.with_choices(without, is_fused=False) if args.compare else None
    for what, batch in steps.items():
        logits_LV = bench.report(what, batch, bench.ops)
        if others:
            found_LV = bench.report(f"{what}, without", batch, others)
            error = (found_LV - logits_LV).norm() / logits_LV.norm()
            print(f"{'':28} logits {float(error):.1e} apart")


@dataclass(frozen=True)
class Step:
    """What emits a step, and its last part, head and sampling; its arrays live as long as it."""

    emit: Callable[[], None]
    last: Callable[[], None]
    act: Activations
    logits_LV: Tensor


class Steps:
    """A model with random weights on the GPU, or with those of another."""

    def __init__(
        self,
        config: EngineConfig,
        torch: Any,
        choices: Choices,
        *,
        is_fused: bool,
        is_profiled: bool,
        like: Steps | None = None,
    ) -> None:
        from puna.cuda.driver import Driver
        from puna.cuda.fused_ops import fused_ops
        from puna.cuda.graphs import GraphRecorder
        from puna.cuda.library import Library
        from puna.cuda.swiglu import swiglu

        self.torch, self.config, self.weight_bytes = torch, config, 0
        self.is_profiled = is_profiled
        files = compile_kernels(config)
        torch.zeros(1, device="cuda")
        driver = Driver()
        kernels = Library(files, driver, lambda: torch.cuda.current_stream().cuda_stream)
        self.dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]
        kinds = {"float32": torch.float32, "int32": torch.int32, config.dtype: self.dtype}
        self.arrays = {
            name: torch.zeros(shape, dtype=kinds[dtype.name], device="cuda")
            for name, (dtype, shape) in workspace_specs(config, 0, "cuda").items()
        }
        num_ctas = torch.cuda.get_device_properties(0).multi_processor_count
        given = config, kernels, driver, self.arrays, num_ctas
        self._given: Any = config, 0, kernels, self.arrays, GraphRecorder()
        self._fused = fused_ops(*given) if is_fused else ()
        self._swiglu = swiglu(config, kernels, driver, num_ctas) if is_fused else None
        self.ops = self.with_choices(choices)
        self.model = like.model if like else self._model()

    def with_choices(self, choices: Choices, *, is_fused: bool = True) -> CudaOps:
        """Operations over the same arrays."""
        from puna.cuda.ops import CudaOps

        return CudaOps(
            *self._given,
            choices,
            fused=self._fused if is_fused else (),
            swiglu=self._swiglu,
        )

    def _model(self) -> Llama:
        spec, torch = self.config.spec, self.torch
        d, f, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
        rope = RopeTable(self.arrays["rope_cos_PE"], self.arrays["rope_sin_PE"])
        rope.cos_PE[:] = 1.0
        blocks = self.config.limits.num_blocks
        shape = (blocks, spec.num_kv_heads, self.config.limits.block_size, spec.head_dim)

        def linear(sizes: list[int], num_cols: int) -> Linear:
            rows = sum(map(padded_rows, sizes))
            data = torch.empty((rows, padded_cols(num_cols)), dtype=self.dtype, device="cuda")
            data.normal_(std=0.02)
            data[:, num_cols:] = 0
            self.weight_bytes += data.numel() * 2
            parts = data.split([padded_rows(size) for size in sizes])
            return Linear(
                tuple(
                    self.ops.load_matrix({"data": part}, self.config.dtype, (size, num_cols), None)
                    for part, size in zip(parts, sizes, strict=True)
                )
            )

        def norm() -> Norm:
            return Norm(torch.ones(d, device="cuda"), spec.rms_norm_eps)

        layers = tuple(
            Layer(
                norm(),
                linear([q, kv, kv], d),
                linear([d], q),
                norm(),
                linear([f, f], d),
                linear([d], f),
                LayerCache(
                    *(torch.randn(shape, dtype=self.dtype, device="cuda") for _ in range(2))
                ),
            )
            for _ in range(spec.num_layers)
        )
        vocab = [spec.vocab_size]
        return Llama(layers, rope, linear(vocab, d), norm(), linear(vocab, d))

    def _integers(self, values: Any) -> Any:
        return self.torch.tensor(list(values), dtype=self.torch.int32, device="cuda")

    def decode(self, num_seqs: int, context: int) -> ForwardBatch:
        block = self.config.limits.block_size
        table = self.torch.zeros_like(self.arrays["block_table_SM"][:num_seqs])
        a_seq, most = -(-context // block), self.config.limits.num_blocks - 1
        for seq in range(num_seqs):
            held = [1 + (seq * a_seq + i) % most for i in range(a_seq)]
            table[seq, :a_seq] = self._integers(held)
        last = [int(row[(context - 1) // block]) * block + (context - 1) % block for row in table]
        return ForwardBatch(
            self._integers(range(num_seqs)),
            self._integers([context - 1] * num_seqs),
            self._integers(last),
            self._integers(range(num_seqs + 1)),
            self._integers([context] * num_seqs),
            table,
            self._integers(range(num_seqs)),
            is_decode=True,
        )

    def prefill(self, num_tokens: int) -> ForwardBatch:
        block, seqs = self.config.limits.block_size, self.config.limits.max_batch_size
        table = self.torch.zeros_like(self.arrays["block_table_SM"])
        count = -(-num_tokens // block)
        table[0, :count] = self._integers(range(1, 1 + count))
        return ForwardBatch(
            self._integers(range(num_tokens)),
            self._integers(range(num_tokens)),
            self._integers(range(block, block + num_tokens)),
            self._integers([0, *[num_tokens] * seqs]),
            self._integers([num_tokens, *[0] * (seqs - 1)]),
            table,
            self._integers([num_tokens - 1]),
        )

    def step(self, batch: ForwardBatch, ops: CudaOps) -> Step:
        arrays, model = self.arrays, self.model
        names = ("residual_TD", "partial_TD", "q_TQ", "act_TF")
        act = Activations(*(arrays[name] for name in names))
        num_tokens, num_rows = batch.num_tokens, len(batch.logits_rows_L)
        logits_LV, tokens_L = arrays["logits_LV"][:num_rows], self._integers([0] * num_rows)
        rows_L = self._integers(range(num_rows))

        def last() -> None:
            model.logits(ops, batch.logits_rows_L, num_tokens, act, logits_LV)
            ops.sample_greedy(logits_LV, rows_L, arrays["last_tokens_R"], tokens_L)

        def emit() -> None:
            model.forward(ops, batch, act)
            last()

        return Step(emit, last, act, logits_LV)

    def report(self, what: str, batch: ForwardBatch, ops: CudaOps) -> Tensor:
        """Print a line: the whole step, and its operations. Returns the step's logits."""
        model, num_tokens = self.model, batch.num_tokens
        step = self.step(batch, ops)
        act = step.act
        x = act.stream(num_tokens)
        q_TQ, act_TF = act.q_TQ[:num_tokens], act.act_TF[:num_tokens]

        def each(call: Callable[[Layer], None]) -> Callable[[], None]:
            return lambda: [call(layer) for layer in model.layers] and None

        def attend(layer: Layer) -> None:
            ops.qkv(x, layer.attn_norm, layer.qkv, model.rope, batch, layer.cache, q_TQ)
            ops.attention(q_TQ, batch, layer.cache, layer.o, x)

        parts = {
            "qkv and attention": each(attend),  # fused kernels have them in one
            "gate_up": each(lambda la: ops.gate_up(x, la.mlp_norm, la.gate_up, act_TF)),
            "down": each(lambda la: ops.down(act_TF, la.down, x)),
            "head": step.last,
        }
        times = ", ".join(f"{name} {self.time(ops, emit):.3f}" for name, emit in parts.items())
        print(f"{what:28} {self.time(ops, step.emit):8.3f} ms   {times}", flush=True)
        if self.is_profiled:
            self.profile(ops, step.emit)
        return step.logits_LV.clone()

    def profile(self, ops: CudaOps, emit: Callable[[], None]) -> None:
        """Print what the kernels of a step took together, by name."""
        from torch.profiler import ProfilerActivity, profile

        program = ops.record(emit)
        program.run()
        self.torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            program.run()
            self.torch.cuda.synchronize()
        kernels = sorted(found.key_averages(), key=lambda it: -it.self_device_time_total)
        for it in kernels:
            us = it.self_device_time_total
            print(f"{us / 1e3:12.3f} ms {it.count:5} x {us / it.count:8.2f} us  {it.key[:70]}")

    def time(self, ops: CudaOps, emit: Callable[[], None]) -> float:
        """Milliseconds, the median."""
        torch = self.torch
        program = ops.record(emit)
        program.run()
        found = []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            program.run()
            program.run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 2)
        return sorted(found)[ROUNDS // 2]


if __name__ == "__main__":
    main()
