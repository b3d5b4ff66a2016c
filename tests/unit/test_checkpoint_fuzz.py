"""Damaged headers: a PunaError or a correct result, never another exception, a hang or huge memory.

1,250 examples in all. The address space is limited while they run, so an allocation of what
a header merely claims is a MemoryError, and that fails.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_writers import hf_config, tiny_weights, write_gguf, write_hf, write_meta
from quantised_writers import How, write_quantised

from puna.checkpoint import open_checkpoint
from puna.errors import PunaError

pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SECONDS = 10
QUANTISED = ("gptq", "awq", "compressed-tensors")
HEADROOM = 1 << 30  # bytes of address space beyond what the process has
LITTLE = "little"

few = hypothesis.settings(
    max_examples=125,
    deadline=SECONDS * 1000,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)

# An edit: where (as a fraction of the region), what. Long ones hit lengths and offsets.
words = st.sampled_from(
    [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
)
patches = st.one_of(
    st.binary(min_size=1, max_size=4),
    words.map(lambda n: n.to_bytes(8, LITTLE)),
    words.map(lambda n: (n % 2**32).to_bytes(4, LITTLE)),
)
edits = st.lists(st.tuples(st.floats(0, 1), patches), min_size=1, max_size=4)
cuts = st.one_of(st.none(), st.none(), st.floats(0, 1))


@pytest.fixture(scope="module", autouse=True)
def _limited_memory() -> Iterator[None]:
    # What is imported on the way maps memory of its own: have it there before the limit.
    import gguf  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One healthy checkpoint of each form."""
    root, weights = tmp_path_factory.mktemp("forms"), tiny_weights()
    write_hf(root / "hf", weights, num_files=2)
    write_hf(root / "one", weights)
    write_hf(root / "bin", weights, "bin")
    write_meta(root / "meta", weights, 2)
    for method in QUANTISED:
        write_quantised(root / method, weights, How(method, is_symmetric=False))
    types = {
        "layers.0.attn.q.weight": "Q8_0",
        "layers.0.mlp.up.weight": "Q4_1",
        "head.weight": "F16",
    }
    changes = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(80)], "general.scores": [1.0, 2.0]}
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "m.gguf", weights, types, **changes)
    return root


def attempt(path: Path) -> bool:
    """Open and load everything; True if it opened."""
    try:
        found = open_checkpoint(str(path))
        for name in found.names():
            shape = found.shape(name)
            if len(shape) not in (1, 2):
                continue  # nobody asks for it: the weight table has no such shape
            found.format(name)
            loaded = found.load(name)
            assert loaded.shape == shape
            if not found.format(name).is_dense:
                assert found.load_quantized(name).q_NK.shape == shape
        found.tokenizer_files()
        found.notes()
    except PunaError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable(), message  # one line
    return False


def damaged(
    data: bytes, region: int, changes: list[tuple[float, bytes]], cut: float | None
) -> bytes:
    """`data` with patches in its first `region` bytes (negative: its last), cut short or not."""
    out = bytearray(data)
    start, size = (0, region) if region > 0 else (len(data) + region, -region)
    for at, patch in changes:
        offset = min(start + int(at * size), len(data) - len(patch))
        out[offset : offset + len(patch)] = patch
    return bytes(out if cut is None else out[: int(cut * len(out))])


def fuzz(forms: Path, form: str, file: str, change: Callable[[bytes], bytes]) -> None:
    """Replace one file of a form by `change` of it, try it, and put it back."""
    path = forms / form / file
    healthy = path.with_suffix(".healthy")
    if not healthy.exists():
        shutil.copy(path, healthy)
    path.write_bytes(change(healthy.read_bytes()))
    try:
        attempt(forms / form)
    finally:
        path.unlink()
        shutil.copy(healthy, path)


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], LITTLE)


@few
@hypothesis.given(changes=edits, cut=cuts)
def test_safetensors(forms: Path, changes: list[tuple[float, bytes]], cut: float | None) -> None:
    fuzz(forms, "one", "model.safetensors", lambda d: damaged(d, header_size(d), changes, cut))


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 100),
        st.sampled_from(
            [2**31, 2**63, -(2**63), 10**400, 1e308, 1e-320, float("nan"), float("inf")]
        ),
        st.text(max_size=8),
        st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "llama3", "yarn", "dynamic", "../x.bin"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["rope_type", "factor", "dtype", "x"]), inner, max_size=4),
    ),
    max_leaves=6,
)


def with_values(data: Any, where: list[int], new: list[Any]) -> Any:
    """A JSON object with some of its values, two levels deep, replaced."""
    keys = [(k,) for k in data]
    keys += [(k, j) for k, v in data.items() if isinstance(v, dict) for j in v]
    for i, value in zip(where, new, strict=False):
        *outer, key = keys[i % len(keys)]
        target = data[outer[0]] if outer else data
        if isinstance(target, dict):
            target[key] = value
    return data


places = st.lists(st.integers(0, 200), min_size=1, max_size=3)
replacements = st.lists(values, min_size=3, max_size=3)


