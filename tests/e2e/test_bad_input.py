"""Checkpoints and builds that go wrong: one line that says found, needed and what to do; nothing is
lost. Engines and requests: test_bad_engine."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoint_writers import tiny_weights, write_gguf, write_hf, write_meta
from damage import cut, edit_json, remove, write
from small_models import (
    DUMMY,
    Puna,
    Refused,
    listing,
    write_checkpoint,
)

import puna.builder
import puna.runtime.limits

Q = "layers.0.attn.q.weight"


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
        (("--target", "sm_70"), "target 'sm_70' is not built by this version of puna: use one of"),
        (("--target", "sm_90", "--dtype", "float32"), "dtype float32 is not available on target"),
        (("--target", "sm_90", "--quant", "int8"), "quant int8 is not available on target sm_90"),
        (("--target", "sm_90", "--kv-dtype", "int8"), "use auto, float16 or bfloat16 (or --target"),
        (("--target", "sm_90", "--tp", 2), "several ranks are not available on target sm_90"),
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


def test_checkpoint_with_nothing_wrong(tmp_path: Path, puna: Puna) -> None:
    """What the damage above is done to builds and runs."""
    source, out = write_checkpoint(tmp_path / "hf"), tmp_path / "engine"
    assert puna("build", source, "-o", out).status == 0
    assert puna("run", out, "--prompt", "Hello").status == 0
