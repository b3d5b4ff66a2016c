"""The rules that keep puna readable, checked on its syntax trees: who imports whom, and habits.

Layers, top to bottom: cli > llm > executor > session > lower, models > scheduler and its words; and
cli > builder > checkpoint, plan. Build and runtime meet in the engine directory and nowhere else.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "puna").rglob("*.py"))
}

# Each module may import from layers below its own, and from its own layer.
RUN = [
    ("cli",),
    ("bench", "summarize"),
    ("llm",),
    ("job",),
    ("runtime.executor",),
    ("runtime.ranks",),
    ("runtime.session",),
    ("runtime.runner", "runtime.host_runner", "runtime.cuda_runner"),
    (
        "runtime.load",
        "runtime.limits",
        "runtime.device",
        "runtime.gpu",
        "runtime.comm",
        "runtime.cuda_load",
        "runtime.cuda_dummy",
        "runtime.cuda_inputs",
        "runtime.cuda_slots",
        "runtime.cuda_bandwidth",
    ),
    ("runtime.lower", "runtime.wire", "models"),
    ("runtime.lower_sampling",),
    (
        "runtime.scheduler",
        "runtime.admission",
        "runtime.ahead",
        "runtime.beam",
        "runtime.block_pool",
        "runtime.step",
        "runtime.request",
    ),
    ("runtime.rendezvous",),
    ("runtime.launch",),
    (
        "cpu",
        "cuda.ops",
        "cuda.fused_ops",
        "cuda.fused",
        "cuda.wide",
        "cuda.swiglu",
        "cuda.draw",
        "cuda.graphs",
        "cuda.library",
    ),
    ("cuda.products", "cuda.attend"),
    ("cuda.maps", "cuda.launches"),
    ("ops", "cuda.choices", "cuda.interfaces", "cuda.hash32"),
]
BUILD = [
    ("cli",),
    ("builder",),
    ("plan", "checkpoint", "output", "rank_writer", "auto_target", "cuda.compile"),
]
SHARED = [
    ("tokenizer",),
    ("manifest", "shard", "memory", "dummy"),
    ("cuda", "cuda_memory"),
    ("rank_file",),
    ("engine",),
    ("layout", "targets", "rope", "batch", "dummy_values"),
    ("quant", "weights"),
    ("mapping",),
    ("spec", "version", "report"),
    ("native", "huge_pages", "nvidia"),
    ("strict_json",),
    ("errors",),
]
RUN_ONLY = ("runtime", "models", "ops", "cpu", "llm", "job", "bench", "summarize")
RUN_ONLY += (
    "cuda.ops",
    "cuda.fused_ops",
    "cuda.fused",
    "cuda.wide",
    "cuda.swiglu",
    "cuda.attend",
    "cuda.products",
    "cuda.launches",
    "cuda.maps",
    "cuda.draw",
    "cuda.hash32",
    "cuda.graphs",
    "cuda.library",
    "cuda.choices",
    "cuda.interfaces",
)
BUILD_ONLY = ("builder", *BUILD[-1])
# Integers above, arrays below: these work for any device and any array library.
WITHOUT_NUMPY = ("errors", "spec", "mapping", "weights", "strict_json", "version", "__main__")
WITHOUT_NUMPY += tuple(
    f"runtime.{name}"
    for name in (
        "request",
        "block_pool",
        "admission",
        "ahead",
        "beam",
        "scheduler",
        "step",
        "executor",
        "launch",
        "rendezvous",
    )
)
# Of puna[cuda], puna[ranks] and puna[eval]; imported when they are needed, by nobody else.
WITH_TORCH = ("cuda", "runtime.comm", "summarize.transformers_model")
WITH_TORCH += tuple(
    f"runtime.cuda_{name}" for name in ("runner", "load", "dummy", "slots", "bandwidth")
)
MUTABLE_CALLS = ("dict", "list", "set", "bytearray", "defaultdict", "OrderedDict", "Counter")
MUTABLE_CALLS += ("deque", "count", "Lock", "array", "empty", "zeros", "ones")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str, only_at_import: bool = False) -> Iterator[str]:
    """Modules that `module` imports, anywhere or when it is imported itself."""
    body = tree(module)
    lazy = {
        id(inner)
        for node in ast.walk(body)
        if isinstance(node, ast.FunctionDef) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(body):
        if only_at_import and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            name = node.module or ""
            for alias in node.names:
                full = f"{name}.{alias.name}"
                yield full if full in MODULES else name


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def is_in(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of `names` (of puna), or lies in one of these packages."""
    return any(module == f"puna.{name}" or module.startswith(f"puna.{name}.") for name in names)


