"""What `puna summarize` rests on: finding samples, prompts, ROUGE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from checkpoint_writers import write_tokenizer

from puna.errors import ConfigError, RequestError, TokenizerError
from puna.summarize import (
    Sample,
    SummaryOptions,
    encode_prompts,
    find_tokenizer,
    load_samples,
    prompt_text,
    rouge_scores,
)
from puna.tokenizer import load_tokenizer

ROWS = [{"id": str(i), "article": f"Article {i}.", "highlights": f"Point {i} ."} for i in range(5)]
SAMPLES = tuple(Sample(row["article"], row["highlights"]) for row in ROWS)


def write_rows(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    found = load_samples(file, 3)
    assert (found.samples, found.source, found.note) == (SAMPLES[:3], str(file), None)
    assert load_samples(str(file), 100).samples == SAMPLES


def test_directory_of_json_lines(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ROWS[3:])
    write_rows(tmp_path / "a.jsonl", ROWS[:3])
    assert load_samples(tmp_path, 100).samples == SAMPLES
    write_rows(tmp_path / "test_rows.jsonl", ROWS[1:2])
    assert load_samples(tmp_path, 100).samples == SAMPLES[1:2]


def test_what_the_datasets_package_writes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset.select([4]), "test": dataset}).save_to_disk(
        tmp_path / "all"
    )
    cached = tmp_path / "cache" / "abisee___cnn_dailymail" / "3.0.0" / "0.0.0" / "96df5e"
    cached.mkdir(parents=True)
    for name, part in (
        ("train", [4]),
        ("test-00000-of-00002", [0, 1]),
        ("test-00001-of-00002", [2, 3, 4]),
    ):
        rows = dataset.select(part)
        rows.map(lambda row: row, cache_file_name=str(cached / f"cnn_dailymail-{name}.arrow"))
    for path in ("one", "all", "cache", "cache/abisee___cnn_dailymail"):
        assert load_samples(tmp_path / path, 100).samples == SAMPLES, path
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "other")
    with pytest.raises(ConfigError, match="has no test split but train"):
        load_samples(tmp_path / "other", 1)


def test_folder_of_the_working_directory(tmp_path: Path) -> None:
    write_rows(tmp_path / "cnn_dailymail" / "test.jsonl")
    found = load_samples(None, 2, tmp_path)
    assert found.samples == SAMPLES[:2]
    assert found.note is not None and "./cnn_dailymail/" in found.note
    other = write_rows(tmp_path / "other.jsonl", ROWS[4:])
    assert load_samples(other, 2, tmp_path).samples == SAMPLES[4:]  # what is asked for comes first


def test_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments: object, **options: object) -> list[dict[str, str]]:
        asked.append((arguments, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_samples(None, 2, tmp_path).samples == SAMPLES[:2]
    assert asked == [(("abisee/cnn_dailymail", "3.0.0"), {"split": "test"})]

    def offline(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(ConnectionError\).*FILE\.jsonl"):
        load_samples(None, 2, tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "puna\[eval\]"'):
        load_samples(None, 2, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no samples"),
        ("{", "line 1"),
        ('{"article": "x", "highlights": "y"}\n{"article": "x"}', "needs the texts.* has article"),
        ('{"article": 1, "highlights": "y"}', "needs the texts"),
        ("[1]", "a sample is a list"),
    ],
)
def test_bad_rows(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{reason}.*--dataset-path FILE"):
        load_samples(path, 5)


def test_bad_paths(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "does not exist"), (tmp_path, "neither")):
        with pytest.raises(ConfigError, match=f"{reason}.*--dataset-path FILE"):
            load_samples(path, 5)
    with pytest.raises(ConfigError, match="max_samples is 0"):
        load_samples(tmp_path, 0)


def test_real_rows(shared_data: Path) -> None:
    samples = load_samples(shared_data / "cnn_dailymail", 1000).samples
    assert len(samples) == 250
    assert samples[0].article.startswith("(CNN)The Palestinian Authority officially")
    assert samples[0].highlights.count("\n") == 1


def test_prompt_text() -> None:
    assert prompt_text("  It is n't so . ") == "It isn't so .  TL;DR:"
    assert prompt_text("No. They did n't") == "No. They didn't TL;DR:"


def test_prompts_keep_their_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))  # a token a byte
    long, short = Sample("abc" * 1000, ""), Sample("did n't", "")
    whole = prompt_text(long.article).encode()
    for max_seq_len, num_kept in ((4096, 923), (1023, 923), (1022, 922), (128, 28)):
        found, other = encode_prompts(tokenizer, [long, short], max_seq_len, 100)
        assert len(found) == num_kept
        assert tokenizer.decode(found).encode() == whole[-num_kept:]
        assert tokenizer.decode(other) == "didn't TL;DR:"
    with pytest.raises(RequestError, match="takes at most 100 tokens: lower --output-len"):
        encode_prompts(tokenizer, [short], 100, 100)
    with pytest.raises(RequestError, match="output_len is 0"):
        encode_prompts(tokenizer, [short], 100, 0)


def test_where_the_tokenizer_is(tmp_path: Path) -> None:
    model, engine = tmp_path / "model", tmp_path / "engine"
    with pytest.raises(TokenizerError, match=r"found no tokenizer in .*model, .*hf, .*tokenizer"):
        find_tokenizer(model, engine)
    write_tokenizer(engine / "tokenizer")
    folder, note = find_tokenizer(model, engine)
    assert folder == engine / "tokenizer" and note and f"using {folder}" in note
    assert find_tokenizer(None, engine) == (engine / "tokenizer", None)
    write_tokenizer(model / "hf")
    folder, note = find_tokenizer(model, engine)
    assert folder == model / "hf" and note and f"using {folder}" in note
    write_tokenizer(model)
    assert find_tokenizer(model, engine) == (model, None)


def test_options() -> None:
    params = SummaryOptions(output_len=7).sampling_params()
    assert (params.max_new_tokens, params.temperature, params.repetition_penalty) == (7, 0.0, 1.0)
    assert SummaryOptions(top_k=5).sampling_params().temperature == 1.0
    for name in ("output_len", "top_k", "num_beams"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            SummaryOptions(**{name: 0})


class TestRouge:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("rouge_score")

    def test_by_hand(self) -> None:
        """5 of 6 words; 3 bigrams of 5 and 4; the longest common subsequence is the summary."""
        found = rouge_scores(["the cat on the mat"], ["The cat sat on the mat."])
        assert found.rouge1 == pytest.approx(100 * 10 / 11)
        assert found.rouge2 == pytest.approx(100 * 2 / 3)
        assert found.rougeL == found.rougeLsum == pytest.approx(100 * 10 / 11)

    def test_lines_are_sentences(self) -> None:
        found = rouge_scores(["gamma delta\nalpha beta"], ["alpha beta\ngamma delta"])
        assert (found.rougeL, found.rougeLsum) == (50.0, 100.0)
        found = rouge_scores(["gamma delta. alpha beta."], ["alpha beta. gamma delta."])
        assert (found.rougeL, found.rougeLsum) == (50.0, 50.0)

    def test_no_stemming_and_the_plain_mean(self) -> None:
        assert rouge_scores(["walking"], ["walked"]).rouge1 == 0
        assert rouge_scores(["walking", "same"], ["walked", "same"]).rouge1 == 50.0
        assert rouge_scores([""], ["words"]).rouge1 == 0

    def test_the_package_itself(self, shared_data: Path) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        samples = load_samples(shared_data / "cnn_dailymail", 20).samples
        texts = [sample.article[:500] for sample in samples]
        found = rouge_scores(texts, [sample.highlights for sample in samples])
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
            scorer = RougeScorer([name], use_stemmer=False)
            scores = [
                scorer.score(sample.highlights, text)[name].fmeasure
                for sample, text in zip(samples, texts, strict=True)
            ]
            assert getattr(found, name) == pytest.approx(100 * sum(scores) / 20)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "rouge_score", None)
        with pytest.raises(ConfigError, match=r'pip install "puna\[eval\]"'):
            rouge_scores(["a"], ["a"])
