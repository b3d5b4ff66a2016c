"""The fused decode kernels of sm_90: which engines have them, and what their launches are given."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_configs import cuda_config

from puna.batch import ForwardBatch
from puna.checkpoint.dummy import parse_preset
from puna.cuda.attend_plan import NUM_WARPS, REGISTERS
from puna.cuda.driver import TensorMap
from puna.cuda.fused_ops import fused_ops
from puna.cuda.fused_plan import has_fused, num_stages, shared_bytes, weight_box
from puna.cuda.shapes import fused_shapes
from puna.cuda.source_table import cuda_sources
from puna.cuda.wide_plan import NUM_WARPS as WIDE_WARPS
from puna.cuda.wide_plan import cut, has_wide, variants
from puna.cuda_memory import cuda_specs, padded_rows
from puna.engine import EngineConfig
from puna.ops import LayerCache, Norm, RopeTable, Stream
from puna.spec import ModelSpec

KERNELS = ("qkv", "out", "gate_up", "down", "head")
PRESETS = ("llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3.2-1b", "llama-3.2-3b")
# The least that has them: eight chunks of columns everywhere.
SMALL = ModelSpec(2048, 2048, 2, 32, 8, 64, 1001, 512)


def test_which_engines_have_them() -> None:
    assert has_fused(cuda_config(SMALL)) and has_wide(cuda_config(SMALL))
    assert has_fused(cuda_config(SMALL, max_batch_size=1))
    assert not has_wide(cuda_config(SMALL, max_batch_size=1))
    for batch, tokens in ((2, (8,)), (9, (8, 16)), (64, (8, 16, 32, 64)), (128, (8, 16, 32, 64))):
        assert variants(cuda_config(SMALL, max_batch_size=batch)) == tokens
    assert not has_fused(cuda_config(SMALL, target="sm_80"))
    assert not has_wide(cuda_config(SMALL, target="sm_80"))
    for changed, is_wide in (
        (replace(SMALL, hidden_size=1792), True),
        (replace(SMALL, hidden_size=2016), False),
        (replace(SMALL, intermediate_size=2176), True),
        (replace(SMALL, num_heads=64, head_dim=32), False),
        (replace(SMALL, num_kv_heads=2), False),
        (replace(SMALL, num_heads=1, num_kv_heads=1), False),  # a chunk alone
        (parse_preset("smollm2-135m"), True),
    ):
        config = cuda_config(changed)
        assert (has_fused(config), has_wide(config)) == (False, is_wide), changed


@pytest.mark.parametrize("preset", PRESETS)
def test_one_block_of_threads_fits_on_a_multiprocessor(preset: str) -> None:
    """More than half of its 228 KB, of which each takes another KB; and no more than one may."""
    config = cuda_config(parse_preset(preset))
    assert has_fused(config)
    for kernel in KERNELS:
        num_bytes = shared_bytes(fused_shapes(config), kernel)
        assert 114 * 1024 < num_bytes + 1024 <= 228 * 1024, (kernel, num_bytes)
        assert num_stages(fused_shapes(config), kernel) >= 2


@pytest.mark.parametrize("preset", [*PRESETS, "llama-3-70b"])
def test_kernels_fit_beside_each_other(preset: str) -> None:
    """On a multiprocessor: attention and the products around it, gate_up and out. Shared memory,
    of which each block takes another KB, in pieces of 128 bytes; and of each of its quarters the
    registers, 512 a lane. Without room a kernel would begin late, and say nothing."""
    config = cuda_config(parse_preset(preset), max_batch_size=64)
    assert has_wide(config)
    sources = {source.name: source for source in cuda_sources(config)}
    kernels = {it.name: it for source in sources.values() for it in source.kernels}
    for tokens in variants(config):
        for names in (("attend", "qkv"), ("attend", "out"), ("out", "gate_up")):
            of_a_pair = [kernels.get(name) or kernels[f"{name}_{tokens}"] for name in names]
            assert sum(-(-it.shared // 128) * 128 + 1024 for it in of_a_pair) <= 228 * 1024, names
        beside = int(dict(sources[f"wide_{tokens}"].defines)["REGISTERS_BESIDE"])
        assert NUM_WARPS == 4 and WIDE_WARPS == 8, "one and two in each quarter"
        assert 2 * beside + REGISTERS <= 512


@pytest.mark.parametrize("preset", [*PRESETS, "llama-3-70b", "smollm2-135m"])
def test_cuts_of_products_of_several_tokens(preset: str) -> None:
    """All rows are in units, halves of a head in one, and CTAs of 132 have about as many rows."""
    config = cuda_config(parse_preset(preset))
    s, vocab = fused_shapes(config), config.spec.vocab_size
    pairs = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim // 2
    for kernel, rows in (
        ("qkv", pairs),
        ("out", s.hidden),
        ("gate_up", s.ffn),
        ("down", s.hidden),
        ("head", vocab),
    ):
        it = cut(s, vocab, kernel)
        units, parties = -(-rows // it.unit), 132 // it.cluster
        assert it.halves == (2 if kernel in ("qkv", "gate_up") else 1)
        assert it.half_rows <= 256 and it.half_rows % 8 == 0 and it.unit % 2 == 0
        assert kernel != "qkv" or s.head_dim // 2 % it.unit == 0
        busiest = -(-units // parties) * it.unit * parties
        assert busiest <= 1.4 * rows or rows < 64 * parties, (kernel, busiest, rows)


@pytest.mark.parametrize("preset", PRESETS)
def test_boxes_of_all_tiles_are_the_matrix(preset: str) -> None:
    """Each row once; and the rows of a tile are those that its finish takes for neighbours."""
    shapes = fused_shapes(cuda_config(parse_preset(preset)))
    all_rows = shapes.q_size + 2 * shapes.num_kv_heads * shapes.head_dim
    half = shapes.head_dim // 2
    for kernel, num_rows, apart in (
        ("qkv", all_rows, half),
        ("gate_up", 2 * shapes.ffn, shapes.ffn),
        ("out", shapes.hidden, 8),
        ("down", shapes.hidden, 8),
    ):
        dims, box = weight_box(shapes, kernel, num_rows)
        assert dims[0] == shapes.num_cols(kernel) and dims[1] * dims[2] == num_rows
        assert dims[0] % box[0] == dims[1] % box[1] == dims[2] % box[2] == 0
        seen = np.zeros(num_rows, int)
        for z in range(0, dims[2], box[2]):
            for y in range(0, dims[1], box[1]):
                rows = [(z + j) * dims[1] + y + i for j in range(box[2]) for i in range(box[1])]
                seen[rows] += 1
                assert len(rows) == 16
                assert all(b - a == apart for a, b in zip(rows[:8], rows[8:], strict=True))
        assert (seen == 1).all(), kernel


class Launches:
    """A library and a driver that keep what they are given."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, int, int], tuple[Any, ...], bool]] = []
        self.maps: list[tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = []

    def launch(self, name: str, grid: Any, arguments: tuple[Any, ...], overlaps: bool) -> None:
        self.launched.append((name, grid, arguments, overlaps))

    def tensor_map(self, address: int, dims: Any, box: Any, **more: Any) -> Any:
        self.maps.append((address, dims, box, more))
        return TensorMap((ctypes.c_char * 1)(), address)


def record(
    config: EngineConfig, num_tokens: int, launches: Any, num_layers: int = 1
) -> dict[str, Any]:
    """A step of some layers, all of one's weights, and head; the arrays that it was given."""
    spec, dtype = config.spec, {"float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]
    kinds = {np.dtype(np.float32): torch.float32, np.dtype(np.int32): torch.int32}
    specs = cuda_specs(config, 0)
    arrays = {k: torch.zeros(v, dtype=kinds.get(d, dtype)) for k, (d, v) in specs.items()}
    arrays["rope_cos_PE"] = arrays["rope_sin_PE"] = torch.zeros(8, spec.head_dim // 2)
    all_ops = fused_ops(config, launches, launches, arrays, 133)
    fused = next(ops for most, ops in all_ops if num_tokens <= most)
    x = Stream(torch.zeros(num_tokens, spec.hidden_size), torch.zeros(0))
    norm = Norm(torch.ones(spec.hidden_size), 1e-5)
    rope = RopeTable(arrays["rope_cos_PE"], arrays["rope_sin_PE"])
    ints = torch.zeros(num_tokens, dtype=torch.int32)
    table = torch.zeros(num_tokens, 9, dtype=torch.int32)
    batch = ForwardBatch(ints, ints, ints, torch.zeros(1), ints, table, ints, is_decode=True)
    keys, values = torch.zeros(2, 5, spec.num_kv_heads, 64, spec.head_dim, dtype=dtype)

    def matrix(rows: int, cols: int) -> Any:
        return torch.zeros(padded_rows(rows), cols, dtype=dtype)

    qkv = matrix(spec.q_size + 2 * spec.kv_size, spec.hidden_size)
    o, head = matrix(spec.hidden_size, spec.q_size), matrix(spec.vocab_size, spec.hidden_size)
    gate_up = matrix(2 * spec.intermediate_size, spec.hidden_size)
    down = matrix(spec.hidden_size, spec.intermediate_size)
    act = arrays["act_TF"][:num_tokens]
    logits = torch.zeros(num_tokens, spec.vocab_size)
    q = arrays["q_TQ"][:num_tokens]
    for _ in range(num_layers):
        fused.qkv(x, norm, qkv, None, rope, batch, LayerCache(keys, values), q)
        fused.attention(q, batch, LayerCache(keys, values), o, None, x)
        fused.gate_up(x, norm, gate_up, None, act)
        fused.down(act, down, None, x)
    fused.head(x, ints, norm, head, logits)
    fused.sample_greedy(ints, arrays["last_tokens_R"], ints)
    fused.finish()
    return {**arrays, "qkv": qkv, "keys": keys, "table": table, "logits": logits}


@pytest.mark.parametrize(
    ("num_tokens", "variant"), [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64)]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_launches_fit_the_kernels(num_tokens: int, variant: int, dtype: Any) -> None:
    config, launches = cuda_config(SMALL, dtype, max_batch_size=64), Launches()
    record(config, num_tokens, launches)
    table = {kernel.name: kernel for source in cuda_sources(config) for kernel in source.kernels}
    names = [name for name, *_ in launches.launched]
    *layer, head = KERNELS
    if num_tokens > 1:
        layer, head = ["enter", "qkv", "attend", *layer[1:], "enter"], head
    found = [f"{name}_{variant}" for name in (*layer, head, "pick")]
    assert names == ["attend" if name.startswith("attend") else name for name in found]
    num_ctas = 133 if num_tokens == 1 else 132  # pairs of them share tiles
    sizes = {"*fp16": 2, "*bf16": 2, "*fp32": 4, "*i32": 4}
    for name, grid, arguments, overlaps in launches.launched:
        is_by_row = name.startswith(("pick", "enter"))
        of_all = 133 if name == "attend" else num_ctas
        assert overlaps and grid == (num_tokens if is_by_row else of_all, 1, 1)
        for value, (argument, kind) in zip(arguments, table[name].arguments, strict=True):
            if kind == "map":
                assert isinstance(value, TensorMap), (name, argument)
            elif isinstance(value, int):
                assert kind == "i32" or (argument, value) in (("gamma", 0), ("rows", 0)), name
            else:
                assert value.element_size() == sizes[kind], (name, argument)
                assert value.is_floating_point() == (kind != "*i32"), (name, argument)


def test_arguments_are_where_the_kernel_looks() -> None:
    config, launches = cuda_config(SMALL), Launches()
    arrays = record(config, 3, launches)
    kernels = {kernel.name: kernel for source in cuda_sources(config) for kernel in source.kernels}
    given: dict[str, Any] = {}
    for name in ("qkv_8", "attend"):
        (arguments,) = (it[2] for it in launches.launched if it[0] == name)
        names = (argument for argument, _ in kernels[name].arguments)
        given |= dict(zip(names, arguments, strict=True))
    assert given["w"].address == arrays["qkv"].data_ptr()
    assert given["x"].address == arrays["fused_next"].data_ptr()
    assert given["block_table"] is arrays["table"] and given["table_stride"] == 9
    assert given["q"].data_ptr() == arrays["q_TQ"].data_ptr()
    assert given["attended"].data_ptr() == arrays["attended_TQ"].data_ptr()
    assert given["num_tokens"] == given["num_seqs"] == 3
    blocks = 5 * SMALL.num_kv_heads
    address = arrays["keys"].data_ptr()
    assert given["key_map"].address == given["eight_keys"].address == address
    of_keys = [it[1:] for it in launches.maps if it[0] == address]
    assert [box for _, box, _ in of_keys] == [(64, 8, 1, eights, 1) for eights in (4, 1)]
    for dims, _, more in of_keys:
        assert dims == (SMALL.head_dim, 8, 1, 64 // 8, blocks) and more["is_swizzled"]
        assert more["strides"] == tuple(SMALL.head_dim * rows for rows in (1, 1, 8, 64))
    found = {it[0]: it[1:] for it in launches.maps}
    # A head's halves, eight rows of either in turn.
    dims, box, more = found[arrays["qkv"].data_ptr()]
    assert dims == (2048, 8, 2, 4, 48) and box[:3] == (64, 8, 2) and box[4] == 1
    assert more["strides"] == tuple(2048 * rows for rows in (1, 32, 8, 64))
    # Tokens beyond those there are: zeros.
    assert found[arrays["fused_next"].data_ptr()][:2] == ((2048, 3, 1), (64, 8, 1))


def test_layers_of_a_step_have_different_tags() -> None:
    config, launches = cuda_config(SMALL), Launches()
    record(config, 1, launches, num_layers=80)
    kernels = {kernel.name: kernel for source in cuda_sources(config) for kernel in source.kernels}
    at = [name for name, _ in kernels["qkv_1"].arguments].index("layer")
    layers = [arguments[at] for name, _, arguments, _ in launches.launched if name == "qkv_1"]
    assert len(set(layers)) == 80 and all(0 <= layer < 1024 for layer in layers)


def test_norms_of_several_tokens() -> None:
    """Whoever writes the residual also writes the next product's input, for the norm in front of
    it; before the first product and before the head, which picks rows, `enter` does."""
    config, launches = cuda_config(SMALL), Launches()
    arrays = record(config, 3, launches, num_layers=2)
    kernels = {kernel.name: kernel for source in cuda_sources(config) for kernel in source.kernels}
    said: list[tuple[str, Any]] = []
    for name, _, arguments, _ in launches.launched:
        names = [argument for argument, _ in kernels[name].arguments]
        given = dict(zip(names, arguments, strict=True))
        kernel = name.removesuffix("_8")
        if "is_finished" in given:
            said.append((kernel, given["is_finished"]))
            assert given["x"].address == arrays["fused_next"].data_ptr()
            assert given["sums"] is arrays["fused_sums"]
        elif "next" in given:
            said.append((kernel, isinstance(given["gamma"], torch.Tensor)))
            assert given["next"] is arrays["fused_next"]
    layer = [("out", True), ("gate_up", 0)]
    assert said == [
        ("enter", True),
        ("qkv", 1),
        *layer,
        ("down", True),
        ("qkv", 0),
        *layer,
        ("down", False),
        ("enter", True),
    ]
