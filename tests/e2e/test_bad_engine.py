"""Engines and requests that are wrong: one line that says found, needed and what to do."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_writers import write_gguf
from damage import Damage, cut, remove, write
from small_models import Refused

from puna.manifest import MANIFEST_FILE, write_manifest
from puna.strict_json import canonical_json

BEAMS = ("--num-beams", 4)


def change_config(engine: Path, **changes: Any) -> None:
    """Change config.json as a foreign writer would: with a manifest that fits."""
    data = json.loads((engine / "config.json").read_text()) | changes
    (engine / "config.json").write_bytes(canonical_json(data))
    (engine / MANIFEST_FILE).unlink()
    write_manifest(engine, 1)


def flip(name: str) -> Damage:
    def damage(engine: Path) -> None:
        data = bytearray((engine / name).read_bytes())
        data[len(data) // 2] ^= 1
        (engine / name).write_bytes(data)

    return damage


ENGINE_DAMAGE = {
    "flipped weights": (flip("rank0.safetensors"), "rank0.safetensors was changed: copy or build"),
    "flipped tokenizer": (flip("tokenizer/tokenizer.json"), "tokenizer.json was changed: copy or"),
    "cut": (cut("rank0.safetensors", 0.5), "bytes instead of"),
    "no weights": (remove("rank0.safetensors"), "rank0.safetensors is missing: copy or build"),
    "no tokenizer": (remove("tokenizer/tokenizer.json"), "tokenizer/tokenizer.json is missing"),
    "no manifest": (remove("manifest.json"), "has no manifest.json, so it is not a whole engine"),
    "no config": (remove("config.json"), "has no config.json, so it is not an engine: build one"),
    "changed manifest": (flip("manifest.json"), "manifest.json is damaged: copy or build"),
    "config no JSON": (write("config.json", "{"), "rebuild the engine with puna build"),
    "added": (write("rank1.safetensors", ""), "rank1.safetensors is not in the manifest"),
    "unknown key": (lambda e: change_config(e, colour=3), "unknown keys colour: rebuild"),
    "newer": (
        lambda e: change_config(e, format_version=99, colour=3),
        "engine format 99 found, this puna reads format 3: rebuild the engine",
    ),
    "other target": (
        lambda e: change_config(e, target="sm_70"),
        "was built for sm_70, this version of puna runs engines for cpu, sm_80, sm_86, sm_89, "
        "sm_90, sm_100, sm_120: build it again",
    ),
    "layout of another target": (
        lambda e: change_config(e, target="sm_90"),
        "lies in tiles, target sm_90 needs rows: rebuild the engine",
    ),
    "unknown layout": (
        lambda e: change_config(e, weights={"embed.weight": {"format": "int8", "layout": "cols"}}),
        "layout 'cols' is unknown; this version of puna reads tiles, rows: rebuild the engine",
    ),
    "unknown format": (
        lambda e: change_config(e, weights={"embed.weight": {"format": "int9", "layout": "tiles"}}),
        "unknown weight format 'int9': rebuild the engine",
    ),
    "format no text": (
        lambda e: change_config(e, weights={"embed.weight": {"format": [], "layout": "tiles"}}),
        "rebuild the engine",
    ),
    "header of another config": (
        lambda e: change_config(e, quant="int9"),
        "does not fit config.json beside it",
    ),
}


@pytest.mark.parametrize("name", ENGINE_DAMAGE)
def test_damaged_engine(name: str, engine: Path, copied: Any, refused: Refused) -> None:
    damage, message = ENGINE_DAMAGE[name]
    path = copied(engine)
    damage(path)
    assert message in refused("run", path, "--prompt", "Hello")
    assert message in refused("chat", path)
    if name != "other target":  # whole, but not for this machine
        assert message in refused("verify", path)


def test_file_that_cannot_be_read(
    engine: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert "Input/output error" in refused("run", engine, "--prompt", "Hello")


def test_wrong_number_of_ranks(pair_engine: Path, refused: Refused) -> None:
    line = refused("run", pair_engine, "--prompt", "Hello")
    assert "Engine world size (2) != Runtime world size (1)" in line and "start 2 ranks" in line


def test_checkpoint_and_engine_confused(
    hf_checkpoint: Path, engine: Path, tmp_path: Path, refused: Refused
) -> None:
    for name in ("run", "chat", "inspect", "verify"):
        prompt = ("--prompt", "Hello") if name == "run" else ()
        line = refused(name, hf_checkpoint, *prompt)
        assert "not the config of an engine" in line
        assert f"puna build {hf_checkpoint} -o ENGINE" in line
        assert "build one" in refused(name, write_gguf(tmp_path / "m.gguf", {}), *prompt)
        assert "does not exist; an engine is" in refused(name, tmp_path / "no", *prompt)
        assert "does not exist; an engine is" in refused(name, "x" * 300, *prompt)
        meta = tmp_path / "meta"
        meta.mkdir(exist_ok=True)
        assert "is not an engine: build one with puna build" in refused(name, meta, *prompt)
    line = refused("build", engine, "-o", tmp_path / "again")
    assert f"is an engine already: run it with puna run {engine}" in line
    assert "is an engine already" in refused("plan", engine)
    assert "is an engine already" in refused("quickstart", "--model", engine, "--cache", tmp_path)


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 200, "the prompt has 200 tokens; the engine takes at most 128"),
        ("x" * 128, "leaves no room for a new token; shorten the prompt"),
        ("", "the prompt is empty; it needs at least one character"),
        (NOT_UTF8, "it must be valid Unicode"),
    ],
    ids=["long", "full", "empty", "not UTF-8"],
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--stream",)], ids=str)
def test_prompts(
    prompt: str, message: str, options: tuple[str, ...], engine: Path, refused: Refused
) -> None:
    assert message in refused("run", engine, "--prompt", prompt, *options)


@pytest.mark.parametrize(("name", "options"), [("run", ("--prompt", "-")), ("chat", ())])
def test_bytes_on_stdin(
    name: str,
    options: tuple[str, ...],
    engine: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert "on stdin is not UTF-8" in refused(name, engine, *options)


def test_empty_stdin(engine: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "the prompt is empty" in refused("run", engine, "--prompt", "-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "temperature is -1.0; it must be between 0 and 100"),
        (("--temperature", "nan"), "temperature is nan; it must be a finite number"),
        (("--temperature", "inf"), "temperature is inf; it must be a finite number"),
        (("--temperature", "hot"), "invalid float value: 'hot'"),
        (("--top-k", -1), "top_k is -1; it must be between"),
        (("--top-k", 1.5), "invalid int value: '1.5'"),
        (("--top-p", 1.5), "top_p is 1.5; it must be between 0 and 1"),
        (("--top-p", -0.1), "top_p is -0.1"),
        (("--min-p", 2), "min_p is 2.0; it must be between 0 and 1"),
        (("--repetition-penalty", 0), "repetition_penalty is 0.0; it must be between"),
        (("--presence-penalty", 3), "presence_penalty is 3.0; it must be between -2 and 2"),
        (("--frequency-penalty", -3), "frequency_penalty is -3.0"),
        (("--max-new-tokens", 0), "max_new_tokens is 0; it must be at least 1"),
        (("--seed", -1), "seed is -1; it must be between"),
        (("--seed", 2**64), "seed is 18446744073709551616"),
        (("--stop", ""), "stop holds ''; it needs strings that are not empty"),
        (("--threads", 0), "threads is 0; it must be at least 1"),
        (("--threads", -1), "threads is -1; it must be at least 1"),
        (("--kv-cache-bytes", 1), "kv_cache_bytes 1 is too small"),
        (("--kv-cache-bytes", 10**15), "lower --kv-cache-bytes"),
        (("--device", "tpu"), "device 'tpu' is not in this version of puna: use one of"),
        (("--tokenizer", "nowhere"), "nowhere has no tokenizer"),
        (("--chat-template", "nowhere"), "is neither a template nor a file with one"),
        (("--json", "--stream"), "exclude each other: choose one"),
        (("--num-beams", 0), "num_beams is 0; it must be at least 1"),
        (("--num-beams", "many"), "invalid int value: 'many'"),
        (
            ("--num-beams", 1000),
            "num_beams is 1000; the engine computes at most 8 sequences",
        ),
        ((*BEAMS, "--temperature", 0.5), "leave temperature or num_beams out"),
        ((*BEAMS, "--top-k", 5), "leave top_k or num_beams out"),
        ((*BEAMS, "--stop", "x"), "leave stop or num_beams out"),
        ((*BEAMS, "--presence-penalty", 1), "leave presence_penalty or num_beams out"),
        ((*BEAMS, "--stream"), "the best beam is known at the end only"),
        ((*BEAMS, "--length-penalty", "nan"), "length_penalty is nan; it must be a finite number"),
        ((*BEAMS, "--early-stopping", "always"), "invalid choice: 'always'"),
        (("--length-penalty", 2), "length_penalty is 2.0 without beams"),
        (("--early-stopping",), "early_stopping is True without beams"),
    ],
    ids=str,
)
def test_run_options(
    options: tuple[object, ...], message: str, engine: Path, refused: Refused
) -> None:
    assert message in refused("run", engine, "--prompt", "Hello", *options)
