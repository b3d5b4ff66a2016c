"""Compiling an engine's kernels when it is built, with or without a GPU, into `kernels/`.

Decides what the files of that directory are: a cubin for each kernel, and `kernels.json`, which
says for each by name what a launch must know. Which kernels there are is in
`puna.cuda.kernel_table` and `source_table`. The compilers (Triton; NVRTC through cuda.core) are
imported here, when they are used, and nowhere else.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puna.cuda.kernel_table import KERNELS_FILE, TritonKernel, triton_kernels
from puna.cuda.source_table import CudaKernel, CudaSource, cuda_sources
from puna.engine import EngineConfig
from puna.errors import ConfigError
from puna.strict_json import canonical_json

SOURCES = Path(__file__).parent / "csrc"  # of CUDA C++ kernels

_HOW_TO_INSTALL = 'install the compilers with pip install "puna[cuda]"'

_PTX_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)")
_PTX_TYPES = MappingProxyType(
    {"u64": "ptr", "s64": "ptr", "b64": "ptr", "u32": "i32", "s32": "i32", "b32": "i32"}
)


def compile_kernels(
    config: EngineConfig, progress: Callable[[int, int], None] | None = None
) -> dict[str, bytes]:
    """File name -> bytes of everything in `kernels/`.

    `progress` is told how many files of how many are compiled. ConfigError where a compiler is
    missing.
    """
    triton = _import("triton", "Triton")
    kernels, sources = triton_kernels(config), cuda_sources(config)
    versions = {"triton": str(triton.__version__)}
    if sources:
        # Before there are threads: two that import it at once find it half initialised.
        _import("cuda.core", "cuda-core")
        versions["nvrtc"] = _nvrtc_version()

    def compile_one(
        kernel: TritonKernel | CudaSource,
    ) -> tuple[bytes, dict[str, dict[str, Any]]]:
        """A cubin and the entries of its kernels."""
        if isinstance(kernel, TritonKernel):
            cubin, entry = _compile_triton(kernel, config)
            return cubin, {kernel.name: entry}
        cubin = compile_cuda(kernel, config.target)
        return cubin, {it.name: _cuda_entry(it, f"{kernel.name}.cubin") for it in kernel.kernels}

    entries: dict[str, dict[str, Any]] = {}
    files: dict[str, bytes] = {}
    everything = (*kernels, *sources)
    # NVRTC works beside Triton; Triton's kernels are compiled one after the other, since parsing
    # Python in several threads at once fails now and then (SystemError, Python 3.11).
    with ThreadPoolExecutor() as pool:
        beside = {source.name: pool.submit(compile_one, source) for source in sources}
        for i, kernel in enumerate(everything):
            if progress:
                progress(i, len(everything))
            done = beside.get(kernel.name)
            cubin, added = compile_one(kernel) if done is None else done.result()
            files[f"{kernel.name}.cubin"] = cubin
            entries |= added
    if progress:
        progress(len(everything), len(everything))
    table = {"target": config.target, "compilers": versions, "kernels": entries}
    return {KERNELS_FILE: canonical_json(table), **files}


def _import(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{what} is needed to compile the kernels of an engine for a GPU ({error}): "
            f"{_HOW_TO_INSTALL}, or build with --target cpu"
        ) from error


def compute_capability(target: str) -> int:
    """90 of sm_90."""
    return int(target.removeprefix("sm_"))


def _compile_triton(kernel: TritonKernel, config: EngineConfig) -> tuple[bytes, dict[str, Any]]:
    """The kernel's cubin and its entry of kernels.json."""
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(
        importlib.import_module(f"puna.cuda.kernels.{kernel.module}"), kernel.function
    )
    types, constants = dict(kernel.arguments), dict(kernel.constants)
    names = list(function.arg_names)
    assert names == [*types, *constants], (kernel.name, names)
    # Pointers to floats are aligned to 16 bytes (the launcher checks it), those to integers are
    # views that begin anywhere.
    aligned = [i for i, name in enumerate(names) if types.get(name, "*i32") not in ("*i32", "i32")]
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", compute_capability(config.target), 32)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    compiled = compile_triton(source, target=target, options={**options, "enable_fp_fusion": True})
    metadata = compiled.metadata
    assert not metadata.global_scratch_size and not _get(metadata, "profile_scratch_size"), (
        f"{kernel.name} wants scratch memory, which no launch gives it"
    )
    parameters = _parameters(compiled.asm["ptx"])
    expected = ["ptr" if kind.startswith("*") else kind for _, kind in kernel.arguments]
    extra = parameters[len(expected) :]
    # After its own parameters a kernel has pointers to scratch memory: as many as the version of
    # Triton has uses for.
    assert parameters[: len(expected)] == expected, (kernel.name, parameters, expected)
    assert all(kind == "ptr" for kind in extra), (kernel.name, parameters)
    cubin = compiled.asm["cubin"]
    return cubin, {
        "file": f"{kernel.name}.cubin",
        "entry": metadata.name,
        "arguments": [list(argument) for argument in kernel.arguments],
        "null_arguments": len(extra),
        "constants": constants,
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
    }


def _get(metadata: Any, name: str) -> int:
    """A number that older versions of Triton do not have."""
    return getattr(metadata, name, 0) or 0


def _parameters(ptx: str) -> list[str]:
    """Kinds of the parameters of a module's one entry."""
    entries = re.findall(r"\.visible\s+\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.DOTALL)
    assert len(entries) == 1, f"{len(entries)} entries"
    return [_PTX_TYPES[kind] for kind in _PTX_PARAMETER.findall(entries[0])]


def compile_cuda(source: CudaSource, target: str, folder: Path = SOURCES) -> bytes:
    """The cubin of a CUDA C++ source."""
    core = _import("cuda.core", "cuda-core")
    options = core.ProgramOptions(
        arch=f"{target}a" if compute_capability(target) >= 90 else target,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in source.defines] or None,
        include_path=str(folder),
        name=source.source,
    )
    program = core.Program((folder / source.source).read_text(), code_type="c++", options=options)
    return bytes(program.compile("cubin").code)


def _cuda_entry(kernel: CudaKernel, file: str) -> dict[str, Any]:
    """Its entry of kernels.json. It has exactly the parameters that it declares."""
    return {
        "file": file,
        "entry": kernel.entry,
        "arguments": [list(argument) for argument in kernel.arguments],
        "null_arguments": 0,
        "constants": {"OVERLAPS": kernel.overlaps},
        "num_warps": kernel.num_warps,
        "shared": kernel.shared,
    }


def _nvrtc_version() -> str:
    # A compiled module, of which type checkers know nothing.
    nvrtc = _import("cuda.bindings.nvrtc", "cuda-bindings")
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"
