"""docs/engine-format.md names exactly what the code writes and reads."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from checkpoint_writers import write_tokenizer

from puna import build
from puna.checkpoint.dummy import DummyCheckpoint, parse_preset
from puna.engine import FORMAT_VERSION, DummyRecipe, EngineConfig, Limits, Provenance, RankMemory
from puna.layout import LayoutName, array_specs
from puna.manifest import CHUNK_BYTES, FileDigest
from puna.quant import Format
from puna.rank_file import ALIGNMENT, rank_file
from puna.targets import TARGETS
from puna.tokenizer import TOKENIZER_FILES
from puna.weights import engine_weights

DOC = Path(__file__).resolve().parents[2] / "docs" / "engine-format.md"
TEXT = DOC.read_text()
SPEC = parse_preset("hidden=40,layers=1,heads=4,ffn=90,vocab=100,attention_bias=1,mlp_bias=1")


def table(title: str) -> list[str]:
    """First column of the table whose header cell is `title`."""
    lines = TEXT.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(re.match(r"\| `(.+?)` \|", line)[1])
    return rows


def names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "engine"
    source = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    files = {"tokenizer.json": (source / "tokenizer.json").read_bytes()}
    return build(DummyCheckpoint(SPEC), path, materialize=True, tokenizer=files).path


def test_config_keys(engine: Path) -> None:
    assert table("key of config.json") == names(EngineConfig)
    assert (
        set(table("key of config.json")) == json.loads((engine / "config.json").read_text()).keys()
    )
    assert table("key of limits") == names(Limits)
    assert table("key of dummy") == names(DummyRecipe)


@pytest.mark.parametrize(("key", "kind"), [("memory", RankMemory), ("provenance", Provenance)])
def test_keys_named_in_a_row(key: str, kind: type) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{key}` |"))
    assert set(re.findall("`(.+?)`", row)) == {key, *names(kind)} | (
        {"total"} if kind is RankMemory else set()
    )


def test_files(engine: Path) -> None:
    found = {path.name + "/" * path.is_dir() for path in engine.iterdir()}
    assert set(table("file")) == found | {"kernels/"}
    assert tuple(table("tokenizer file")) == TOKENIZER_FILES


def test_layouts_and_arrays() -> None:
    assert tuple(table("layout")) == get_args(LayoutName)
    formats = ("float16", "int8", "int4-g32-min")
    arrays = [name for text in formats for name in array_specs("tiles", Format.parse(text), 32, 64)]
    assert table("array of `tiles`") == list(dict.fromkeys(arrays))
    assert table("array of `rows`") == list(array_specs("rows", Format.dense("float16"), 32, 64))


def test_targets() -> None:
    rows = [line for line in TEXT.splitlines() if re.match(r"\| `(cpu|sm_\d+)` \|", line)]
    assert table("target") == list(TARGETS)
    for row, target in zip(rows, TARGETS.values(), strict=True):
        assert row.endswith(f"| `{target.layout}` | {target.block_size} |")
        if target.capability:
            assert "{}.{}:".format(*target.capability) in row


def test_formats_named() -> None:
    wanted = {"int8": (0, False, "float32"), "int8-g32": (32, False, "float16")}
    for name, facts in wanted.items():
        assert f"`{name}` " in TEXT
        found = Format.parse(name)
        assert (found.group_size, found.has_min, found.scale_dtype) == facts
    assert Format.parse("int8-g32-f32").scale_dtype == "float32" and "`-f32`" in TEXT
    assert Format.parse("int4-g32-min").has_min and "`-min`" in TEXT


def test_rank_file_header(engine: Path) -> None:
    data = (engine / "rank0.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert set(table("key of the header")) == header.pop("__metadata__").keys()
    assert f"multiple of {ALIGNMENT} bytes" in TEXT and (8 + length) % ALIGNMENT == 0
    pads = [name for name in header if name.startswith("_pad.")]
    assert pads and all(header[name]["dtype"] == "U8" for name in pads)
    for name in header.keys() - pads:
        assert (8 + length + header[name]["data_offsets"][0]) % ALIGNMENT == 0
    config = EngineConfig.from_bytes((engine / "config.json").read_bytes(), engine)
    assert rank_file(config, 0, config.digest()).header == data[: 8 + length]


def test_tensor_names() -> None:
    documented = set(re.findall(r"`((?:[a-z_]+\.)+(?:weight|bias))`", TEXT))
    stored = {weight.name.removeprefix("layers.0.") for weight in engine_weights(SPEC)}
    assert documented == stored
    assert any(name.endswith(".bias") for name in stored)


def test_manifest(engine: Path) -> None:
    found = json.loads((engine / "manifest.json").read_text())
    assert set(table("key of manifest.json")) == found.keys()
    assert table("key of a file") == names(FileDigest)
    assert f"each {CHUNK_BYTES >> 20} MiB" in TEXT


def test_version() -> None:
    assert TEXT.startswith(f"# The engine directory, format {FORMAT_VERSION}\n")
