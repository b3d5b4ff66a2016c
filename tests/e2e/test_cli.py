"""The command line as a user runs it: every command, from a checkpoint to an answer."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from small_models import DUMMY, ROOT, Puna, Refused, command, command_line, listing

from puna import LLM, SamplingParams
from puna.auto_target import choose_target
from puna.checkpoint.dummy import PRESETS
from puna.cli.quickstart import QUESTION
from puna.nvidia import Driver, Gpu, Packages

COMMANDS = ("build", "plan", "inspect", "verify", "run", "chat", "summarize", "quickstart")
RESULT_KEYS = [
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "seconds",
]
PLAN_KEYS = {"weights", "kv_cache", "workspace", "total"}


def test_from_checkpoint_to_text(shared_data: Path, tmp_path: Path, puna: Puna) -> None:
    source, engine = shared_data / "stories260K" / "meta", tmp_path / "engine"
    built = puna("build", source, "-o", engine)
    assert built.status == 0 and f"puna run {engine}" in built.out
    planned = json.loads(puna("plan", source, "--json").out)
    size = (engine / "rank0.safetensors").stat().st_size
    assert planned["ranks"][0]["weights"] == size
    shown = puna("inspect", engine).out
    assert "5 layers, hidden 64, 8 heads, 4 KV heads of 8" in shown and f"{size:,}" in shown
    assert json.loads(puna("inspect", engine, "--json").out)["resolved"] == planned["resolved"]
    assert puna("verify", engine).out.endswith("all as built\n")
    ask = ("run", engine, "--prompt", "Once upon a time", "--max-new-tokens", 16)
    text = puna(*ask).out
    assert text.startswith(", there was a little girl named Lily.")
    assert puna(*ask, "--stream").out == text
    result = json.loads(puna(*ask, "--json").out)
    assert result["text"] + "\n" == text and result["finish_reason"] == "length"


def test_run(engine: Path, puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("run", engine, "--prompt", "Hello", "--max-new-tokens", 12)
    found = puna(*ask, "--json")
    assert (found.status, found.err) == (0, "")
    result = json.loads(found.out)
    assert list(result) == RESULT_KEYS
    assert (result["prompt_tokens"], result["completion_tokens"]) == (5, 12)
    assert len(result["token_ids"]) == 12 and result["seconds"] > 0
    plain = puna(*ask).out
    assert plain == result["text"] + "\n" == puna(*ask, "--stream").out
    stdin = io.TextIOWrapper(io.BytesIO(b"Hello"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert puna(*ask[:3], "-", *ask[4:]).out == plain


def test_seed(engine: Path, puna: Puna) -> None:
    def sampled(seed: int) -> str:
        ask = ("run", engine, "--prompt", "Hello", "--max-new-tokens", 20, "--temperature", 2)
        return puna(*ask, "--json", "--seed", seed).out.partition('"seconds"')[0]

    assert sampled(7) == sampled(7) != sampled(8)


def test_stop_and_length(engine: Path, puna: Puna) -> None:
    ask = ("run", engine, "--prompt", "Hello", "--json")
    text = json.loads(puna(*ask, "--max-new-tokens", 12).out)["text"]
    stopped = json.loads(puna(*ask, "--max-new-tokens", 12, "--stop", text[3]).out)
    assert (stopped["finish_reason"], stopped["text"]) == ("stop", text[: text.index(text[3])])
    longest = json.loads(puna(*ask, "--max-new-tokens", 1000, "--ignore-eos").out)
    assert longest["prompt_tokens"] + longest["completion_tokens"] == 128


def test_beams(engine: Path, puna: Puna) -> None:
    ask = ("run", engine, "--prompt", "Hello", "--max-new-tokens", 12, "--num-beams")
    result = json.loads(puna(*ask, 4, "--json").out)
    assert list(result) == [*RESULT_KEYS, "score"] and len(result["token_ids"]) == 12
    assert puna(*ask, 4).out == result["text"] + "\n"
    assert puna(*ask, 4, "--temperature", 0).out == result["text"] + "\n"
    with LLM(engine) as llm:
        params = SamplingParams(max_new_tokens=12, num_beams=4, length_penalty=2.0)
        output = llm.generate("Hello", params)[0]
        fewer = llm.generate("Hello", SamplingParams(max_new_tokens=12, num_beams=2))[0]
    penalised = json.loads(puna(*ask, 4, "--length-penalty", 2, "--json").out)
    assert (penalised["score"], penalised["text"]) == (output.score, output.text)
    assert penalised["score"] == pytest.approx(result["score"] / 12)
    assert json.loads(puna(*ask, 2, "--json").out)["score"] == fewer.score


def test_early_stopping(engine: Path, puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SamplingParams] = []
    generate = LLM.generate
    monkeypatch.setattr(
        LLM,
        "generate",
        lambda llm, prompts, params: asked.append(params) or generate(llm, prompts, params),
    )
    ask = ("run", engine, "--prompt", "Hello", "--max-new-tokens", 4, "--num-beams", 3)
    for options in ((), ("--early-stopping",), ("--early-stopping", "never")):
        assert puna(*ask, *options).status == 0
    assert [params.early_stopping for params in asked] == [False, True, "never"]


def test_chat(engine: Path, puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(text: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        found = puna("chat", engine, "--max-new-tokens", 4, "--stop", "\n")
        assert (found.status, found.err) == (0, "")
        return found.out.split("\n")

    first, second, again, end = talk("Hello\nHello\n/new\nHello\n")
    assert first == again and end == ""
    assert second != first, "the second answer does not depend on the first"
    assert talk("Hello\n\nHello\n") == [first, ""], "an empty line ends the conversation"


def test_quickstart(hf_checkpoint: Path, tmp_path: Path, puna: Puna) -> None:
    run = ("quickstart", "--model", hf_checkpoint, "--cache", tmp_path / "cache")
    first, second = puna(*run), puna(*run)
    assert (first.status, first.err, second.status) == (0, "", 0)
    assert f"(none) for cpu from {hf_checkpoint}" in first.out and f"> {QUESTION}\n" in first.out
    assert second.out.startswith("engine of an earlier run: ")
    (built,) = (tmp_path / "cache" / "engines").iterdir()
    assert built.name.endswith("-cpu")
    assert f"puna chat {built}\n" in second.out and puna("verify", built).status == 0
    asked = puna(*run, "--question", "Who are you?", "--target", "cpu").out
    assert "> Who are you?\n" in asked and asked.startswith("engine of an earlier run: ")


def test_quickstart_with_a_gpu_that_cannot_be_used_yet(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is fetched; and never an engine for the CPU in its place."""
    driver = Driver((13, 0), (Gpu(0, "NVIDIA H200", (9, 0), 1),))

    def auto() -> tuple[str, str]:
        return choose_target(driver, Packages(("triton",), None))

    monkeypatch.setattr("puna.auto_target.auto_target", auto)
    monkeypatch.setattr("puna.cli.quickstart.fetch_smollm2", lambda cache: 1 / 0)
    line = refused("quickstart", "--cache", tmp_path)
    assert 'the GPU needs triton, not installed: pip install "puna[cuda]", or' in line
    assert not list(tmp_path.iterdir())


