"""Beam search against transformers' generate(num_beams=...), in float32 with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.builder import build
from puna.llm import LLM
from puna.plan import BuildConfig
from puna.runtime.request import SamplingParams
from tests.model.test_smollm2 import transformers_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW = 12


def reference(model: Any, prompt: list[int], params: SamplingParams, eos: list[int]) -> Any:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        repetition_penalty=params.repetition_penalty or 1.0,
        eos_token_id=eos or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        found.append(tuple(row[:end]))
    return found, out.sequences_scores.tolist()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_a_random_model(
    length_penalty: float,
    early_stopping: Any,
    random_llama: Callable[..., Path],
    tmp_path: Path,
    device: str,
) -> None:
    checkpoint = random_llama(num_key_value_heads=2)
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    build(checkpoint, tmp_path / "engine", BuildConfig(dtype="float32", max_seq_len=128))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 307, size).tolist() for size in (3, 16, 33)]
    plain = SamplingParams(
        max_new_tokens=NEW,
        num_beams=4,
        n=4,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        ignore_eos=True,
    )
    num_stopped = 0
    with LLM(tmp_path / "engine", device=device) as llm:
        for prompt in prompts:
            # End tokens that occur: early in the best beam, and in another.
            best, _ = reference(model, prompt, plain, [])
            for eos in ([], [best[0][3]], [best[0][2], best[3][5]]):
                for penalty in (None, 1.2):
                    params = replace(plain, stop_token_ids=tuple(eos), repetition_penalty=penalty)
                    expected, scores = reference(model, prompt, params, eos)
                    done = llm.generate(prompt, params)[0].completions
                    assert [c.token_ids for c in done] == expected
                    assert [c.score for c in done] == pytest.approx(scores, rel=1e-4, abs=1e-4)
                    num_stopped += sum(c.finish_reason == "stop" for c in done)
    assert num_stopped > 0 or length_penalty > 1  # which prefers what has not ended


@pytest.mark.slow
def test_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    """20 prompts, 4 beams: the texts are transformers', alone and beside four sampled requests."""
    model = transformers_model(smollm2_gguf, tmp_path)
    limits = {"max_seq_len": 128, "max_batch_size": 16, "max_num_tokens": 64}
    build(smollm2_gguf, tmp_path / "engine", BuildConfig(quant="none", dtype="float32", **limits))
    topics = ("sea", "moon", "king", "river", "train", "old house", "piano", "garden", "winter")
    topics += ("doctor",)
    prompts = [f"{start} the {topic}" for topic in topics for start in ("Once, near", "I know")]
    assert len(prompts) == 20
    params = SamplingParams(max_new_tokens=16, num_beams=4)
    sampled = [SamplingParams(max_new_tokens=60, temperature=0.9, seed=i) for i in range(4)]
    with LLM(tmp_path / "engine", device="cpu") as llm:
        assert llm.tokenizer is not None
        eos = list(llm.config.generation.eos_token_ids or llm.tokenizer.eos_token_ids)
        expected = []
        for prompt in prompts:
            (tokens, *_), _ = reference(model, llm.tokenizer.encode(prompt), params, eos)
            shown = tokens[:-1] if tokens[-1] in eos else tokens
            expected.append(llm.tokenizer.decode(list(shown)))
        assert [llm.generate(prompt, params)[0].text for prompt in prompts] == expected
        mixed = llm.generate(["Hello"] * 4 + prompts, sampled + [params] * 20)
        assert [output.text for output in mixed[4:]] == expected
