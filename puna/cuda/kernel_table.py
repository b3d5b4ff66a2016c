"""Which kernels in Triton an engine has, with their constants: what build and tests read. Those in
CUDA C++, which some targets have, are listed in `puna.cuda.source_table`.

Pure, from `EngineConfig`: it names functions of `puna.cuda.kernels` and knows neither Triton nor a
GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from puna.cuda.gemm_shapes import early_columns, gemm_shape, overlaps, stretch
from puna.cuda_memory import (
    ARGMAX_CHUNK,
    MAX_PARTS,
    PART_ROWS,
    padded_cols,
    padded_rows,
    product_splits,
)
from puna.engine import EngineConfig
from puna.weights import extent

Constant = int | float | str | bool

KERNELS_FILE = "kernels.json"  # in an engine's kernels/: all that a launch must know

GEMM_TILES = (16, 32, 64)  # tokens a program
# Attention of a decode batch: a part of a context has at least so many blocks.
MIN_PART_BLOCKS = 4
ROPE_HEADS = 16
ROW_BLOCK = 1024


@dataclass(frozen=True)
class TritonKernel:
    """`arguments` are (name, type) in order, as Triton writes types; all else is constant."""

    name: str
    module: str  # of puna.cuda.kernels
    function: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _Shapes:
    """Sizes of rank 0, which is the only one yet."""

    d: int
    h: int
    k: int
    e: int
    f: int
    v: int
    vocab_size: int
    seqs: int
    p: int
    qkv_splits: int
    splits: int  # of o and down

    @property
    def q(self) -> int:
        return self.h * self.e

    @property
    def kv(self) -> int:
        return self.k * self.e

    @property
    def k_at(self) -> int:
        return padded_rows(self.q)

    @property
    def v_at(self) -> int:
        return self.k_at + padded_rows(self.kv)

    @property
    def qkv(self) -> int:
        return self.v_at + padded_rows(self.kv)


def power_of_two(n: int) -> int:
    """The least one from n on."""
    return 1 << (n - 1).bit_length()


def triton_kernels(config: EngineConfig) -> tuple[TritonKernel, ...]:
    """Every Triton kernel of an engine."""
    shapes, dtype = _shapes(config), {"float16": "*fp16", "bfloat16": "*bf16"}[config.dtype]
    spec, target = config.spec, config.target
    biases = spec.attention_bias, spec.mlp_bias
    qkv = [_Product("", dtype), _Product("_parts", "*fp32", shapes.qkv_splits)]
    kernels = (
        *_row_kernels(shapes, dtype, qkv, spec.rms_norm_eps, *biases),
        *_gemms(shapes, dtype, target, *biases),
        _prefill(shapes, dtype, target),
        *_decode(shapes, dtype, target, qkv, spec.attention_bias),
        *_argmax(shapes),
    )
    flag = ("OVERLAPS", overlaps(target))
    return tuple(replace(kernel, constants=(*kernel.constants, flag)) for kernel in kernels)


def _shapes(config: EngineConfig) -> _Shapes:
    spec, mapping = config.spec, config.mapping(0)
    ffn = extent("ffn", spec.intermediate_size, spec, mapping, config.ffn_multiple).size
    qkv_splits, splits = product_splits(config)
    return _Shapes(
        d=spec.hidden_size,
        h=extent("heads", spec.q_size, spec, mapping).size // spec.head_dim,
        k=extent("kv_heads", spec.kv_size, spec, mapping).size // spec.head_dim,
        e=spec.head_dim,
        f=ffn,
        v=extent("vocab", spec.vocab_size, spec, mapping, config.vocab_multiple).size,
        vocab_size=spec.vocab_size,
        seqs=config.limits.max_batch_size,
        p=config.limits.block_size,
        qkv_splits=qkv_splits,
        splits=splits,
    )


@dataclass(frozen=True)
class _Product:
    """How a kernel reads a product: of `kind`, whole or in `splits` parts. `suffix`: of the
    kernel's name."""

    suffix: str
    kind: str
    splits: int = 1

    @property
    def constants(self) -> tuple[tuple[str, Constant], ...]:
        return ("SPLITS", self.splits), ("PART_ROWS", PART_ROWS)


