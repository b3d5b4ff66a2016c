"""`puna bench` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from small_models import DUMMY, Puna, Refused, command

import puna.bench.latency
from puna.engine import read_config
from puna.memory import kv_block_bytes

KEYS = [
    "engine",
    "device",
    "threads",
    "ranks",
    "batch",
    "isl",
    "osl",
    "rounds",
    "ttft_ms",
    "prefill_tok_s",
    "decode_ms",
    "tok_s",
    "weight_bytes",
    "kv_bytes",
    "gb_s",
    "read_gb_s",
    "roofline",
]
SMALL = ("--batch", 2, "--isl", 16, "--osl", 8, "--rounds", 2, "--threads", 1)


@pytest.fixture
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puna.bench.latency, "read_bandwidth", lambda threads, num_bytes: 12.5)


@pytest.mark.usefixtures("known_bandwidth")
def test_json(engine: Path, puna: Puna) -> None:
    found = puna("bench", "latency", engine, *SMALL, "--json")
    assert (found.status, found.err, found.out.count("\n")) == (0, "", 1)
    result = json.loads(found.out)
    assert list(result) == KEYS
    assert [result[key] for key in KEYS[2:8]] == [1, 1, 2, 16, 8, 2]
    assert result["engine"] == str(engine) and isinstance(result["device"], str)
    with safe_open(engine / "rank0.safetensors", "np") as file:
        names = [n for n in file.keys() if not n.startswith(("_pad", "embed"))]  # noqa: SIM118
        assert result["weight_bytes"] == sum(file.get_tensor(name).nbytes for name in names)
    assert result["ttft_ms"] > 0 and result["decode_ms"] > 0
    assert result["prefill_tok_s"] == pytest.approx(2 * 16 * 1000 / result["ttft_ms"], rel=1e-4)
    assert result["tok_s"] == pytest.approx(2 * 1000 / result["decode_ms"], rel=1e-4)
    num_bytes = result["weight_bytes"] + result["kv_bytes"]
    assert result["gb_s"] == pytest.approx(num_bytes / result["decode_ms"] / 1e6, rel=1e-4)
    assert result["read_gb_s"] == 12.5
    assert result["roofline"] == pytest.approx(result["gb_s"] / 12.5, rel=1e-4)


@pytest.mark.usefixtures("known_bandwidth")
def test_table(engine: Path, puna: Puna) -> None:
    found = puna("bench", "latency", engine, *SMALL)
    assert (found.status, found.err) == (0, "")
    lines = found.out.splitlines()
    assert lines[0].startswith(f"{engine} on ") and lines[0].endswith(", threads: 1")
    assert lines[1] == "2 sequences of 16 prompt tokens and 8 new ones, rounds: 2"
    assert [line[:12].rstrip() for line in lines[3:11]] == [
        "first token",
        "prompt",
        "each token",
        "output",
        "weights",
        "KV cache",
        "memory reads",
        "read limit",
    ]
    assert "12.5 GB/s" in lines[10] and lines[-1].startswith("roofline ")


def test_without_a_tokenizer_in_a_process(tmp_path: Path, puna: Puna) -> None:
    engine = tmp_path / "bare"
    assert puna("build", "--dummy", DUMMY, "-o", engine).status == 0
    found = command("bench", "latency", engine, *SMALL, "--json", capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")
    result = json.loads(found.stdout)
    assert result["read_gb_s"] > 0 and result["engine"] == str(engine)


def test_refused(engine: Path, tmp_path: Path, refused: Refused) -> None:
    bench = ("bench", "latency", engine)
    assert "isl 100 + osl 29 is 129 tokens; the engine takes at most 128: lower them" in refused(
        *bench, "--isl", 100, "--osl", 29
    )
    assert "batch is 1000; the engine takes at most " in refused(*bench, *SMALL, "--batch", 1000)
    assert "osl is 1; it must be at least 2" in refused(*bench, "--osl", 1)
    assert "threads is 0" in refused(*bench, *SMALL[:-2], "--threads", 0)
    too_little = 3 * kv_block_bytes(read_config(engine), 0)  # of which two are usable
    assert "raise --kv-cache-bytes" in refused(*bench, *SMALL, "--kv-cache-bytes", too_little)
    assert "does not exist" in refused("bench", "latency", tmp_path / "nowhere")
    assert "invalid int value: 'x'" in refused(*bench, "--isl", "x")
    assert "required: BENCHMARK (see puna bench --help)" in refused("bench")


@pytest.mark.parametrize("arguments", [("bench",), ("bench", "latency")], ids=" ".join)
def test_help(arguments: tuple[str, ...], puna: Puna) -> None:
    found = puna(*arguments, "--help")
    assert (found.status, found.err) == (0, "")
    assert found.out.startswith("usage: puna bench") and "\n  puna bench latency " in found.out
