"""`puna summarize` as a user runs it, and the records that it and `puna bench` leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_writers import write_tokenizer
from small_models import Puna, Refused

import puna.bench.latency as puna_bench
from puna import LLM
from puna.builder import build
from puna.plan import BuildConfig
from puna.report import read_records
from puna.summarize import (
    SummaryOptions,
    encode_prompts,
    load_samples,
    summarize_with_llm,
    summarize_with_transformers,
)
from puna.summarize.systems import eos_token_ids

pytest.importorskip("rouge_score")

ROWS = [
    {
        "article": f"{word} came to town and did n't stay." * n,
        "highlights": f"{word} came .\nLeft .",
    }
    for n, word in enumerate(("Ann", "Bob", "Cy", "Dee", "Ed"), 1)
]
LEN = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def own_engine(engine: Path, copied: Callable[[Path], Path]) -> Path:
    """An engine with no records beside it yet."""
    return copied(engine)


def summarize(engine: Path, rows: Path, *more: object) -> tuple[object, ...]:
    return ("summarize", engine, "--dataset-path", rows, "--output-len", LEN, *more)


def test_text(engine: Path, rows: Path, puna: Puna) -> None:
    found = puna(*summarize(engine, rows, "--max-samples", 2))
    assert (found.status, found.err) == (0, "")
    assert found.out.startswith(
        f"Article: {ROWS[0]['article']}\n\nHighlights: Ann came .\nLeft .\n"
    )
    assert "\nSummary (puna): " in found.out and "\npuna, samples: 2\n" in found.out
    names = [line.split("  ")[1] for line in found.out.splitlines()[-6:]]
    assert names == ["total latency", "tokens/s", "rouge1", "rouge2", "rougeL", "rougeLsum"]


def test_json_is_what_the_engine_says(engine: Path, rows: Path, puna: Puna) -> None:
    found = puna(*summarize(engine, rows, "--json", "--batch-size", 2))
    assert (found.status, found.err, found.out.count("\n")) == (0, "", 1)
    report = json.loads(found.out)
    with LLM(engine) as llm:
        assert llm.tokenizer is not None
        prompts = encode_prompts(llm.tokenizer, load_samples(rows, 5).samples, 128, LEN)
        outputs = llm.generate(prompts, SummaryOptions(LEN).sampling_params())
        text = llm.tokenizer.decode(outputs[0].token_ids)
    ours = report["systems"]["puna"]
    assert report["num_samples"] == 5 and report["batch_size"] == 2
    assert report["summaries"] == {"puna": text}
    assert ours["num_tokens"] == sum(len(output.token_ids) for output in outputs)
    assert ours["tok_s"] == pytest.approx(ours["num_tokens"] / ours["seconds"], rel=0.01)
    assert set(ours) >= {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_check_accuracy(engine: Path, rows: Path, puna: Puna) -> None:
    ask = summarize(engine, rows, "--json", "--check-accuracy", "--rouge1-threshold")
    assert puna(*ask, 0).status == 0
    found = puna(*ask, 99)
    rouge1 = json.loads(found.out)["systems"]["puna"]["rouge1"]
    assert found.status == 2 and found.err.count("\n") == 1
    assert f"rouge1 is {rouge1:.2f}, below the threshold 99" in found.err


def test_refused(
    engine: Path, rows: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = summarize(engine, rows)
    assert "max_samples is 0" in refused(*ask, "--max-samples", 0)
    assert "max_batch_size 1000 is not between 1 and" in refused(*ask, "--batch-size", 1000)
    assert "leave no room for a prompt" in refused(*ask, "--output-len", 128)
    assert "--test-hf needs --hf-model DIR" in refused(*ask, "--test-hf")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for path in (gguf, tmp_path):
        line = refused(*ask, "--test-hf", "--hf-model", path)
        assert "Hugging Face checkpoints only, not GGUF or Meta" in line
    assert "does not exist: pass --dataset-path" in refused(*summarize(engine, tmp_path / "none"))
    assert "num_beams is 0" in refused(*ask, "--num-beams", 0)


def test_offline(
    engine: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.chdir(tmp_path)
    assert "pass --dataset-path FILE.jsonl" in refused("summarize", engine)


def test_folder_of_the_working_directory(
    engine: Path, rows: Path, tmp_path: Path, puna: Puna, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cnn_dailymail").mkdir()
    shutil.copy(rows, tmp_path / "cnn_dailymail")
    monkeypatch.chdir(tmp_path)
    command = ("summarize", engine, "--output-len", LEN, "--hf-model", tmp_path)
    found = puna(*command)
    assert found.status == 0 and found.err.splitlines() == [
        "note: samples are from ./cnn_dailymail/ (--dataset-path: others); "
        f"{tmp_path} has no tokenizer: using {engine / 'tokenizer'}",
    ]
    assert puna(*command, "--quiet").err == ""


def test_transformers_alone(rows: Path, hf_model: Path, puna: Puna, refused: Refused) -> None:
    pytest.importorskip("transformers")
    alone = ("summarize", "--hf-model", hf_model, "--dataset-path", rows)
    assert "name an engine, or --test-hf" in refused(*alone)
    assert "--record is about an engine" in refused(*alone, "--test-hf", "--record")
    found = puna(*alone, "--test-hf", "--data-type", "fp32", "--output-len", LEN, "--json")
    assert found.status == 0, found
    report = json.loads(found.out)
    assert report["engine"] is None and list(report["systems"]) == ["transformers"]


@pytest.fixture(scope="module")
def hf_model(random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    shutil.copytree(random_llama(num_key_value_heads=2), path)
    return write_tokenizer(path)


@pytest.fixture(scope="module")
def float32_engine(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "float32"
    return build(hf_model, path, BuildConfig(dtype="float32")).path


def test_transformers_says_the_same(float32_engine: Path, hf_model: Path, rows: Path) -> None:
    """Token by token, in batches of different lengths and one by one."""
    options = SummaryOptions(24)
    with LLM(float32_engine) as llm:
        assert llm.tokenizer is not None
        prompts = encode_prompts(llm.tokenizer, load_samples(rows, 5).samples, 128, 24)
        assert len(set(map(len, prompts))) > 1
        progress: list[tuple[int, int]] = []
        ours = summarize_with_llm(
            llm, llm.tokenizer, prompts, options, lambda *done: progress.append(done)
        )
        assert progress == [(n, 5) for n in range(1, 6)]
        for batch_size in (1, 3):
            theirs = summarize_with_transformers(
                hf_model,
                llm.tokenizer,
                prompts,
                options,
                eos=eos_token_ids(llm, llm.tokenizer),
                data_type="fp32",
                batch_size=batch_size,
            )
            assert theirs.token_ids == ours.token_ids and theirs.summaries == ours.summaries


def test_both_stop_at_the_end_of_text(float32_engine: Path, hf_model: Path, rows: Path) -> None:
    """With a token as EOS that the model does say: it counts, is no text, and ends both."""
    with LLM(float32_engine) as llm:
        tokenizer = llm.tokenizer
        assert tokenizer is not None
        prompts = encode_prompts(tokenizer, load_samples(rows, 5).samples, 128, 24)
        free = summarize_with_llm(llm, tokenizer, prompts, SummaryOptions(24))
    eos = (free.token_ids[0][5],)
    found = summarize_with_transformers(
        hf_model, tokenizer, prompts, SummaryOptions(24), eos=eos, data_type="fp32", batch_size=5
    )
    for theirs, text, ours in zip(found.token_ids, found.summaries, free.token_ids, strict=True):
        end = ours.index(eos[0]) + 1 if eos[0] in ours else len(ours)
        assert theirs == ours[:end]
        shown = theirs[:-1] if theirs[-1] in eos else theirs
        assert text == tokenizer.decode(shown)
    assert len(found.token_ids[0]) <= 6


def test_side_by_side(float32_engine: Path, hf_model: Path, rows: Path, puna: Puna) -> None:
    ask = summarize(float32_engine, rows, "--hf-model", hf_model, "--test-hf")
    found = puna(*ask, "--data-type", "fp32", "--json")
    assert found.status == 0, found.err
    report = json.loads(found.out)
    ours, theirs = report["systems"]["puna"], report["systems"]["transformers"]
    for key in ("num_tokens", "rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert ours[key] == theirs[key]
    assert report["summaries"]["puna"] == report["summaries"]["transformers"]
    found = puna(*ask, "--data-type", "bf16")
    assert found.status == 0 and "\ntransformers, samples: 5\n" in found.out


def test_beams_side_by_side(float32_engine: Path, hf_model: Path, rows: Path, puna: Puna) -> None:
    ask = summarize(float32_engine, rows, "--hf-model", hf_model, "--test-hf", "--json")
    greedy, beams = (
        json.loads(puna(*ask, "--data-type", "fp32", "--num-beams", n).out) for n in (1, 3)
    )
    assert beams["num_beams"] == 3
    assert beams["summaries"]["puna"] == beams["summaries"]["transformers"]
    assert beams["summaries"]["puna"] != greedy["summaries"]["puna"]


def test_hf_folder_below(
    float32_engine: Path, hf_model: Path, rows: Path, tmp_path: Path, puna: Puna
) -> None:
    shutil.copytree(hf_model, tmp_path / "hf")
    found = puna(*summarize(float32_engine, rows, "--hf-model", tmp_path, "--test-hf", "--json"))
    assert found.status == 0 and found.err.endswith(f"using {tmp_path / 'hf'}\n")
    assert "transformers" in json.loads(found.out)["systems"]


def test_records(own_engine: Path, rows: Path, puna: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puna_bench, "read_bandwidth", lambda threads, num_bytes: 12.5)
    assert json.loads(puna("inspect", own_engine, "--json").out)["reports"] == []
    assert "\nrecord " not in puna("inspect", own_engine).out
    bench = ("bench", "latency", f"{own_engine}/", "--isl", 8, "--osl", 4, "--rounds", 1)
    measured = puna(*bench, "--record", "--json")
    assert measured.err == f"note: recorded in {own_engine}.report.json\n"
    summarized = puna(*summarize(own_engine, rows, "--record", "--json"))
    assert puna("verify", own_engine).status == 0  # they are beside the engine, not in it
    latency, summary = json.loads(puna("inspect", own_engine, "--json").out)["reports"]
    assert (latency["kind"], summary["kind"]) == ("latency", "summarize")
    assert latency["figures"] == json.loads(measured.out)
    report = json.loads(summarized.out)
    assert summary["figures"]["systems"] == report["systems"]
    assert "article" not in summary["figures"]
    assert latency["command"].startswith("puna bench latency ") and "--record" in latency["command"]
    shown = puna("inspect", own_engine).out
    rouge1 = report["systems"]["puna"]["rouge1"]
    assert f"rouge1 {rouge1:.4g}" in shown and "\nlatency    2" in shown
    assert "replaced" not in shown


def test_records_of_a_replaced_engine(
    own_engine: Path, rows: Path, puna: Puna, hf_checkpoint: Path
) -> None:
    assert puna(*summarize(own_engine, rows, "--record")).status == 0
    replaced = puna("build", hf_checkpoint, "-o", own_engine, "--force", "--quant", "int8")
    assert replaced.status == 0 and len(read_records(own_engine)) == 1
    shown = puna("inspect", own_engine).out
    assert "records of engines that this one replaced: 1" in shown and "rouge1" not in shown
    assert puna(*summarize(own_engine, rows, "--record")).status == 0
    shown = puna("inspect", own_engine).out
    assert shown.count("rouge1") == 1 and "replaced: 1" in shown


def test_damaged_report(own_engine: Path, rows: Path, puna: Puna) -> None:
    path = own_engine.with_name(f"{own_engine.name}.report.json")
    path.write_text("{")
    found = puna("inspect", own_engine)
    assert found.status == 0 and f"note: {path} cannot be read as a report" in found.err
    assert json.loads(puna("inspect", own_engine, "--json").out)["reports"] is None
    found = puna(*summarize(own_engine, rows, "--record", "--json"))
    assert found.status == 2 and "move it away" in found.err and path.read_text() == "{"
    assert json.loads(found.out)["num_samples"] == 5  # minutes of work are not thrown away
