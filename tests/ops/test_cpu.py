"""What is the cpu device's own: threads, instruction sets, programs that share a pool, idling."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from backends import backends, cpu_ops, multiplies_bfloat16
from paged import Sequence, cache_arrays, floats, paged

from puna.batch import ForwardBatch
from puna.cpu.ops import CpuOps, instruction_sets
from puna.layout import pack_dense, pack_quantised
from puna.native.cores import num_cores
from puna.native.library import find_library
from puna.ops import Linear, Norm, Program, RopeTable, Stream
from puna.quant import DTYPES, Array, Format, quantize

pytestmark = pytest.mark.skipif(find_library() is None, reason="needs the native library")

FORMATS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8-g32",
    "int8-g16",
    "int4-g32",
    "int4-g128",
)


class Layer:
    """One layer and a head of random sizes over a random step, for any CpuOps."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        kv_heads = int(rng.integers(1, 4))
        self.head_dim = 2 * int(rng.integers(1, 41))
        self.num_heads = kv_heads * int(rng.integers(1, 5))
        self.hidden, self.ffn, self.vocab = (int(n) for n in rng.integers(1, 200, 3))
        self.dtype = str(rng.choice(["float32", "float16", "bfloat16", "int8"]))
        sequences = []
        for _ in range(int(rng.integers(1, 5))):
            num_new = int(rng.choice([1, 1, 1, 2, 7, 30]))
            sequences.append(Sequence(num_new, num_new + int(rng.choice([0, 5, 120, 300]))))
        self.step = paged(rng, sequences, kv_heads, self.head_dim, self.dtype)
        self.batch: ForwardBatch = self.step.batch
        self.num_tokens = self.batch.num_tokens
        self.before = [array.copy() for array in cache_arrays(self.step.cache)]
        q, kv = self.num_heads * self.head_dim, kv_heads * self.head_dim
        self.q_size = q
        self.name = str(rng.choice(FORMATS))
        self.matrices = {
            name: self._matrix(rng, *shape)
            for name, shape in {
                "q": (q, self.hidden),
                "k": (kv, self.hidden),
                "v": (kv, self.hidden),
                "o": (self.hidden, q),
                "gate": (self.ffn, self.hidden),
                "up": (self.ffn, self.hidden),
                "down": (self.hidden, self.ffn),
                "head": (self.vocab, self.hidden),
            }.items()
        }
        self.bias_N = floats(rng, q + 2 * kv) if rng.random() < 0.5 else None
        self.norm = Norm(floats(rng, self.hidden), 1e-5)
        angles = rng.uniform(0, 6, (400, self.head_dim // 2))
        self.rope = RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        self.start = floats(rng, 2, self.num_tokens, self.hidden)
        self.rows_L = np.unique(rng.integers(0, self.num_tokens, 5)).astype(np.int32)

    def _matrix(
        self, rng: np.random.Generator, num_rows: int, num_cols: int
    ) -> tuple[dict[str, Array], tuple[int, int]]:
        x_NK, fmt = floats(rng, num_rows, num_cols), Format.parse(self.name)
        packed = (
            pack_dense("tiles", x_NK.astype(DTYPES[fmt.dtype]))
            if fmt.is_dense
            else pack_quantised("tiles", quantize(x_NK, fmt))
        )
        return packed, (num_rows, num_cols)

    def record(self, ops: CpuOps, are_apart: bool = False) -> tuple[list[Program], list[Array]]:
        """The programs (qkv and the rest may be apart), and the arrays that they leave."""
        loaded = {
            name: ops.load_matrix(arrays, self.name, shape, None)
            for name, (arrays, shape) in self.matrices.items()
        }
        x = Stream(self.start[0].copy(), self.start[1].copy())
        q_TQ = np.full((self.num_tokens, self.q_size), np.nan, np.float32)
        act_TF = np.full((self.num_tokens, self.ffn), np.nan, np.float32)
        logits_LV = np.full((len(self.rows_L), self.vocab), np.nan, np.float32)
        batch, cache = self.batch, self.step.cache

        def linear(*names: str, bias: Array | None = None) -> Linear:
            return Linear(tuple(loaded[name] for name in names), bias)

        def first() -> None:
            qkv = linear("q", "k", "v", bias=self.bias_N)
            ops.qkv(x, self.norm, qkv, self.rope, batch, cache, q_TQ)

        def rest() -> None:
            ops.attention(q_TQ, batch, cache, linear("o"), x)
            ops.gate_up(x, self.norm, linear("gate", "up"), act_TF)
            ops.down(act_TF, linear("down"), x)
            ops.head(x, self.rows_L, self.norm, linear("head"), logits_LV)

        def whole() -> None:
            first()
            rest()

        programs = [ops.record(emit) for emit in ((first, rest) if are_apart else (whole,))]
        return programs, [x.residual_TD, x.partial_TD, q_TQ, act_TF, logits_LV]

    def run(self, ops: CpuOps, are_apart: bool = False) -> list[Array]:
        """A fresh run: everything that the step writes, the KV cache included."""
        for array, before in zip(cache_arrays(self.step.cache), self.before, strict=True):
            array[:] = before
        programs, outputs = self.record(ops, are_apart)
        for program in programs:
            program.run()
        return [*outputs, *(array.copy() for array in cache_arrays(self.step.cache))]


def same_bits(one: list[Array], other: list[Array]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def test_random_steps_have_the_same_bits_with_any_number_of_threads() -> None:
    machines = [cpu_ops(threads=threads) for threads in (1, 2, 3, 7)]
    for seed in range(200):
        layer = Layer(seed)
        expected = layer.run(machines[0])
        assert all(np.isfinite(array).all() for array in expected[:5]), seed
        for ops in machines[1:]:
            assert same_bits(layer.run(ops), expected), (seed, ops.threads)
        assert same_bits(layer.run(machines[seed % 4]), expected), (seed, "again")


def test_instruction_sets_differ_by_rounding_only() -> None:
    machines = [make() for name, make in backends().items() if name.startswith("cpu:")]
    assert len(machines) >= 1
    for seed in range(40):
        layer = Layer(1000 + seed)
        if layer.name == "bfloat16":  # one of them rounds activations to bfloat16
            continue
        results = [(ops, layer.run(ops)) for ops in machines if isinstance(ops, CpuOps)]
        plainest = results[-1][1]
        for ops, found in results[:-1]:
            for a, b in zip(found[:2], plainest[:2], strict=True):
                # An activation next to a rounding boundary may fall to either side.
                bound = 2e-2 if layer.name.startswith("int") or layer.dtype == "int8" else 1e-3
                if layer.dtype == "bfloat16" and multiplies_bfloat16(ops):
                    bound = max(1e-2, 3 * bound)  # it rounds queries and softmax's weights
                assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b), (seed, layer.name)


def test_steps_have_the_same_bits_whether_attention_follows_at_once() -> None:
    """Attention then rotates the queries, and stores a single token's key and value, itself."""
    ops = cpu_ops()
    num_tokens = []
    for seed in range(3000, 3300):
        layer = Layer(seed)
        num_tokens.append(layer.num_tokens)
        together, apart = layer.run(ops), layer.run(ops, are_apart=True)
        q_TQ = 2  # stays as it was projected, together
        assert same_bits([*together[:q_TQ], *together[3:]], [*apart[:q_TQ], *apart[3:]]), seed
        assert not np.isnan(apart[q_TQ]).any()
    assert num_tokens.count(1) > 15 and max(num_tokens) > 60


def test_programs_of_one_pool_are_independent() -> None:
    ops = cpu_ops()
    layers = [Layer(2000 + seed) for seed in range(3)]
    expected = [layer.run(ops) for layer in layers]
    recorded = [layer.record(ops) for layer in layers]
    for _ in range(3):
        for layer, ((program,), outputs), result in zip(layers, recorded, expected, strict=True):
            for array, before in zip(cache_arrays(layer.step.cache), layer.before, strict=True):
                array[:] = before
            outputs[0][:], outputs[1][:] = layer.start
            program.run()
            assert same_bits(outputs, result[:5])


def test_threads_use_no_processor_when_idle() -> None:
    ops = cpu_ops(threads=4)
    Layer(7).run(ops)
    time.sleep(0.5)
    start = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - start < 0.01
    Layer(7).run(ops)  # and they wake up again


def test_threads_end_with_their_ops() -> None:
    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    before = num_threads()
    for _ in range(5):
        ops = cpu_ops(threads=6)
        Layer(8).run(ops)
        del ops
    assert num_threads() <= before + 1


def test_the_instruction_sets_of_this_machine() -> None:
    library = find_library()
    assert library is not None
    names = instruction_sets(library)
    assert names[-1] == "portable" and len(set(names)) == len(names)
    cpuinfo = Path("/proc/cpuinfo")
    if os.uname().machine != "x86_64" or not cpuinfo.exists():
        return
    flags = set(cpuinfo.read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512vnni": {"avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"},
    }
    for name, wanted in needed.items():
        assert name not in names or wanted <= flags, f"{name} would end in SIGILL here"


def test_default_threads_are_cores() -> None:
    assert cpu_ops(threads=None).threads == num_cores() <= len(os.sched_getaffinity(0))
    assert cpu_ops(threads=1).threads == 1
