"""Which kernels an engine has, with their constants: the one list that build and tests read.

Pure, from `EngineConfig`: it names functions of `puna.cuda.kernels` and knows neither Triton nor a
GPU. Kernels of a target of its own (CUDA C++) are listed in `cuda_sources`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from puna.cuda.fused_plan import fused_defines, fused_rows, fused_shapes, shared_bytes
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
class CudaKernel:
    """A kernel of a CUDA C++ source, whose function is `entry`; `arguments` are the types of its
    parameters as in `TritonKernel`, "map" a tensor map."""

    name: str
    entry: str
    arguments: tuple[tuple[str, str], ...]
    num_warps: int
    shared: int  # dynamic shared memory, bytes
    overlaps: bool  # waits for the kernels before it by itself


@dataclass(frozen=True)
class CudaSource:
    """A CUDA C++ source in puna/cuda/csrc, compiled with `defines` to one cubin, `name`."""

    name: str
    source: str
    defines: tuple[tuple[str, Constant], ...]
    kernels: tuple[CudaKernel, ...]


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
    kernels = (
        *_row_kernels(shapes, dtype, spec.rms_norm_eps, spec.attention_bias, spec.mlp_bias),
        *_gemms(shapes, dtype, target, spec.attention_bias, spec.mlp_bias),
        *_attention(shapes, dtype, target),
        *_argmax(shapes),
    )
    flag = ("OVERLAPS", overlaps(target))
    return tuple(replace(kernel, constants=(*kernel.constants, flag)) for kernel in kernels)


def cuda_sources(config: EngineConfig) -> tuple[CudaSource, ...]:
    """CUDA C++ sources of the engine's target."""
    return (_BANDWIDTH, *(_fused_source(config, rows) for rows in fused_rows(config)))


_BANDWIDTH = CudaSource(
    "bandwidth",
    "bandwidth.cu",
    (),
    (
        CudaKernel(
            "read_only",
            "read_only",
            (("data", "*i32"), ("num_pieces", "i64"), ("sum", "*i32")),
            num_warps=16,
            shared=0,
            overlaps=False,
        ),
    ),
)


def _fused_source(config: EngineConfig, rows: int) -> CudaSource:
    dtype = {"float16": "*fp16", "bfloat16": "*bf16"}[config.dtype]
    shapes = fused_shapes(config)
    few = {1: _one_token, 8: _few_tokens, 16: _few_tokens}[rows](dtype)
    kernels = [
        CudaKernel(f"{name}_{rows}", name, arguments, 8, shared_bytes(shapes, name, rows), True)
        for name, arguments in few.items()
    ]
    if rows > 1:
        enter = (("h", "*fp32"), ("gamma", "*fp32"), ("rows", "*i32"), ("next", dtype))
        kernels.append(CudaKernel(f"enter_{rows}", "enter", enter, 8, 8 * 4, True))
    pick = (("best", "*fp32"), *_integers("rows", "last", "tokens", "error"), ("num_ctas", "i32"))
    kernels.append(CudaKernel(f"pick_{rows}", "pick", pick, 1, 0, True))
    source = "decode_sm90.cu" if rows == 1 else "few_sm90.cu"
    defines = tuple(fused_defines(config, rows).items())
    return CudaSource(f"decode_{rows}", source, defines, tuple(kernels))


_WEIGHT = (("w", "map"), ("bias", "*fp32"))
_COUNT = (("num_rows", "i32"),)
_LAYER = (("layer", "i32"),)


def _integers(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "*i32") for name in names)


def _attention_arguments(dtype: str) -> tuple[tuple[str, str], ...]:
    """Those of qkv behind its input."""
    return (
        ("cos", "*fp32"),
        ("sin", "*fp32"),
        *_integers("positions", "slots", "seq_lens", "block_table"),
        ("keys", dtype),
        ("values", dtype),
        ("key_map", "map"),
        ("value_map", "map"),
        ("attended", dtype),
        ("part", "*fp32"),
        *_integers("fresh", "epoch", "split_count", "error"),
        ("table_stride", "i32"),
    )


def _one_token(dtype: str) -> dict[str, tuple[tuple[str, str], ...]]:
    residual = (("h", "*fp32"),)
    norm, add = (*residual, ("gamma", "*fp32")), (*_WEIGHT, ("x", dtype), *residual)
    return {
        "qkv": (*_WEIGHT, *norm, *_attention_arguments(dtype), *_LAYER),
        "out": add,
        "gate_up": (*_WEIGHT, *norm, ("y", dtype)),
        "down": add,
        "head": (
            ("w", "map"),
            *norm,
            ("rows", "*i32"),
            ("logits", "*fp32"),
            ("best", "*fp32"),
            ("epoch", "*i32"),
        ),
    }


def _few_tokens(dtype: str) -> dict[str, tuple[tuple[str, str], ...]]:
    x, add = (*_WEIGHT, ("x", dtype)), (("h", "*fp32"), ("gamma", "*fp32"), ("next", dtype))
    normed = (*x, ("sums", "*fp32"), ("is_finished", "i32"))
    adds = (*x, *add, ("new_sums", "*fp32"), *_COUNT)
    return {
        "qkv": (*normed, *_attention_arguments(dtype), *_COUNT, *_LAYER),
        "out": adds,
        "gate_up": (*normed, ("y", dtype), *_COUNT),
        "down": adds,
        "head": (
            ("w", "map"),
            ("x", dtype),
            ("logits", "*fp32"),
            ("best", "*fp32"),
            ("epoch", "*i32"),
            *_COUNT,
        ),
    }


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


