"""How commands end: exit status, one line or a traceback, Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from small_models import (
    DUMMY,
    ROOT,
    Puna,
    command,
    command_line,
    listing,
)

from puna.cli import exit_status
from puna.errors import PunaError


@pytest.fixture(autouse=True)
def heeds_ctrl_c() -> Iterator[None]:
    """What is started heeds Ctrl-C also where these tests run in the background of a shell, which
    lets its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


class Halting(io.RawIOBase):
    """A file that takes at most seven bytes a write, as a terminal may when a signal arrives."""

    def __init__(self) -> None:
        self.taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.taken += bytes(data[:7])
        return min(len(data), 7)


def test_unbuffered_output_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PYTHONUNBUFFERED makes of stdout; a short write lost the rest of an article."""
    text = "An article of several words.\nAnd its summary\n"
    for cut in (True, False):
        raw = Halting()
        stream = io.TextIOWrapper(cast("io.BufferedIOBase", raw), "utf-8", write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        if cut:
            sys.stdout.write(text)
        else:
            assert exit_status(lambda: print(text, end="") or 0) == 0
        assert (raw.taken.decode() == text) != cut


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
