"""What the flags of examples/llama/run.py and summarize.py do; those of build.py: test_guide_flags.

All their names are compared with the guide's there.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from small_models import Ran, Script

from puna.tokenizer import load_tokenizer


@pytest.fixture
def answer(run_example: Script, engine: Path) -> Script:
    def run(arguments: str) -> Ran:
        found = run_example("run", f"--max_output_len=9 --engine_dir {engine} {arguments}")
        assert found.status == 0, found
        return found

    return run


def lines(found: Ran, kind: str = "Output") -> list[str]:
    return re.findall(rf'^{kind}: "(.*?)"$', found.out, re.MULTILINE | re.DOTALL)


def test_prompts_and_outputs(answer: Script, engine: Path, tmp_path: Path) -> None:
    assert lines(answer(""), "Input") == ["Born in north-east France, Soyer trained as a"]
    both = answer("--input_text One␣day Two")
    assert lines(both, "Input") == ["One day", "Two"] and len(set(lines(both))) == 2
    (tmp_path / "a.txt").write_text("One day\n")
    assert lines(answer(f"--input_file {tmp_path}/a.txt")) == lines(both)[:1]

    answer(
        f"--input_text One␣day Two --output_csv {tmp_path}/x/a.csv --output_npy {tmp_path}/a.npy"
    )
    rows = np.load(tmp_path / "a.npy")
    assert rows.dtype == np.int32 and len(rows) == 2
    assert (np.loadtxt(tmp_path / "x" / "a.csv", delimiter=",", dtype=int) == rows).all()
    for suffix in ("csv", "npy"):
        path = tmp_path / f"in.{suffix}"
        ids = [load_tokenizer(engine / "tokenizer").encode("One day")]
        if suffix == "csv":
            path.write_text("\n".join(",".join(map(str, row)) for row in ids))
        else:
            np.save(path, np.array(ids))
        for flag in ("input_tokens", "input_file"):
            found = answer(f"--{flag} {path}")
            assert lines(found, "Input") == ["One day"] and len(lines(found)) == 1


def test_files_that_cannot_be_read(run_example: Script, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("1,two\n")
    np.save(tmp_path / "float.npy", np.ones((1, 3)))
    (tmp_path / "empty.csv").write_text("")
    for name in ("bad.csv", "float.npy", "empty.csv", "missing.csv", "odd.json"):
        found = run_example(
            "run",
            f"--max_output_len=9 --engine_dir {engine} --input_tokens {tmp_path}/{name}",
        )
        assert (found.status, found.err.count("\n")) == (2, 1) and name in found.err


def test_sampling_flags(answer: Script) -> None:
    greedy = lines(answer(""))
    assert lines(answer("--top_k 0 --top_p 0.0")) == greedy == lines(answer("--temperature 5"))
    for idle in ("--temperature 5", "--top_p 0.5", "--top_k 0 --top_p 0.0"):
        assert "greedy without --top_k above 1" in answer(idle).err
    assert answer("--top_k 40 --temperature 0.5").err == ""
    sampled = lines(answer("--top_k 0 --top_p 1.0"))
    assert sampled != greedy and sampled == lines(answer("--top_k 0 --top_p 1.0"))
    assert lines(answer("--top_k 40")) != greedy
    assert lines(answer("--top_k 40 --temperature 0.01")) == greedy
    assert lines(answer("--top_k 40 --top_p 0.000001")) == greedy
    assert lines(answer("--repetition_penalty 5")) != greedy


def test_beams(answer: Script) -> None:
    beams = lines(answer("--num_beams 3"))
    assert len(set(beams)) == 3
    # One of the sequences that such a search finds ends early: the best one if length is a fault.
    wide = "--num_beams 8 --max_output_len 40 --length_penalty"
    long, short = (lines(answer(f"{wide} {penalty}")) for penalty in (1, -4))
    assert len(short[0]) < len(long[0])


def test_streaming(
    examples: dict[str, ModuleType], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pieces(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.num_flushed = 0

        def flush(self) -> None:
            self.num_flushed += 1

    def streamed(arguments: str) -> tuple[str, int]:
        pieces = Pieces()
        monkeypatch.setattr(sys, "stdout", pieces)
        command = f"--max_output_len=20 --engine_dir {engine} {arguments}".split()
        run = examples["run"]
        assert run.run(examples["flags"].Flags(run.parser(), run.DEFAULTS, command)) == 0
        return pieces.getvalue(), pieces.num_flushed

    whole, _ = streamed("")
    (by_five, num_fives), (by_two, num_twos) = (
        streamed("--streaming"), streamed("--streaming --streaming_interval 2")
    )  # fmt: skip
    assert by_five == by_two == whole
    assert num_twos > num_fives > 2


def test_the_other_flags_of_run(
    answer: Script, run_example: Script, engine: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    assert len(lines(answer("--max_output_len=2"))[0]) < len(lines(answer(""))[0])
    assert "tokens/s" in answer("--log_level info").out and "tokens/s" not in answer("").out
    assert "using" in answer(f"--tokenizer_dir {tmp_path}").err
    assert answer(f"--tokenizer_dir {tokenizer_dir}").err == ""
    assert "every sequence fits" in answer("--max_kv_cache_len 60").err
    run = f"--max_output_len=9 --engine_dir {engine}"
    for arguments, reason in (
        ("--max_kv_cache_len 50", "a sequence may have 5"),
        ("--streaming --num_beams 2", "exclude each other"),
        ("--master_port 99999", "master port 99999"),
        ("--streaming_interval 2", "needs --streaming"),
        ("--length_penalty 2", "length_penalty is 2.0 without beams"),
        ("--num_beams 2 --top_k 5", "beam search"),
        ("--input_text a --input_tokens b.csv", "exclude each other"),
        ("--streaming --output_csv a.csv", "exclude each other"),
        (f"--engine_dir {tmp_path}/none", "none"),
    ):
        found = run_example("run", f"{run} {arguments}")
        assert (found.status, found.out, found.err.count("\n")) == (2, "", 1), found
        assert reason in found.err, found.err
    assert "required: --max_output_len" in run_example("run", f"--engine_dir {engine}").err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "llama_outputs"),
        ("--engine_dir e", "summarize e "),
        ("--hf_model_location m", "--hf-model m"),
        ("--test_hf", "--test-hf"),
        ("--data_type bf16", "--data-type bf16"),
        ("--dataset_path d", "--dataset-path d"),
        ("--log_level error", "--quiet"),
        ("--batch_size 3", "--batch-size 3"),
        ("--batch_size 3", "--max-samples 60"),
        ("--max_ite 7", "--max-samples 7"),
        ("--check_accuracy", "--check-accuracy --rouge1-threshold 15.0"),
        ("--check_accuracy --tensorrt_llm_rouge1_threshold 9", "--rouge1-threshold 9.0"),
        ("--num_beams 2", "--num-beams 2"),
        ("--top_k 4", "--top-k 4"),
        ("--output_len 30", "--output-len 30"),
        ("--master_addr h --master_port 9", "--master-addr h --master-port 9"),
    ],
)
def test_flags_of_summarize(arguments: str, expected: str, examples: dict[str, ModuleType]) -> None:
    """They become those of `puna summarize`, which has tests of its own."""
    summarize = examples["summarize"]

    def command(given: str) -> str:
        words = f"--test_trt_llm {given}".split()
        flags = examples["flags"].Flags(summarize.parser(), summarize.DEFAULTS, words)
        return " ".join(summarize.arguments(flags))

    assert expected in command(arguments)
    assert not arguments or expected not in command("")


def test_what_summarize_refuses(run_example: Script) -> None:
    pytest.importorskip("rouge_score")
    for arguments, reason in (
        ("", "nothing is to summarize"),
        ("--test_hf --check_accuracy", "--test_trt_llm"),
        ("--test_trt_llm --tensorrt_llm_rouge1_threshold 3", "needs --check_accuracy"),
        ("--test_trt_llm --engine_dir nowhere", "nowhere"),
    ):
        found = run_example("summarize", arguments)
        assert (found.status, found.out, found.err.count("\n")) == (2, "", 1), found
        assert reason in found.err
