"""stories260K, a small trained model: its two published forms, and greedy text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puna.builder import build
from puna.checkpoint import open_checkpoint
from puna.engine import read_config
from puna.llm import LLM
from puna.ops.sampling import log_softmax
from puna.plan import BuildConfig
from puna.rank_file import rank_file_name
from puna.runtime.request import SamplingParams

NUM_GREEDY = 200


def rank_arrays(engine: Path, rank: int = 0) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    arrays = load_file(engine / rank_file_name(rank))
    return {name: array for name, array in arrays.items() if not name.startswith("_pad.")}


def test_both_forms_give_the_same_tensors(shared_data: Path) -> None:
    hf, meta = (open_checkpoint(shared_data / "stories260K" / form) for form in ("hf", "meta"))
    # Meta's params.json does not say how long the context is.
    positions = hf.spec.max_position_embeddings
    assert replace(meta.spec, max_position_embeddings=positions) == hf.spec
    assert hf.names() == meta.names()
    for name in hf.names():
        a, b = hf.load(name), meta.load(name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name


@pytest.mark.parametrize("quant", ["auto", "int8"])
def test_both_forms_give_the_same_engine(quant: str, shared_data: Path, tmp_path: Path) -> None:
    config = BuildConfig(quant=quant)  # type: ignore[arg-type]
    for form in ("hf", "meta"):
        build(shared_data / "stories260K" / form, tmp_path / form, config)
    hf, meta = (rank_arrays(tmp_path / form) for form in ("hf", "meta"))
    assert hf.keys() == meta.keys() and len(hf) > 25
    for name in hf:
        assert np.array_equal(hf[name], meta[name]), name
    assert read_config(tmp_path / "hf").weights == read_config(tmp_path / "meta").weights


def test_greedy_tokens_are_transformers(stories: Path, tmp_path: Path, device: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([[1]]),
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        do_sample=False,
    )[0, 1:].tolist()

    build(stories, tmp_path / "engine")
    params = SamplingParams(max_new_tokens=NUM_GREEDY, temperature=0.0, ignore_eos=True)
    with LLM(tmp_path / "engine", device=device) as llm:
        (out,) = llm.generate([[1]], params)
    assert len(out.token_ids) == NUM_GREEDY
    assert list(out.token_ids) == expected


def test_greedy_text_is_a_story(shared_data: Path, tmp_path: Path, device: str) -> None:
    build(shared_data / "stories260K" / "meta", tmp_path / "engine")
    with LLM(tmp_path / "engine", device=device) as llm:
        (out,) = llm.generate(["Once upon a time"], SamplingParams(12, temperature=0.0))
    assert out.text.startswith(", there was a little girl named Lily"), out.text


def test_an_int8_cache_hardly_changes_the_probabilities(
    stories: Path, tmp_path: Path, device: str
) -> None:
    """Measured: a divergence of 0.0007 nats a token with heads of 8, the fewest numbers a scale."""
    build(stories, tmp_path / "float32")
    build(stories, tmp_path / "int8", BuildConfig(kv_dtype="int8"))
    params = SamplingParams(max_new_tokens=150, temperature=0.0, ignore_eos=True)
    with (
        LLM(tmp_path / "float32", device=device) as exact,
        LLM(tmp_path / "int8", device=device) as rounded,
    ):
        (story,) = exact.generate([[1]], params)
        expected, found = (
            log_softmax(llm.logits([1, *story.token_ids])) for llm in (exact, rounded)
        )
    divergence_T = (np.exp(expected) * (expected - found)).sum(axis=1)
    assert 1e-5 < divergence_T.mean() < 1.5e-3