def _row_kernels(
    s: _Shapes, dtype: str, eps: float, attention_bias: bool, mlp_bias: bool
) -> list[TritonKernel]:
    block = power_of_two(s.d)
    warps = min(max(block // 512, 1), 8)
    table = (("V", s.vocab_size), ("D", s.d), ("KP", padded_cols(s.d)), ("BLOCK", block))
    kernels = []
    # What of a stream is beside its residual: nothing, `partial`, or the parts of a product.
    for beside, kind, splits in (
        ("", dtype, 1),
        ("_partial", dtype, 1),
        ("_parts", "*fp32", s.splits),
    ):
        parts = (("SPLITS", splits), ("PART_ROWS", PART_ROWS))
        embed = (("ids_T", "*i32"), ("last_tokens_R", "*i32"), ("table_VD", dtype))
        embed += (("residual_TD", "*fp32"), ("partial_TD", kind))
        constants = (*table, ("CLEARS", bool(beside)), *parts)
        kernels.append(TritonKernel(f"embed{beside}", "rows", "embed", embed, constants, warps, 1))
        norm = (("residual_TD", "*fp32"), ("partial_TD", kind), ("weight_D", "*fp32"))
        norm += (("out_TD", dtype), ("rows_L", "*i32"))
        for pick in ("", "_pick"):
            constants = (("D", s.d), ("EPS", eps), ("BLOCK", block))
            constants += (("ADD_PARTIAL", bool(beside)), ("PICK_ROWS", bool(pick)), *parts)
            name = f"norm{beside}{pick}"
            kernels.append(TritonKernel(name, "rows", "norm", norm, constants, warps, 1))
    rotated = (("H", s.h), ("K", s.k), ("E", s.e), ("P", s.p), ("XS", s.qkv))
    rotated += (("K_AT", s.k_at), ("V_AT", s.v_at), ("HAS_BIAS", attention_bias))
    rotated += (("CLIP", dtype == "*fp16"), ("HEADS", ROPE_HEADS))
    rotated += (("HALF", power_of_two(s.e // 2)),)
    for name, kind, splits in (
        ("rope_append", dtype, 1),
        ("rope_append_parts", "*fp32", s.qkv_splits),
    ):
        rope = (("qkv_TX", kind), ("bias_N", "*fp32"), ("cos_PE", "*fp32"), ("sin_PE", "*fp32"))
        rope += (("positions_T", "*i32"), ("slots_T", "*i32"), ("q_TQ", dtype))
        rope += (("keys_NKPE", dtype), ("values_NKPE", dtype))
        constants = (*rotated, ("SPLITS", splits), ("PART_ROWS", PART_ROWS))
        kernels.append(TritonKernel(name, "rows", "rope_append", rope, constants, 4, 1))
    silu = (("gate_up_TX", dtype), ("bias_N", "*fp32"), ("act_TF", dtype))
    up_at = padded_rows(s.f)
    constants = (("F", s.f), ("XS", 2 * up_at), ("UP_AT", up_at), ("HAS_BIAS", mlp_bias))
    constants += (("BLOCK", ROW_BLOCK),)
    kernels.append(TritonKernel("silu_mul", "rows", "silu_mul", silu, constants, 4, 1))
    if attention_bias or mlp_bias:
        bias = (("y_TN", dtype), ("bias_N", "*fp32"))
        constants = (("N", s.d), ("BLOCK", ROW_BLOCK))
        kernels.append(TritonKernel("add_bias", "rows", "add_bias", bias, constants, 4, 1))
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


def _attention(s: _Shapes, dtype: str, target: str) -> list[TritonKernel]:
    e_pow = max(power_of_two(s.e), 16)
    j_pow = power_of_two(s.h // s.k)
    scale = s.e**-0.5 * math.log2(math.e)
    has_room = target in ("sm_80", "sm_90", "sm_100")  # over 160 KB of shared memory a program
    common = (("H", s.h), ("K", s.k), ("E", s.e), ("EP", e_pow), ("P", s.p))
    rows = max(128 if e_pow <= 128 and has_room else 64, j_pow)
    cache = (("keys_NKPE", dtype), ("values_NKPE", dtype), ("block_table_SM", "*i32"))
    arguments = (("q_TQ", dtype), *cache, ("query_start_S1", "*i32"), ("seq_lens_S", "*i32"))
    arguments += (("out_TQ", dtype), ("num_seqs", "i32"), ("max_blocks", "i32"))
    constants = (*common, ("JP", j_pow), ("TOKENS", rows // j_pow))
    constants += (("SEQS", power_of_two(s.seqs)), ("SCALE", scale))
    stages = (3 if has_room else 2) if e_pow <= 128 else 1
    warps = 8 if rows == 128 else 4
    kernels = [TritonKernel("prefill", "attention", "prefill", arguments, constants, warps, stages)]
    parts = (("PARTS", MAX_PARTS), ("MIN_BLOCKS", MIN_PART_BLOCKS))
    scratch = (("part_SBHE", "*fp32"), ("scale_SBH2", "*fp32"), ("out_SQ", dtype))
    arguments = (("q_SQ", dtype), *cache, ("seq_lens_S", "*i32"), *scratch, ("max_blocks", "i32"))
    constants = (*common, ("ROWS", max(16, j_pow)), *parts, ("SCALE", scale))
    stages = (3 if has_room else 2) if e_pow <= 128 else 1
    kernels.append(TritonKernel("decode", "attention", "decode", arguments, constants, 4, stages))
    arguments = (("seq_lens_S", "*i32"), *scratch)
    constants = (("H", s.h), ("E", s.e), ("EP", e_pow), ("P", s.p), *parts)
    kernels.append(TritonKernel("combine", "attention", "combine", arguments, constants, 1, 1))
    return kernels


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
