"""ROUGE of summaries against their highlights, as rouge-score computes it.

Decides the convention, which is that of `evaluate.load("rouge").compute()` with its defaults, as
the original example called it: F-measure, no stemming, and texts as they are, in which rougeLsum
takes each line for a sentence (highlights have a sentence a line; a model's line breaks count).
One difference: the mean over samples is the plain one, while `evaluate` takes the middle of a
bootstrap of it, which differs from run to run in the second decimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puna.errors import ConfigError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class RougeScores:
    """Mean F-measures over samples, times 100."""

    rouge1: float
    rouge2: float
    rougeL: float
    rougeLsum: float


def rouge_scores(summaries: Sequence[str], references: Sequence[str]) -> RougeScores:
    """Compare each summary with its reference; both have the same, positive length."""
    assert len(summaries) == len(references) > 0, (len(summaries), len(references))
    scorer = check_rouge().RougeScorer(ROUGE_TYPES, use_stemmer=False)
    scores = [scorer.score(ref, found) for found, ref in zip(summaries, references, strict=True)]
    means = [100 * sum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE_TYPES]
    return RougeScores(*means)


def check_rouge() -> Any:
    """The scorer's module; ConfigError without the package."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError(
            f'the rouge-score package is needed ({error}): pip install "puna[eval]"'
        ) from error
    return rouge_scorer
