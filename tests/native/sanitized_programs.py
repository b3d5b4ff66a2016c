"""What `test_sanitized.py` runs in processes of their own: `use(library)` first, then one of these.

Every array is an allocation of its own and exactly as large as declared, so that AddressSanitizer
sees the first byte beyond it.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
IDLE_SECONDS = 0.02  # well beyond what an idle thread of the pool lingers before it parks
SHAPES = [(1, 1), (1, 32), (2, 3), (15, 31), (16, 32), (17, 33), (33, 101), (5, 1027), (48, 7)]


def use(path: str) -> None:
    """Let all of puna, and the tests of the operations, take the library at `path`."""
    import puna.native.library as native

    library = native.find_library(Path(path))
    assert library is not None, native.why_missing(Path(path))
    native.find_library = lambda _=None: library
    sys.path += [str(ROOT / "tests" / "ops")]


def cpu_ops(layer, instruction_set: str, threads: int):
    """The cpu device with scratch for this layer's step and nothing beyond; it starts as NaN."""
    from puna.cpu.ops import CpuOps
    from puna.memory import cpu_scratch_specs
    from puna.native.library import find_library

    batch, cache = layer.batch, layer.step.cache
    specs = cpu_scratch_specs(
        num_tokens=batch.num_tokens,
        num_seqs=batch.num_seqs,
        max_seq_len=int(batch.seq_lens_S.max()),
        num_inputs=max(layer.hidden, layer.q_size, layer.ffn),
        num_heads=layer.num_heads,
        num_kv_heads=cache.values_NKPE.shape[1],
        head_dim=layer.head_dim,
    )
    scratch = {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}
    for array in scratch.values():
        array.view(np.uint8)[...] = 255
    library = find_library()
    assert library is not None
    return CpuOps(library, scratch, threads, instruction_set)


def steps(instruction_set: str, first_seed: int, num_seeds: int) -> None:
    """Random steps, with one to three threads by turns, over every format and KV cache dtype."""
    from test_cpu import FORMATS, Layer

    met = set()
    for seed in range(first_seed, first_seed + num_seeds):
        layer = Layer(seed)
        found = layer.run(cpu_ops(layer, instruction_set, 1 + seed % 3))
        assert all(np.isfinite(array).all() for array in found[:5]), seed
        met |= {layer.name, f"cache {layer.dtype}"}
    assert len(met) == len(FORMATS) + 4, sorted(met)


def packing() -> None:
    """Dense, quantised and repacked matrices of odd sizes, and the check that they are whole."""
    from puna.layout import array_specs, pack_dense, pack_quantised
    from puna.native.packing import find_packer
    from puna.quant import DTYPES, Format, QuantTensor, quantize

    assert find_packer() is not None
    rng = np.random.default_rng(0)
    for num_rows, num_cols in SHAPES:
        x_NK = rng.standard_normal((num_rows, num_cols)).astype(np.float32)
        x_NK[0, -1] = 0
        for dtype in DTYPES:
            arrays = pack_dense("tiles", x_NK.astype(DTYPES[dtype]))
            _check_specs(arrays, array_specs("tiles", Format.dense(dtype), num_rows, num_cols))
        for name in ("int8", "int8-g16", "int8-g48", "int8-g32-f32", "int4-g32", "int4-g128"):
            fmt = Format.parse(name)
            arrays = pack_quantised("tiles", quantize(x_NK, fmt))
            _check_specs(arrays, array_specs("tiles", fmt, num_rows, num_cols))
        for name in ("int8-g32-min", "int4-g32-min", "int4-g16-min-f32"):
            fmt = Format.parse(name)
            groups = (2, num_rows, fmt.num_groups(num_cols))
            scales = rng.standard_normal(groups).astype(DTYPES[fmt.scale_dtype])
            q_NK = rng.integers(0, fmt.q_range[1] + 1, (num_rows, num_cols)).astype(np.uint8)
            arrays = pack_quantised(
                "tiles", QuantTensor(fmt, q_NK, scales[0].copy(), scales[1].copy())
            )
            _check_specs(arrays, array_specs("tiles", fmt, num_rows, num_cols))


def _check_specs(arrays, specs) -> None:
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == specs


def bandwidth() -> None:
    """A few pages, and sizes that neither threads nor vectors divide."""
    from puna.native.bandwidth import read_bandwidth

    for threads in (1, 2, 3):
        for num_bytes in (3 * 4096, 100_001, 1_000_000):
            assert read_bandwidth(threads, num_bytes) > 0


def programs_of_one_pool(threads: int, first_seed: int) -> None:
    """Programs after each other, at once and after pauses in which the threads park."""
    from backends import cpu_ops as roomy_ops
    from paged import cache_arrays
    from test_cpu import Layer, same_bits

    layers = [Layer(seed) for seed in range(first_seed, first_seed + 4)]
    ops = roomy_ops(threads=threads)
    recorded = [layer.record(ops) for layer in layers]
    expected: dict[int, list] = {}
    for turn in range(6):
        for i, (layer, ((program,), outputs)) in enumerate(zip(layers, recorded, strict=True)):
            for array, before in zip(cache_arrays(layer.step.cache), layer.before, strict=True):
                array[:] = before
            outputs[0][:], outputs[1][:] = layer.start
            program.run()
            if i not in expected:
                expected[i] = [array.copy() for array in outputs]
            assert same_bits(outputs, expected[i]), (turn, i)
            if (turn + i) % 3 == 0:
                time.sleep(IDLE_SECONDS)


def pools_that_come_and_go(threads: int) -> None:
    """Pools that end at once, before they park, after they parked, and while others live."""
    from test_cpu import Layer

    layer = Layer(3)
    cpu_ops(layer, "portable", threads)  # ThreadSanitizer has a thread of its own from now on
    before = _num_threads()
    for turn in range(24):
        ops = cpu_ops(layer, "portable", threads)
        other = cpu_ops(layer, "portable", threads) if turn % 4 == 1 else None
        assert _num_threads() > before
        if turn % 3:
            layer.run(ops)
        if turn % 2:
            time.sleep(IDLE_SECONDS)
        if other is not None:
            layer.run(other)
            layer.run(ops)
        del ops, other
        gc.collect()
        deadline = time.monotonic() + 1  # the system lists a thread for a moment after its end
        while _num_threads() != before:
            assert time.monotonic() < deadline, "threads are left"


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
