"""An engine's summaries of given token ids, timed.

Decides how summaries are sampled and what counts as a generated token: every one up to and
including the end-of-text token, which is not part of the text. Knows nothing of datasets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from puna.errors import ConfigError
from puna.llm import LLM
from puna.runtime.request import SamplingParams
from puna.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SummaryOptions:
    """How to summarize. `top_k` 1 is greedy; others sample at temperature 1 with seed 0."""

    output_len: int = 100
    top_k: int = 1
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("output_len", "top_k", "num_beams"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be at least 1: raise it"
                )

    def sampling_params(self) -> SamplingParams:
        """All of it stated, so that no default of the checkpoint comes in."""
        is_greedy = self.top_k == 1
        return SamplingParams(
            max_new_tokens=self.output_len,
            temperature=0.0 if is_greedy else 1.0,
            top_k=0 if is_greedy else self.top_k,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=0,
            num_beams=self.num_beams,
        )


@dataclass(frozen=True)
class SystemResult:
    """What a system made of the prompts. `seconds` is wall-clock time of generating, all prompts
    together, tokenizing and loading left out."""

    name: str
    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    summaries: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tok_s(self) -> float:
        """Generated tokens a second."""
        return self.num_tokens / self.seconds


def summarize_with_llm(
    llm: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: SummaryOptions,
    progress: Progress | None = None,
) -> SystemResult:
    """Give all prompts to the engine at once; it batches them as they come and go.

    `progress` is told the prompts answered so far and in all.
    """
    params = options.sampling_params()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=progress)
    seconds = time.perf_counter() - start
    eos = eos_token_ids(llm, tokenizer)
    token_ids = [output.token_ids for output in outputs]
    return system_result("puna", seconds, token_ids, tokenizer, eos)


def eos_token_ids(llm: LLM, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Those that end a sequence of this engine."""
    return llm.config.generation.eos_token_ids or tokenizer.eos_token_ids


def system_result(
    name: str,
    seconds: float,
    token_ids: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    eos: tuple[int, ...],
) -> SystemResult:
    """Texts of token ids, the same way for every system."""
    texts = (tokenizer.decode(ids[:-1] if ids and ids[-1] in eos else ids) for ids in token_ids)
    return SystemResult(name, seconds, tuple(map(tuple, token_ids)), tuple(texts))
