"""Which kernels in CUDA C++ an engine has, with their constants; those in Triton are listed in
`puna.cuda.kernel_table`.

Pure, from `EngineConfig`: it names sources of `puna/cuda/csrc` and compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from puna.cuda.attend_plan import NUM_WARPS as ATTEND_WARPS
from puna.cuda.attend_plan import attend_defines, attend_shared_bytes, max_seqs
from puna.cuda.fused_plan import KERNELS, fused_defines, has_fused, shared_bytes
from puna.cuda.kernel_table import Constant
from puna.cuda.shapes import fused_shapes
from puna.cuda.swiglu_plan import NUM_WARPS as SWIGLU_WARPS
from puna.cuda.swiglu_plan import SHARED_BYTES, has_swiglu, swiglu_defines
from puna.cuda.wide_plan import NUM_WARPS as WIDE_WARPS
from puna.cuda.wide_plan import (
    PRODUCTS,
    has_wide,
    variants,
    wide_defines,
    wide_shared_bytes,
)
from puna.engine import EngineConfig


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


def cuda_sources(config: EngineConfig) -> tuple[CudaSource, ...]:
    """CUDA C++ sources of the engine's target."""
    return (
        _BANDWIDTH,
        *([_fused_source(config)] if has_fused(config) else []),
        *(_wide_source(config, it) for it in (variants(config) if has_wide(config) else ())),
        *([_attend_source(config)] if has_wide(config) else []),
        *([_swiglu_source(config)] if has_swiglu(config) else []),
    )


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


def _fused_source(config: EngineConfig) -> CudaSource:
    dtype = _POINTERS[config.dtype]
    arguments, shapes = _one_token(dtype), fused_shapes(config)
    kernels = [
        CudaKernel(f"{name}_1", name, arguments[name], 8, shared_bytes(shapes, name), True)
        for name in KERNELS
    ]
    kernels.append(CudaKernel("pick_1", "pick", _PICK, 1, 0, True))
    defines = tuple(fused_defines(config).items())
    return CudaSource("decode_1", "decode_sm90.cu", defines, tuple(kernels))


def _wide_source(config: EngineConfig, tokens: int) -> CudaSource:
    dtype = _POINTERS[config.dtype]
    kernels = []
    for name, arguments in several_tokens(config.dtype).items():
        shared = wide_shared_bytes(config, name)
        kernels.append(CudaKernel(f"{name}_{tokens}", name, arguments, WIDE_WARPS, shared, True))
    kernels.append(_enter(dtype, tokens))
    kernels.append(CudaKernel(f"pick_{tokens}", "pick", _PICK, 1, 0, True))
    defines = tuple(wide_defines(config, tokens).items())
    return CudaSource(f"wide_{tokens}", "wide_sm90.cu", defines, tuple(kernels))


def _enter(dtype: str, tokens: int) -> CudaKernel:
    arguments = (("h", "*fp32"), ("gamma", "*fp32"), ("rows", "*i32"), ("next", dtype))
    return CudaKernel(f"enter_{tokens}", "enter", arguments, 8, 8 * 4, True)


def _attend_source(config: EngineConfig) -> CudaSource:
    dtype = _POINTERS[config.dtype]
    arguments = (
        *(("q", dtype), ("keys", dtype), ("values", dtype)),
        *(("key_map", "map"), ("value_map", "map"), ("eight_keys", "map"), ("eight_values", "map")),
        *_integers("slots", "seq_lens", "block_table"),
        *(("attended", dtype), ("pieces", "*fp32")),
        *_integers("counts"),
        *(("table_stride", "i32"), ("num_seqs", "i32")),
    )
    shared = attend_shared_bytes(fused_shapes(config), max_seqs(config))
    kernel = CudaKernel("attend", "attend", arguments, ATTEND_WARPS, shared, True)
    defines = tuple(attend_defines(config).items())
    return CudaSource("attend", "attend_sm90.cu", defines, (kernel,))


def _swiglu_source(config: EngineConfig) -> CudaSource:
    dtype = _POINTERS[config.dtype]
    arguments = (("w", "map"), ("x", "map"), ("bias", "*fp32"), ("act", dtype))
    arguments += tuple((name, "i32") for name in ("num_tokens", "ffn", "up_at", "num_chunks"))
    kernel = CudaKernel("swiglu", "swiglu", arguments, SWIGLU_WARPS, SHARED_BYTES, True)
    defines = tuple(swiglu_defines(config).items())
    return CudaSource("swiglu", "swiglu_sm90.cu", defines, (kernel,))


_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16"}
_WEIGHT = (("w", "map"), ("bias", "*fp32"))
_COUNT = (("num_tokens", "i32"),)


def _integers(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "*i32") for name in names)


_PICK = (("best", "*fp32"), *_integers("rows", "last", "tokens", "error"), ("num_ctas", "i32"))


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
    )


def _one_token(dtype: str) -> dict[str, tuple[tuple[str, str], ...]]:
    residual = (("h", "*fp32"),)
    norm, add = (*residual, ("gamma", "*fp32")), (*_WEIGHT, ("x", dtype), *residual)
    return {
        "qkv": (*_WEIGHT, *norm, *_attention_arguments(dtype), ("layer", "i32")),
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


def several_tokens(dtype: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Arguments of csrc/wide_sm90.cu's kernels."""
    kind = _POINTERS[dtype]
    return {
        "layer": (
            *((f"{it}_weights", "map") for it in PRODUCTS),
            *((it, "map") for it in ("attended", "next_input", "act")),
            *((f"{it}_bias", "*fp32") for it in PRODUCTS),
            *((it, "*fp32") for it in ("out_gamma", "down_gamma", "h")),
            *(("next", kind), ("sums", "*fp32"), ("y", kind)),
            *(("cos", "*fp32"), ("sin", "*fp32"), *_integers("positions", "slots")),
            *((it, kind) for it in ("q", "keys", "values")),
            *_integers("meetings", "error"),
            *((it, "i32") for it in ("parts", "is_finished")),
            *_COUNT,
        ),
        "head": (
            *(("weights", "map"), ("input", "map"), ("logits", "*fp32"), ("best", "*fp32")),
            *_integers("epoch"),
            *_COUNT,
        ),
    }