def test_module_and_help() -> None:
    found = command("--help", capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")
    assert all(name.encode() in found.stdout for name in COMMANDS)
    assert command(capture_output=True).stdout == found.stdout
    assert command("--version", capture_output=True).stdout.startswith(b"puna ")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, puna: Puna) -> None:
    found = puna(name, "--help")
    assert (found.status, found.err) == (0, "")
    assert f"usage: puna {name}" in found.out and f"\n  puna {name}" in found.out


@pytest.mark.parametrize("options", [(), ("--quant", "int8"), ("--tp", 2), ("--pp", 2)], ids=str)
def test_plan_is_what_is_built(options: tuple[object, ...], tmp_path: Path, puna: Puna) -> None:
    arguments = ("--dummy", DUMMY, "--materialize", *options)
    found = puna("plan", *arguments, "--json")
    assert (found.status, found.err) == (0, "")
    planned = json.loads(found.out)
    assert planned.keys() == {"ranks", "resolved"}
    for rank in planned["ranks"]:
        assert rank.keys() == PLAN_KEYS and all(type(value) is int for value in rank.values())
        assert rank["total"] == rank["weights"] + rank["kv_cache"] + rank["workspace"]
    for value, reason in planned["resolved"].values():
        assert value is not None and isinstance(reason, str) and reason
    assert {"dtype", "quant", "kv_dtype", "target", "max_seq_len"} <= planned["resolved"].keys()
    engine = tmp_path / "engine"
    assert puna("build", *arguments, "-o", engine).status == 0
    sizes = [path.stat().st_size for path in sorted(engine.glob("rank*"))]
    assert sizes == [rank["weights"] for rank in planned["ranks"]]
    text = puna("plan", *arguments).out
    assert all(f"{rank['total']:,}" in text for rank in planned["ranks"])


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "float32"),
        ("--dtype", "float16"),
        ("--dtype", "bfloat16"),
        ("--quant", "int8"),
        ("--quant", "int4", "--group-size", 32),
    ],
    ids=lambda options: options[1],
)
def test_recipe_is_the_materialised_engine(
    options: tuple[object, ...], tmp_path: Path, puna: Puna
) -> None:
    arguments = ("build", "--dummy", DUMMY, "--seed", 3, *options, "-o")
    recipe, whole = tmp_path / "recipe", tmp_path / "whole"
    assert "recipe" in puna(*arguments, recipe).out
    assert puna(*arguments, whole, "--materialize").status == 0
    assert sorted(listing(recipe)) == ["config.json", "manifest.json"]
    assert "rank0.safetensors" in listing(whole)
    found = []
    for path in (recipe, whole):
        assert puna("verify", path).status == 0
        with LLM(path) as llm:
            found.append(llm.logits([1, 2, 3, 250]))
    assert np.array_equal(*found)