@few
@hypothesis.given(where=places, new=replacements)
def test_safetensors_header_values(forms: Path, where: list[int], new: list[Any]) -> None:
    def change(data: bytes) -> bytes:
        size = header_size(data)
        header = json.dumps(with_values(json.loads(data[8:size]), where, new)).encode()
        return len(header).to_bytes(8, LITTLE) + header + data[size:]

    fuzz(forms, "one", "model.safetensors", change)


@few
@hypothesis.given(form=st.sampled_from(QUANTISED), where=places, new=replacements)
def test_quantised_header_values(forms: Path, form: str, where: list[int], new: list[Any]) -> None:
    """Shapes and types that make other layers, or none."""

    def change(data: bytes) -> bytes:
        size = header_size(data)
        header = json.loads(data[8:size])
        names = [name for name in header if "q_proj" in name]
        for i, value in zip(where, new, strict=False):
            name = names[i % len(names)]
            shape = json.loads(data[8:size])[name]["shape"]
            shapes = (
                shape[::-1],
                [1, *shape],
                shape[:1] + [n // 2 for n in shape[1:]] + [2],
                value,
            )
            header[name]["shape"] = shapes[i // len(names) % len(shapes)]
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, LITTLE) + text + data[size:]

    fuzz(forms, form, "model.safetensors", change)


@few
@hypothesis.given(
    form=st.sampled_from(QUANTISED), at=st.floats(0, 1), where=places, new=replacements
)
def test_quantised_config_and_numbers(
    forms: Path, form: str, at: float, where: list[int], new: list[Any]
) -> None:
    def change(data: bytes) -> bytes:
        config = json.loads(data)
        said = config["quantization_config"]
        if groups := said.get("config_groups"):
            weights = groups["group_0"]["weights"]
            groups["group_0"]["weights"] = with_values(weights, where[1:], new)
        config["quantization_config"] = with_values(said, where[:1], new[2:])
        return json.dumps(config).encode()

    fuzz(forms, form, "config.json", change)
    # Numbers, not only headers: group indices, shapes and scales may be anything.
    fuzz(
        forms,
        form,
        "model.safetensors",
        lambda d: damaged(d, -int(at * len(d)) - 9, [(at, b"x" * 4)], None),
    )


@few
@hypothesis.given(
    where=places, new=replacements, changes=st.one_of(st.just([]), edits),
    file=st.sampled_from(["config.json", "model.safetensors.index.json"]),
)  # fmt: skip
def test_hf_json(
    forms: Path, where: list[int], new: list[Any], changes: list[tuple[float, bytes]], file: str
) -> None:
    def change(data: bytes) -> bytes:
        config = json.loads(data)
        if file == "config.json":
            config = {**hf_config(rope_scaling={"type": "x"}, head_dim=8), **config}
        data = json.dumps(with_values(config, where, new)).encode()
        return damaged(data, len(data), changes, None)

    fuzz(forms, "hf", file, change)


@few
@hypothesis.given(where=places, new=replacements)
def test_meta_params(forms: Path, where: list[int], new: list[Any]) -> None:
    optional = {"multiple_of": 32, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True}

    def change(data: bytes) -> bytes:
        return json.dumps(with_values({**optional, **json.loads(data)}, where, new)).encode()

    fuzz(forms, "meta", "params.json", change)


@few
@hypothesis.given(changes=edits, cut=cuts)
def test_pickle(forms: Path, changes: list[tuple[float, bytes]], cut: float | None) -> None:
    def change(data: bytes) -> bytes:
        end = data.index(b"PK\x03\x04", 4)  # data.pkl is the first record
        return damaged(data, end, changes, cut)

    fuzz(forms, "bin", "pytorch_model.bin", change)


@few
@hypothesis.given(changes=edits, is_first=st.booleans())
def test_zip_directory(forms: Path, changes: list[tuple[float, bytes]], is_first: bool) -> None:
    def change(data: bytes) -> bytes:
        return damaged(data, data.index(b"PK\x01\x02") - len(data), changes, None)

    fuzz(forms, "meta", f"consolidated.{0 if is_first else 1:02}.pth", change)


@few
@hypothesis.given(changes=edits, cut=cuts)
def test_gguf(forms: Path, changes: list[tuple[float, bytes]], cut: float | None) -> None:
    def change(data: bytes) -> bytes:
        return damaged(data, data.rindex(b"blk.1.") + 64, changes, cut)

    fuzz(forms, "gguf", "m.gguf", change)


@few
@hypothesis.given(data=st.binary(max_size=200), form=st.sampled_from(["one", "bin", "gguf"]))
def test_any_bytes(forms: Path, data: bytes, form: str) -> None:
    file = {"one": "model.safetensors", "bin": "pytorch_model.bin", "gguf": "m.gguf"}[form]
    start = {"one": b"", "bin": b"PK\x03\x04", "gguf": b"GGUF\x03\0\0\0"}[form]
    fuzz(forms, form, file, lambda _: start + data)


@pytest.mark.parametrize("form", ["hf", "one", "bin", "meta", "gguf"])
def test_healthy_forms_open(forms: Path, form: str) -> None:
    assert attempt(forms / form)
