"""Kernels compile ahead of time for every target, on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cuda_configs import cuda_config

from puna.checkpoint.dummy import parse_preset
from puna.cuda.gemm_shapes import SHARED_LIMITS
from puna.cuda.kernel_table import KERNELS_FILE, triton_kernels
from puna.cuda.source_table import cuda_sources
from puna.errors import ConfigError
from puna.spec import ModelSpec

SMALL = ModelSpec(
    hidden_size=72,
    intermediate_size=100,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=2500,
    max_position_embeddings=1024,
    attention_bias=True,
    mlp_bias=True,
)
WIDE = ModelSpec(64, 64, 1, 2, 1, 256, 300, 1024)  # the widest heads


def compile_all(spec: ModelSpec, dtype: str, target: str) -> tuple[dict[str, bytes], Any]:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from puna.cuda.compile import compile_kernels

    said: list[tuple[int, int]] = []
    files = compile_kernels(cuda_config(spec, dtype, target), lambda *of: said.append(of))
    num_cubins = len(files) - 1  # beside the table
    assert said == [(done, num_cubins) for done in range(num_cubins + 1)]
    return files, json.loads(files[KERNELS_FILE])


LLAMA_3_8B = parse_preset("llama-3-8b")
# A small odd model for every target; real and wide ones where shared memory is largest and least.
CASES = [
    *((target, SMALL, "float16") for target in ("sm_80", "sm_89", "sm_100", "sm_120")),
    *((target, LLAMA_3_8B, "bfloat16") for target in ("sm_90", "sm_86")),
    *((target, WIDE, "float16") for target in ("sm_90", "sm_120")),
]


@pytest.mark.parametrize(("target", "spec", "dtype"), CASES)
def test_every_kernel_compiles(target: str, spec: ModelSpec, dtype: str) -> None:
    files, table = compile_all(spec, dtype, target)
    assert table["target"] == target and table["compilers"]["triton"]
    kernels = triton_kernels(cuda_config(spec, dtype, target))
    assert {kernel.name for kernel in kernels} <= set(table["kernels"])
    for name, entry in table["kernels"].items():
        assert files[entry["file"]][:4] == b"\x7fELF", name
        assert entry["shared"] <= SHARED_LIMITS[target], (name, entry["shared"])
        assert entry["entry"].encode() in files[entry["file"]], name
    assert set(files) == {KERNELS_FILE, *(entry["file"] for entry in table["kernels"].values())}


def test_compiling_twice_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from puna.cuda.compile import _compile_triton

    config = cuda_config(SMALL)
    kernels = [k for k in triton_kernels(config) if k.name in ("norm_parts", "gemm_o_16", "decode")]
    assert len(kernels) == 3
    found = []
    for folder in ("first", "second"):  # else the second would come from Triton's cache
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
        found.append([_compile_triton(kernel, config) for kernel in kernels])
        assert list((tmp_path / folder).iterdir())
    assert found[0] == found[1]


def test_launches_know_the_arguments() -> None:
    _, table = compile_all(SMALL, "float16", "sm_90")
    gemm = table["kernels"]["gemm_o_16"]
    assert [name for name, _ in gemm["arguments"]] == ["x_MK", "w_NK", "bias_N", "y_MN", "M"]
    assert [kind for _, kind in gemm["arguments"]] == ["*fp16", "*fp16", "*fp32", "*fp32", "i32"]
    assert gemm["constants"]["BLOCK_M"] == 16 and gemm["num_warps"] == 4


@pytest.mark.parametrize("preset", ["llama-2-7b", "llama-3-8b", "llama-3.2-1b", "llama-2-13b"])
@pytest.mark.parametrize("name", ["decode_1", "attend", "wide_8", "wide_16", "wide_32", "wide_64"])
def test_fused_kernels_compile(preset: str, name: str) -> None:
    """The shared memory that each kernel lays out is what was planned: the source checks it."""
    for module in ("cuda.core", "cuda.bindings.nvrtc"):
        pytest.importorskip(module, reason="needs cuda-core, cuda-bindings, nvidia-cuda-nvrtc")
    from puna.cuda.compile import compile_cuda

    config = cuda_config(parse_preset(preset), "bfloat16", "sm_90", max_batch_size=64)
    (source,) = [it for it in cuda_sources(config) if it.name == name]
    cubin = compile_cuda(source, "sm_90")
    assert cubin[:4] == b"\x7fELF"
    for kernel in source.kernels:
        assert kernel.entry.encode() in cubin, kernel.name


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from puna.cuda.compile import compile_kernels

    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r'pip install "puna\[cuda\]"'):
        compile_kernels(cuda_config(SMALL))