def level(module: str, layers: list[tuple[str, ...]]) -> int | None:
    return next((i for i, names in enumerate(layers) if is_in(module, names)), None)


def inner_modules() -> list[str]:
    return [module for module in MODULES if module not in ("puna", "puna.__main__")]


def test_every_module_has_a_layer() -> None:
    known = [*RUN, *BUILD, *SHARED]
    homeless = [module for module in inner_modules() if level(module, known) is None]
    # Packages whose modules have layers of their own, and which hold nothing themselves.
    assert not [module for module in homeless if module not in ("puna.runtime", "puna.cuda")]


@pytest.mark.parametrize("chain", [RUN + SHARED, BUILD + SHARED], ids=["run", "build"])
def test_imports_point_down(chain: list[tuple[str, ...]]) -> None:
    for module in inner_modules():
        mine = level(module, chain)
        for imported in imports(module):
            theirs = level(imported, chain)
            if mine is not None and theirs is not None:
                assert theirs >= mine, f"{module} imports {imported}"


def test_build_and_runtime_share_the_engine_only() -> None:
    for module in inner_modules():
        for imported in imports(module):
            crossing = (is_in(module, RUN_ONLY) and is_in(imported, BUILD_ONLY)) or (
                is_in(module, BUILD_ONLY) and is_in(imported, RUN_ONLY)
            )
            assert not crossing, f"{module} imports {imported}"
            if not is_in(module, (*RUN_ONLY, *BUILD_ONLY, "cli")):
                assert not is_in(imported, (*RUN_ONLY, *BUILD_ONLY)), f"{module}: {imported}"


@pytest.mark.parametrize("name", WITHOUT_NUMPY)
def test_no_arrays_above_the_session(name: str) -> None:
    seen, todo = set(), [f"puna.{name}"]
    while todo:  # and nothing that they import brings NumPy in either
        module = todo.pop()
        for imported in imports(module, only_at_import=True):
            assert imported.partition(".")[0] not in ("numpy", "ml_dtypes"), f"{module}: {imported}"
            if imported in MODULES and imported not in seen:
                seen.add(imported)
                todo.append(imported)


def test_torch_is_for_cuda_only() -> None:
    for module in MODULES:
        if not is_in(module, WITH_TORCH):
            found = {imported.partition(".")[0] for imported in imports(module)}
            assert not found & {"torch", "transformers", "triton"}, module


def test_environment_print_and_excepts() -> None:
    for module in MODULES:
        for node in ast.walk(tree(module)):
            at = f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                assert module == "puna.runtime.launch", f"{at}: environment"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                assert is_in(module, ("cli", "bench")), f"{at}: print"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{at}: bare except"
                caught = ast.unparse(node.type)
                is_silent = all(isinstance(line, ast.Pass) for line in node.body)
                assert not (is_silent and "Exception" in caught), f"{at}: {caught}: pass"


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.BinOp):
        return is_mutable(value.left) or is_mutable(value.right)
    if isinstance(value, ast.Tuple):
        return any(map(is_mutable, value.elts))
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MUTABLE_CALLS
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays)


def test_no_mutable_state_in_modules() -> None:
    found = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            assert not isinstance(node, ast.Global), f"{module}:{node.lineno}: global"
        for node in tree(module).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and is_mutable(node.value):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(target) != "__all__":
                    found.append(f"{module}:{node.lineno} {ast.unparse(target)}")
    assert not found, f"wrap these in MappingProxyType, tuple or frozenset: {found}"


def test_names() -> None:
    for module, path in MODULES.items():
        assert path.stem not in ("utils", "util", "helpers", "common", "misc"), module
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith("Manager"), f"{module}: {node.name}"
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                assert node.args.kwarg is None, f"{module}:{node.lineno}: **kwargs"


def test_import_puna_is_quick_and_brings_nothing() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import puna\n"
        "print(time.perf_counter() - start, *({'numpy', 'torch', 'tokenizers'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.3