def _row_kernels(
    s: _Shapes,
    dtype: str,
    qkv: list[_Product],
    eps: float,
    attention_bias: bool,
    mlp_bias: bool,
) -> list[TritonKernel]:
    # What of a stream is beside its residual: nothing, `partial`, or the parts of a product.
    beside = [_Product("", dtype), _Product("_partial", dtype)]
    beside.append(_Product("_parts", "*fp32", s.splits))
    kernels = _stream_kernels(s, dtype, beside, eps)
    rotated = (("H", s.h), ("K", s.k), ("E", s.e), ("P", s.p), ("XS", s.qkv))
    rotated += (("K_AT", s.k_at), ("V_AT", s.v_at), ("HAS_BIAS", attention_bias))
    rotated += (("CLIP", dtype == "*fp16"), ("HEADS", ROPE_HEADS))
    rotated += (("HALF", power_of_two(s.e // 2)),)
    for it in qkv:
        rope = (("qkv_TX", it.kind), ("bias_N", "*fp32"), ("cos_PE", "*fp32"), ("sin_PE", "*fp32"))
        rope += (("positions_T", "*i32"), ("slots_T", "*i32"), ("q_TQ", dtype))
        rope += (("keys_NKPE", dtype), ("values_NKPE", dtype))
        constants, name = (*rotated, *it.constants), f"rope_append{it.suffix}"
        kernels.append(TritonKernel(name, "rows", "rope_append", rope, constants, 4, 1))
    up_at = padded_rows(s.f)
    activated = (("F", s.f), ("XS", 2 * up_at), ("UP_AT", up_at), ("HAS_BIAS", mlp_bias))
    activated += (("BLOCK", ROW_BLOCK),)
    silu = (("gate_up_TX", dtype), ("bias_N", "*fp32"), ("act_TF", dtype))
    kernels.append(TritonKernel("silu_mul", "rows", "silu_mul", silu, activated, 4, 1))
    if attention_bias or mlp_bias:
        bias = (("y_TN", dtype), ("bias_N", "*fp32"))
        constants = (("N", s.d), ("BLOCK", ROW_BLOCK))
        kernels.append(TritonKernel("add_bias", "rows", "add_bias", bias, constants, 4, 1))
    return kernels


def _stream_kernels(
    s: _Shapes, dtype: str, beside: list[_Product], eps: float
) -> list[TritonKernel]:
    """Those that write and read the residual and what is beside it."""
    block = power_of_two(s.d)
    warps = min(max(block // 512, 1), 8)
    table = (("V", s.vocab_size), ("D", s.d), ("KP", padded_cols(s.d)), ("BLOCK", block))
    kernels: list[TritonKernel] = []
    for it in beside:
        is_beside = bool(it.suffix)
        embed = (("ids_T", "*i32"), ("last_tokens_R", "*i32"), ("table_VD", dtype))
        embed += (("residual_TD", "*fp32"), ("partial_TD", it.kind))
        constants = (*table, ("CLEARS", is_beside), *it.constants)
        name = f"embed{it.suffix}"
        kernels.append(TritonKernel(name, "rows", "embed", embed, constants, warps, 1))
        norm = (("residual_TD", "*fp32"), ("partial_TD", it.kind), ("weight_D", "*fp32"))
        norm += (("out_TD", dtype), ("rows_L", "*i32"))
        for pick in ("", "_pick"):
            constants = (("D", s.d), ("EPS", eps), ("BLOCK", block))
            constants += (("ADD_PARTIAL", is_beside), ("PICK_ROWS", bool(pick)), *it.constants)
            name = f"norm{it.suffix}{pick}"
            kernels.append(TritonKernel(name, "rows", "norm", norm, constants, warps, 1))
    return kernels


def _gemms(
    s: _Shapes, dtype: str, target: str, attention_bias: bool, mlp_bias: bool
) -> list[TritonKernel]:
    kernels = []
    for role, num_rows, num_cols, row_stride, epilogue, has_bias, splits in (
        ("qkv", s.qkv, s.d, s.qkv, "store", False, s.qkv_splits),
        ("o", s.d, s.q, s.d, "add", attention_bias, s.splits),
        ("gate_up", s.f, s.d, s.f, "silu", mlp_bias, 1),
        ("down", s.d, s.f, s.d, "add", mlp_bias, s.splits),
        ("head", s.v, s.d, s.v, "store", False, 1),
    ):
        cols = padded_cols(num_cols)
        early = early_columns(target, cols, splits)
        shapes = {
            tile: gemm_shape(target, num_rows, cols, epilogue, tile, splits) for tile in GEMM_TILES
        }
        ways = [(f"gemm_{role}_{tile}", epilogue, shape) for tile, shape in shapes.items()]
        if splits > 1:
            ways = [(name, "parts", shape) for name, _, shape in ways]
            ways.append((f"gemm_{role}_whole", epilogue, shapes[GEMM_TILES[-1]]))
        for (name, way, shape), tile in zip(ways, (*GEMM_TILES, GEMM_TILES[-1]), strict=False):
            is_float32 = way in ("add", "parts") or role == "head"
            arguments = (("x_MK", dtype), ("w_NK", dtype), ("bias_N", "*fp32"))
            arguments += (("y_MN", "*fp32" if is_float32 else dtype), ("M", "i32"))
            constants = (("N", num_rows), ("K", num_cols), ("KP", cols), ("YS", row_stride))
            constants += (("UP_AT", padded_rows(s.f)), ("EPILOGUE", way), ("HAS_BIAS", has_bias))
            constants += (("BLOCK_M", tile), ("BLOCK_N", shape.block_n))
            constants += (("BLOCK_K", shape.block_k), ("EARLY", -(-early // shape.block_k)))
            constants += (("SPLITS", splits), ("STRETCH", stretch(cols, splits)))
            constants += (("PART_ROWS", PART_ROWS),)
            stages, warps = shape.num_stages, shape.num_warps
            kernels.append(TritonKernel(name, "gemm", "gemm", arguments, constants, warps, stages))
    return kernels


def _prefill(s: _Shapes, dtype: str, target: str) -> TritonKernel:
    e_pow = max(power_of_two(s.e), 16)
    j_pow = power_of_two(s.h // s.k)
    # 64 rows, two programs on a multiprocessor: 94 us against 97 for 2,048 tokens of the 7B, 6.4
    # against 7.6 for 128 (H200, 2026-11-26).
    has_large_tiles = e_pow <= 128 and _has_room(target) and target != "sm_90"
    rows = max(128 if has_large_tiles else 64, j_pow)
    arguments = (("q_TQ", dtype), ("keys_NKPE", dtype), ("values_NKPE", dtype))
    arguments += (("block_table_SM", "*i32"), ("query_start_S1", "*i32"), ("seq_lens_S", "*i32"))
    arguments += (("out_TQ", dtype), ("num_seqs", "i32"), ("max_blocks", "i32"))
    constants = (("H", s.h), ("K", s.k), ("E", s.e), ("EP", e_pow), ("P", s.p))
    constants += (("JP", j_pow), ("TOKENS", rows // j_pow))
    constants += (("SEQS", power_of_two(s.seqs)), ("SCALE", _softmax_scale(s)))
    stages, warps = _kv_stages(s, target), 8 if rows == 128 else 4
    return TritonKernel("prefill", "prefill", "prefill", arguments, constants, warps, stages)


def _decode(
    s: _Shapes, dtype: str, target: str, qkv: list[_Product], has_bias: bool
) -> list[TritonKernel]:
    """Attention of a decode batch, for each way of the product of q, k and v."""
    half = max(power_of_two(s.e // 2), 16)
    parts = (("PARTS", MAX_PARTS), ("MIN_BLOCKS", MIN_PART_BLOCKS))
    scratch = (("part_SBHE", "*fp32"), ("scale_SBH2", "*fp32"), ("out_SQ", dtype))
    common = (("H", s.h), ("K", s.k), ("E", s.e), ("HALF", half), ("P", s.p))
    common += (("ROWS", max(16, power_of_two(s.h // s.k))), ("XS", s.qkv))
    common += (("K_AT", s.k_at), ("V_AT", s.v_at), ("HAS_BIAS", has_bias))
    common += (("CLIP", dtype == "*fp16"), *parts, ("SCALE", _softmax_scale(s)))
    kernels = []
    for it in qkv:
        decode = (("qkv_SX", it.kind), ("bias_N", "*fp32"), ("cos_PE", "*fp32"))
        decode += (("sin_PE", "*fp32"), ("positions_S", "*i32"), ("slots_S", "*i32"))
        decode += (("keys_NKPE", dtype), ("values_NKPE", dtype), ("block_table_SM", "*i32"))
        decode += (("seq_lens_S", "*i32"), *scratch, ("max_blocks", "i32"))
        name, stages, constants = f"decode{it.suffix}", _kv_stages(s, target), it.constants
        constants = (*common, *constants)
        kernels.append(TritonKernel(name, "decode", "decode", decode, constants, 4, stages))
    combine = (("seq_lens_S", "*i32"), *scratch)
    constants = (("H", s.h), ("E", s.e), ("EP", max(power_of_two(s.e), 16)), ("P", s.p), *parts)
    kernels.append(TritonKernel("combine", "decode", "combine", combine, constants, 1, 1))
    return kernels


def _has_room(target: str) -> bool:
    """Over 160 KB of shared memory a program."""
    return target in ("sm_80", "sm_90", "sm_100")


def _kv_stages(s: _Shapes, target: str) -> int:
    """Blocks of keys and values that a program of attention has under way."""
    return (3 if _has_room(target) else 2) if s.e <= 128 else 1


def _softmax_scale(s: _Shapes) -> float:
    """Of powers of two."""
    return s.e**-0.5 * math.log2(math.e)


def _argmax(s: _Shapes) -> list[TritonKernel]:
    num_chunks = -(-s.v // ARGMAX_CHUNK)
    chunks = (("logits_LV", "*fp32"), ("value_LC", "*fp32"), ("index_LC", "*i32"))
    rows = (("value_LC", "*fp32"), ("index_LC", "*i32"), ("rows_L", "*i32"))
    rows += (("last_tokens_R", "*i32"), ("out_tokens_L", "*i32"))
    vocab = (("VS", s.v), ("V", s.vocab_size), ("BLOCK", ARGMAX_CHUNK))
    last = (("C", num_chunks), ("V", s.vocab_size), ("BLOCK", power_of_two(num_chunks)))
    return [
        TritonKernel("argmax_chunks", "argmax", "argmax_chunks", chunks, vocab, 4, 1),
        TritonKernel("argmax_rows", "argmax", "argmax_rows", rows, last, 1, 1),
    ]
