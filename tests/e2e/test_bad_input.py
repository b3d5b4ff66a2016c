"""What goes wrong: one line that says found, needed and what to do; nothing is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import tiny_weights, write_gguf, write_hf, write_meta
from small_models import (
    DUMMY,
    ROOT,
    Puna,
    Refused,
    command,
    command_line,
    listing,
    write_checkpoint,
)

import puna.builder
import puna.runtime.limits
from puna.errors import PunaError
from puna.manifest import MANIFEST_FILE, write_manifest
from puna.strict_json import canonical_json

Damage = Callable[[Path], object]
BEAMS = ("--num-beams", 4)
Q = "layers.0.attn.q.weight"


def cut(name: str, keep: float | int) -> Damage:
    """Shorten a file to a number of bytes, or to a part of its size."""

    def damage(directory: Path) -> None:
        path = directory / name
        size = keep if isinstance(keep, int) else int(path.stat().st_size * keep)
        os.truncate(path, size)

    return damage


def write(name: str, text: str) -> Damage:
    return lambda directory: (directory / name).write_text(text)


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def edit_json(name: str, **changes: Any) -> Damage:
    def damage(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(data | changes))

    return damage


SHARD = "model-00001-of-00002.safetensors"
CHECKPOINT_DAMAGE = {
    "no config": (remove("config.json"), "holds no checkpoint; needed config.json"),
    "no weights": (
        lambda d: [path.unlink() for path in d.glob("model*")],
        "has a config.json and no weights; needed one of model.safetensors",
    ),
    "missing file of an index": (remove(SHARD), f"lacks 1 of 2 weight files ({SHARD}); download"),
    "empty file": (cut(SHARD, 0), f"{SHARD} is empty; download it again"),
    "cut data": (cut(SHARD, 0.9), f"{SHARD} is cut short or damaged"),
    "cut header": (cut(SHARD, 100), f"{SHARD} is cut short or damaged"),
    "cut length": (cut(SHARD, 5), f"{SHARD} is cut short or damaged"),
    "header no JSON": (
        lambda d: (d / SHARD).write_bytes((8).to_bytes(8, "little") + b"}" * 16),
        "its header is not valid JSON; download it again",
    ),
    "config no JSON": (write("config.json", "{"), "config.json is not valid JSON"),
    "config no object": (write("config.json", "[]"), "config.json holds []; it must be a JSON"),
    "index elsewhere": (
        write("model.safetensors.index.json", '{"weight_map": {"x": "../../secret.bin"}}'),
        "needed a file beside it",
    ),
    "other architecture": (
        edit_json("config.json", architectures=["MistralForCausalLM"]),
        "this is 'MistralForCausalLM'; puna builds LlamaForCausalLM",
    ),
    "quantised": (
        edit_json("config.json", quantization_config={"quant_method": "fp8"}),
        "the weights are quantised ('fp8')",
    ),
    "layers": (edit_json("config.json", num_hidden_layers=3), "missing: layers.2.attn.k.weight, "),
    "heads": (edit_json("config.json", num_key_value_heads=3), "not a multiple of num_kv_heads"),
    "vocabulary": (edit_json("config.json", vocab_size=301), "embed.weight is [300, 64] instead"),
}


@pytest.mark.parametrize("name", CHECKPOINT_DAMAGE)
def test_damaged_checkpoint(
    name: str, hf_checkpoint: Path, copied: Any, tmp_path: Path, refused: Refused
) -> None:
    damage, message = CHECKPOINT_DAMAGE[name]
    source = copied(hf_checkpoint)
    damage(source)
    before = listing(source)
    assert message in refused("build", source, "-o", tmp_path / "out" / "engine")
    assert message in refused("plan", source)
    assert listing(source) == before and not (tmp_path / "out").exists()


def test_missing_and_empty_checkpoint(tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "engine"
    assert "does not exist; needed a checkpoint" in refused("build", tmp_path / "no", "-o", out)
    assert "File name too long" in refused("build", "x" * 300, "-o", out)
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint; needed" in refused("build", tmp_path / "empty", "-o", out)
    (tmp_path / "file").write_text("hello")
    assert "is a file and no GGUF" in refused("build", tmp_path / "file", "-o", out)
    (tmp_path / "model.gguf").touch()
    assert "model.gguf is empty" in refused("build", tmp_path / "model.gguf", "-o", out)
    assert "name either a checkpoint or --dummy" in refused("build", "-o", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "model.gguf"]


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path, refused: Refused) -> None:
    weights = tiny_weights()
    del weights["norm.weight"], weights["layers.1.mlp.up.weight"]
    weights[Q] = weights[Q][:32]
    extra = {"model.layers.0.extra.weight": np.zeros(3, np.float32)}
    write_hf(tmp_path / "hf", weights, extra=extra)
    line = refused("build", tmp_path / "hf", "-o", tmp_path / "engine")
    for part in (
        "missing: layers.1.mlp.up.weight, norm.weight; ",
        "unexpected: model.layers.0.extra.weight; ",
        f"wrong shape: {Q} is [32, 64] instead of [64, 64]: get the checkpoint again",
    ):
        assert part in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q, "norm.weight", "head.weight", "layers.1.mlp.down.weight"])
def test_values_that_are_not_finite(
    name: str, value: float, tmp_path: Path, refused: Refused
) -> None:
    weights = tiny_weights()
    weights[name].flat[-1] = value
    write_hf(tmp_path / "hf", weights)
    line = refused("build", tmp_path / "hf", "-o", tmp_path / "engine", "--quant", "int8")
    assert f"{name} holds NaN or infinite values: get the checkpoint again" in line
    assert os.listdir(tmp_path) == ["hf"], "a failed build leaves nothing"


def test_values_beyond_float16(tmp_path: Path, puna: Puna, refused: Refused) -> None:
    weights = tiny_weights()
    weights[Q][0, 0] = 1e6
    build = ("build", write_hf(tmp_path / "hf", weights), "-o", tmp_path / "engine", "--dtype")
    assert "build with --dtype bfloat16 or float32" in refused(*build, "float16")
    assert puna(*build, "bfloat16").status == 0


class Caller:
    """Pickles as a call of a harmless stand-in for os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickle_that_calls(tmp_path: Path, refused: Refused) -> None:
    source, marker = tmp_path / "hf", tmp_path / "called"
    write_hf(source, tiny_weights())
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Caller(marker)}, 2))
        archive.writestr("archive/version", "3")
    assert "pytorch_model.bin" in refused("build", source, "-o", tmp_path / "engine")
    assert not marker.exists()


