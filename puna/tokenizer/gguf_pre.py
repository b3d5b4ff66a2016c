"""How byte-level BPE splits a text into words, by the name that a GGUF gives the rule.

A GGUF states only a name (`tokenizer.ggml.pre`); the rules belong to llama.cpp's loader. Each is a
list of patterns, applied one after the other: a later one sees the pieces the earlier left. This
file has data alone. Names that are not here are refused, because a near rule gives other ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PreTokenizer:
    """`ignore_merges`: a word that is a token is that token, whatever the merges make of it."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False  # where the metadata does not say


def _tiktoken_style(digits: str) -> str:
    """GPT-4's rule, with its own way of grouping digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _tiktoken_style(r"\p{N}{1,3}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_THREE_DIGITS = "[0-9][0-9][0-9]"

_RULES = MappingProxyType(
    {
        # Llama 3; a whole word that is a token stays one.
        ("llama-bpe", "llama3", "llama-v3", "falcon3"): PreTokenizer((_LLAMA3,), True, True),
        ("dbrx", "smaug-bpe"): PreTokenizer((_LLAMA3,)),
        ("tekken",): PreTokenizer((_TEKKEN,), True, True),  # Mistral NeMo
        ("qwen2", "stablelm2", "megrez"): PreTokenizer((_tiktoken_style(_DIGIT),)),
        ("gpt-2", "phi-2", "gigachat", "mpt", "olmo", "jais"): PreTokenizer((_GPT2,)),
        # Every digit alone, before GPT-2's rule. Converters that drop the first pattern give
        # numbers other ids than the model was trained on.
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (
            PreTokenizer((_DIGIT, _GPT2))
        ),
        ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
        ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
        ("deepseek-coder",): PreTokenizer(
            (
                r"[\r\n]",
                r"\s?\p{L}+",
                r"\s?\p{P}+",
                "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
                _DIGIT,
            )
        ),
    }
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: rule for names, rule in _RULES.items() for name in names}
)