def test_wrong_dummy_names_the_presets(refused: Refused, tmp_path: Path) -> None:
    line = refused("build", "--dummy", "llama-9", "-o", tmp_path / "engine")
    assert all(name in line for name in PRESETS)


def test_tokenizer_from_elsewhere(tokenizer_dir: Path, tmp_path: Path, puna: Puna) -> None:
    bare, own = tmp_path / "bare", tmp_path / "own"
    built = puna("build", "--dummy", DUMMY, "-o", bare)
    assert "no tokenizer; text needs --tokenizer DIR" in built.err
    with_it = puna("build", "--dummy", DUMMY, "--tokenizer", tokenizer_dir, "-o", own)
    assert "--tokenizer" not in with_it.err and "puna run" not in built.out
    ask = ("--prompt", "Hello", "--max-new-tokens", 8)
    text = puna("run", own, *ask)
    assert text.status == 0 and puna("run", bare, *ask, "--tokenizer", tokenizer_dir) == text


def test_engine_without_a_tokenizer(tmp_path: Path, puna: Puna, refused: Refused) -> None:
    puna("build", "--dummy", DUMMY, "-o", tmp_path / "bare")
    for arguments in (("run", tmp_path / "bare", "--prompt", "x"),):
        assert "--tokenizer DIR" in refused(*arguments)


def test_output_beside_and_inside_the_checkpoint(hf_checkpoint, copied, puna: Puna) -> None:
    source = copied(hf_checkpoint)
    before = listing(source)
    for name in ("first/", "second", "deep/er/third/"):
        assert puna("build", source, "-o", f"{source}/{name}").status == 0
        assert puna("verify", source / name).status == 0
    assert listing(source / "first") == listing(source / "second")
    assert puna("build", source, "-o", f"{source}/first/", "--force").status == 0
    assert listing(source / "first") == listing(source / "deep" / "er" / "third")
    after = listing(source)
    assert {name: data for name, data in after.items() if name in before} == before
    assert not [name for name in after if ".tmp-" in name]


def test_no_bar_unless_stderr_is_a_terminal(hf_checkpoint: Path, tmp_path: Path) -> None:
    quiet = command("build", hf_checkpoint, "-o", tmp_path / "a", capture_output=True)
    assert (quiet.returncode, quiet.stderr) == (0, b"")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    try:
        command("build", hf_checkpoint, "-o", tmp_path / "b", stderr=theirs, stdout=-1)
        assert select.select([ours], [], [], 0)[0], "nothing was drawn"
        drawn = os.read(ours, 65536)
    finally:
        os.close(theirs)
        os.close(ours)
    assert b"building:" in drawn and b"\r" in drawn


def test_names_that_are_no_unicode(hf_checkpoint: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/eng\xffine"
    built = command("build", hf_checkpoint, "-o", name, capture_output=True)
    assert (built.returncode, built.stderr) == (0, b"")
    assert command("inspect", name, capture_output=True).returncode == 0
    missing = command("inspect", name + b"\xfe", capture_output=True)
    assert missing.returncode == 2 and missing.stderr.count(b"\n") == 1


def test_reader_that_leaves(engine: Path) -> None:
    with subprocess.Popen(
        command_line("inspect", engine),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