def test_damaged_meta_checkpoint(tmp_path: Path, refused: Refused) -> None:
    source = write_meta(tmp_path / "meta", tiny_weights())
    cut("consolidated.00.pth", 0.8)(source)
    build = ("build", source, "-o", tmp_path / "engine")
    assert "consolidated.00.pth is cut short or damaged" in refused(*build)
    (source / "consolidated.00.pth").unlink()
    assert "no consolidated.00.pth; download it" in refused(*build)


def test_gguf_that_puna_does_not_read(tmp_path: Path, refused: Refused) -> None:
    path, weights = tmp_path / "model.gguf", tiny_weights()
    build = ("build", path, "-o", tmp_path / "engine")
    write_gguf(path, weights, architecture="qwen2")
    assert "holds 'qwen2'; puna reads GGUF files of llama only" in refused(*build)
    integers = {"blk.0.attn_q.weight": np.zeros((64, 64), np.int32)}
    write_gguf(path, {name: x for name, x in weights.items() if name != Q}, extra=integers)
    line = refused(*build)
    assert "blk.0.attn_q.weight" in line and "I32" in line and "use another quantisation" in line
    write_gguf(path, weights, "Q8_0")
    os.truncate(path, path.stat().st_size - 64)
    assert "is cut short or damaged" in refused(*build)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", 3), "4 heads and 2 KV heads cannot be split over tp 3: use tp 1, 2, 4"),
        (("--tp", 0), "tp_size is 0; it must be a positive whole number"),
        (("--pp", 3), "2 layers cannot be split over pp 3: use pp 2 or fewer"),
        (("--target", "sm_90"), "target 'sm_90' is not built by this version"),
        (("--kv-dtype", "fp8"), "use auto"),
        (("--group-size", 32), "needs --quant int8 or int4"),
        (("--quant", "int8", "--group-size", 7), "use a multiple of 16"),
        (("--max-seq-len", 0), "must be a positive whole number"),
        (("--max-batch-size", 9, "--max-num-tokens", 8), "is below max_batch_size 9"),
        (("--tp", "two"), "invalid int value: 'two' (see puna build --help)"),
        (("--quant", "int2"), "invalid choice: 'int2'"),
        (("--no-such-option",), "--no-such-option"),
        (("--workers", 0), "workers is 0; it must be at least 1"),
        (("--workers", -1), "workers is -1; it must be at least 1"),
        (("--tokenizer", "nowhere"), "nowhere has no tokenizer"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(
    options: tuple[object, ...], message: str, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("build", "--dummy", DUMMY, "-o", tmp_path / "out" / "e", *options)
    assert not (tmp_path / "out").exists()


def test_too_little_disk(
    hf_checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refused("build", hf_checkpoint, "-o", tmp_path / "out" / "engine")
    assert "has 1 kB free, the engine needs" in line and "or build elsewhere with -o" in line
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up(
    hf_checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    # A rank's file is reserved before it is written; where the system cannot, writing finds out.
    name = "posix_fallocate" if hasattr(os, "posix_fallocate") else "pwrite"
    monkeypatch.setattr(os, name, full)
    line = refused("build", hf_checkpoint, "-o", tmp_path / "engine")
    assert "No space left on device" in line and not os.listdir(tmp_path)


def test_too_little_memory(
    hf_checkpoint: Path,
    engine: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(puna.builder, "available_bytes", lambda: 1000)
    monkeypatch.setattr(puna.runtime.limits, "available_bytes", lambda: 1000)
    line = refused("build", hf_checkpoint, "-o", tmp_path / "out" / "engine")
    assert "1 kB of RAM are free" in line and "lower --workers" in line
    assert not (tmp_path / "out").exists()
    line = refused("run", engine, "--prompt", "Hello")
    assert "1 kB are free" in line and "lower --kv-cache-bytes" in line


def test_existing_output(hf_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    file, folder, link = (tmp_path / name for name in ("file", "folder", "link"))
    file.write_text("mine")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text("{}")
    link.symlink_to(folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for out in (file, folder, link, tmp_path / "dangling", hf_checkpoint):
        build = ("build", hf_checkpoint, "-o", out)
        assert "exists already: choose another -o, or replace it with --force" in refused(*build)
        assert "--force replaces puna engines only: remove it yourself" in refused(
            *build, "--force"
        )
    assert listing(tmp_path) == before and link.is_symlink()
    inside_a_file = refused("build", hf_checkpoint, "-o", file / "engine")
    assert "cannot be written: File exists: choose another -o" in inside_a_file
    too_long = refused("build", hf_checkpoint, "-o", tmp_path / ("x" * 300) / "engine")
    assert "cannot be written: File name too long" in too_long


def test_force_keeps_what_is_not_the_engines(
    hf_checkpoint: Path, engine: Path, copied: Any, puna: Puna, refused: Refused
) -> None:
    out = copied(engine)
    build = ("build", hf_checkpoint, "--force", "-o", out)
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    assert "holds notes.txt, which is no part of an engine" in refused(*build)
    assert listing(out) == before
    (out / "notes.txt").unlink()
    (out / "manifest.json").write_text("damaged")
    assert puna(*build).status == 0 and puna("verify", out).status == 0
    (out / "config.json").write_text("damaged")
    assert puna(*build).status == 0 and puna("verify", out).status == 0


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
        "engine format 99 found, this puna reads format 2: rebuild the engine",
    ),
    "other target": (
        lambda e: change_config(e, target="sm_90"),
        "was built for sm_90, this version of puna runs cpu engines: build it again",
    ),
    "unknown layout": (
        lambda e: change_config(e, weights={"embed.weight": {"format": "int8", "layout": "rows"}}),
        "layout 'rows' is unknown; this version of puna reads tiles: rebuild the engine",
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


def test_exit_status_and_one_line(engine: Path, tmp_path: Path) -> None:
    for arguments in (
        ("run", engine, "--prompt", b"caf\xe9"),
        ("run", engine),
        ("build", tmp_path / "no\nwhere\x1b[31m", "-o", tmp_path / "engine"),
        ("no-such-command",),
    ):
        found = command(*arguments, capture_output=True)
        assert (found.returncode, found.stdout) == (2, b""), found
        assert found.stderr.startswith(b"puna: ") and found.stderr.count(b"\n") == 1, found
        assert b"\x1b" not in found.stderr


def test_traceback_only_with_debug(puna: Puna, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match="does not exist"):
        puna("plan", tmp_path / "nowhere", "--debug")
    found = command("plan", tmp_path / "nowhere", "--debug", capture_output=True)
    assert found.returncode == 1 and b"Traceback" in found.stderr


def interrupt(process: subprocess.Popen[bytes], when: Callable[[], object]) -> tuple[bytes, bytes]:
    """Send Ctrl-C as soon as `when` holds; returns stdout and stderr."""
    deadline = time.monotonic() + 60
    while not when():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command_line(*arguments), cwd=ROOT, stdout=pipe, stderr=pipe, **options)


@pytest.mark.parametrize("is_there", [False, True])
def test_interrupted_build(is_there: bool, tmp_path: Path, puna: Puna) -> None:
    out = tmp_path / "engine"
    if is_there:
        assert puna("build", "--dummy", DUMMY, "-o", out).status == 0
    before = listing(tmp_path)
    large = "hidden=1024,layers=24,heads=8,ffn=4096,vocab=300"
    process = start("build", "--dummy", large, "--materialize", "--force", "-o", out)
    _, err = interrupt(process, lambda: list(tmp_path.glob("engine.tmp-*/rank0.safetensors")))
    assert (process.returncode, err) == (130, b"\npuna: interrupted\n")
    assert listing(tmp_path) == before and len(os.listdir(tmp_path)) == is_there


def test_interrupted_run(tmp_path: Path, tokenizer_dir: Path, puna: Puna) -> None:
    shape = "hidden=64,layers=8,heads=4,ffn=96,vocab=300,max_positions=8192"
    out = tmp_path / "engine"
    puna("build", "--dummy", shape, "--tokenizer", tokenizer_dir, "-o", out)
    shown = (tmp_path / "shown").open("wb")
    ask = ("run", out, "--prompt", "Hello", "--stream", "--max-new-tokens", 8000, "--ignore-eos")
    with shown:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command_line(*ask), cwd=ROOT, stdout=shown, stderr=pipe)
        _, err = interrupt(process, lambda: (tmp_path / "shown").stat().st_size)
    assert (process.returncode, err) == (130, b"\npuna: interrupted\n")
    assert puna("verify", out).status == 0


def test_interrupted_chat(engine: Path) -> None:
    process = start("chat", engine, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.read(1), "it waits for the next question, or still answers"
    _, err = interrupt(process, lambda: True)
    assert (process.returncode, err) == (130, b"\npuna: interrupted\n")


def test_checkpoint_with_nothing_wrong(tmp_path: Path, puna: Puna) -> None:
    """What the damage above is done to builds and runs."""
    source, out = write_checkpoint(tmp_path / "hf"), tmp_path / "engine"
    assert puna("build", source, "-o", out).status == 0
    assert puna("run", out, "--prompt", "Hello").status == 0
