"""Beam search against transformers' generate(num_beams=...), in float32 with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from puna.builder import build
from puna.llm import LLM
from puna.plan import BuildConfig
from puna.runtime.request import RequestOutput, SamplingParams
from tests.model.test_smollm2 import transformers_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Of a prompt with beams: tokens, beams, continuations wanted, new tokens, repetition penalty, and
# end tokens, of which a vocabulary of 307 needs many for some beams to meet them.
SHAPES = (
    (3, 2, 2, 7, None, 40),
    (16, 4, 4, 13, None, 20),
    (33, 5, 3, 12, 1.2, 20),
    (50, 3, 1, 9, None, 40),
)
KV_CACHE_BYTES = 1 << 16


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Ten tokens of SmolLM2 took torch 1.4 s with one thread and 23 s with two that waited for each
    other's core, which others used (2 cores, torch 2.13, 2026-11)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


Found = tuple[list[tuple[int, ...]], list[float]]  # token ids and scores, best first


def reference(
    model: Any, prompts: list[list[int]], params: SamplingParams, eos: list[int]
) -> list[Found]:
    """What transformers finds for prompts of equal length, so that none is padded."""
    token_ids = torch.tensor(prompts)
    out = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
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
    for row in out.sequences[:, token_ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        found.append(tuple(row[:end]))
    n, scores = params.n, out.sequences_scores.tolist()
    return [(found[i : i + n], scores[i : i + n]) for i in range(0, len(found), n)]


class Case(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    token_ids: list[tuple[int, ...]]  # what transformers finds, best first
    scores: list[float]


@pytest.fixture(scope="module")
def checkpoint(random_llama: Callable[..., Path]) -> Path:
    return random_llama(num_key_value_heads=2)


@pytest.fixture(scope="module")
def cases(checkpoint: Path, one_thread: None) -> list[Case]:
    """Prompts with end tokens that their beams meet early, under every penalty and way to stop."""
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rng = np.random.default_rng(5)
    found: list[Case] = []
    variants: list[list[list[tuple[int, ...]]]] = []

    def add(prompt: list[int], params: SamplingParams) -> Case:
        (expected,) = reference(model, [prompt], params, list(params.stop_token_ids))
        case = Case(prompt, params, *expected)
        found.append(case)
        return case

    for prompt_len, num_beams, n, num_new, repetition_penalty, num_ends in SHAPES:
        prompt = rng.integers(1, 307, prompt_len).tolist()
        ends = tuple(rng.choice(307, num_ends, replace=False).tolist())
        plain = SamplingParams(
            max_new_tokens=num_new,
            num_beams=num_beams,
            n=n,
            repetition_penalty=repetition_penalty,
            ignore_eos=True,
        )
        add(prompt, plain)
        add(prompt, replace(plain, max_new_tokens=1, stop_token_ids=ends))
        for_prompt = [
            add(prompt, replace(plain, stop_token_ids=ends, length_penalty=x, early_stopping=stop))
            for x in (1.0, 0.5, 2.0, -1.0)
            for stop in (False, True, "never")
        ]
        variants.append([case.token_ids for case in for_prompt])
    # Or this would not test much: the options change what is found, and beams end apart.
    for i, j in ((0, 2), (6, 7), (0, 3), (0, 6)):
        assert any(v[i] != v[j] for v in variants), (i, j)
    assert sum(len(set(map(len, case.token_ids))) > 1 for case in found) > 5
    return found


def check(case: Case, output: RequestOutput) -> None:
    ends = case.params.stop_token_ids
    found = output.completions
    assert [c.token_ids for c in found] == case.token_ids, case.params
    assert [c.score for c in found] == pytest.approx(case.scores, rel=1e-4, abs=1e-4), case.params
    for completion in found:
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in ends)


def test_a_random_model(cases: list[Case], checkpoint: Path, tmp_path: Path, device: str) -> None:
    """Each alone, and then all in one batch with greedy and sampled requests, which notice no beams
    either; there a KV cache too small for all lets some of them start again."""
    limits = {"max_seq_len": 128, "max_batch_size": 16, "max_num_tokens": 32}
    build(checkpoint, tmp_path / "engine", BuildConfig(dtype="float32", **limits))
    rng = np.random.default_rng(6)
    others = [rng.integers(1, 307, size).tolist() for size in (2, 17, 40, 9, 25, 31)]
    greedy = SamplingParams(max_new_tokens=30, temperature=0.0)
    sampled = [replace(greedy, temperature=1.0, seed=seed, n=seed) for seed in (1, 2, 3)]
    other_params = [greedy, *sampled, greedy, greedy]
    with LLM(tmp_path / "engine", device=device) as llm:
        for case in cases:
            check(case, llm.generate(case.prompt, case.params)[0])
        expected = llm.generate(others, other_params)
    with LLM(tmp_path / "engine", device=device, kv_cache_bytes=KV_CACHE_BYTES) as llm:
        outputs = llm.generate(
            [*others, *(case.prompt for case in cases)],
            [*other_params, *(case.params for case in cases)],
        )
        assert llm.executor.num_preemptions > 0
    assert outputs[: len(others)] == expected
    for case, output in zip(cases, outputs[len(others) :], strict=True):
        check(case, output)


TOPICS = "sea", "moon", "king", "river", "old house", "piano", "garden", "winter", "doctor", "train"
COUNTRIES = (
    "Japan",
    "France",
    "Italy",
    "Kenya",
    "Peru",
    "Egypt",
    "Norway",
    "Chile",
    "Cuba",
    "India",
)


@pytest.mark.slow
def test_smollm2(
    smollm2_gguf: Path,
    tmp_path: Path,
    one_thread: None,
    record_property: Callable[[str, object], None],
) -> None:
    """4 beams for 20 prompts, half of which end in time: the texts are transformers', each alone
    and all in one batch with four sampled requests, which are themselves as when alone.

    Scores differed by less than 1e-5, and the four of a prompt are at least 9e-4 apart (2026-11).
    """
    model = transformers_model(smollm2_gguf, tmp_path)
    limits = {"max_seq_len": 96, "max_batch_size": 84, "max_num_tokens": 168}
    build(smollm2_gguf, tmp_path / "engine", BuildConfig(quant="none", dtype="float32", **limits))
    params = SamplingParams(max_new_tokens=40, num_beams=4, n=4)
    sampled = [
        SamplingParams(max_new_tokens=40, temperature=0.9, seed=i, ignore_eos=True)
        for i in range(4)
    ]
    with LLM(tmp_path / "engine", device="cpu") as llm:
        assert llm.tokenizer is not None
        prompts = [llm.tokenizer.encode(f"Once, near the {topic}") for topic in TOPICS]
        for country in COUNTRIES:
            question = {"role": "user", "content": f"What is the capital of {country}?"}
            prompts.append(llm.tokenizer.apply_chat_template([question]))
        assert len(prompts) == 20
        beside = [llm.generate("Hello", params)[0] for params in sampled]
        alone = [llm.generate(prompt, params)[0] for prompt in prompts]
        together = llm.generate(["Hello"] * 4 + prompts, sampled + [params] * 20)
        assert together == beside + alone
        eos = list(llm.config.generation.eos_token_ids or llm.tokenizer.eos_token_ids)
        expected: dict[tuple[int, ...], Found] = {}
        for size in sorted(set(map(len, prompts))):
            same = [prompt for prompt in prompts if len(prompt) == size]
            expected |= zip(map(tuple, same), reference(model, same, params, eos), strict=True)
        largest = 0.0
        for prompt, output in zip(prompts, alone, strict=True):
            found, scores = expected[tuple(prompt)]
            assert [c.token_ids for c in output.completions] == found, scores
            assert [c.score for c in output.completions] == pytest.approx(scores, abs=1e-4)
            best = list(found[0][:-1] if found[0][-1] in eos else found[0])
            assert output.text == llm.tokenizer.decode(best)
            ours = [c.score for c in output.completions]
            largest = max(largest, np.abs(np.subtract(ours, scores)).max())
        record_property("prompts", f"{len(prompts)} equal, alone and beside sampled ones")
        record_property("largest_score_difference", f"{largest:.1e}")
        assert sum(output.finish_reason == "stop" for output in alone) >= 5
