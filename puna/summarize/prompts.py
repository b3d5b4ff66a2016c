"""Articles to token ids: which tokenizer, which text, how much of it.

Decides the prompt, which every system gets as the same token ids. Knows nothing of who answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puna.engine import TOKENIZER_DIR
from puna.errors import RequestError, TokenizerError
from puna.summarize.dataset import Sample
from puna.tokenizer import Tokenizer

MAX_PROMPT_LEN = 923  # tokens; with 100 new ones these stay within 1,024 positions


def prompt_text(article: str) -> str:
    """What the model continues.

    >>> prompt_text("He did n't stay. ")
    "He didn't stay.  TL;DR:"
    """
    return f"{article} TL;DR: ".strip().replace(" n't", "n't")


def encode_prompts(
    tokenizer: Tokenizer, samples: Sequence[Sample], max_seq_len: int | None, output_len: int
) -> list[list[int]]:
    """Return the token ids of each sample's prompt: the last 923, or max_seq_len - output_len if
    there is such a limit and that is fewer.

    The last ones, so that the prompt keeps its "TL;DR:"; a prompt that is cut loses its BOS.
    """
    if output_len < 1:
        raise RequestError(f"output_len is {output_len}; it must be at least 1: raise it")
    most = MAX_PROMPT_LEN if max_seq_len is None else min(MAX_PROMPT_LEN, max_seq_len - output_len)
    if most < 1:
        raise RequestError(
            f"{output_len} new tokens leave no room for a prompt; the engine takes at most "
            f"{max_seq_len} tokens: lower --output-len, or build with a larger --max-seq-len"
        )
    return [tokenizer.encode(prompt_text(sample.article))[-most:] for sample in samples]


def find_tokenizer(
    hf_model: str | Path | None, engine_dir: str | Path | None
) -> tuple[Path, str | None]:
    """Return the folder of the tokenizer, and a note where it is not the first one looked at.

    Looked up in `hf_model`, in its hf/ folder, then in the engine; at least one of both is named.
    """
    assert hf_model is not None or engine_dir is not None
    folders = [] if hf_model is None else [Path(hf_model), Path(hf_model) / "hf"]
    if engine_dir is not None:
        folders.append(Path(engine_dir) / TOKENIZER_DIR)
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            is_first = folder == folders[0]
            return folder, None if is_first else f"{folders[0]} has no tokenizer: using {folder}"
    raise TokenizerError(
        f"found no tokenizer in {', '.join(map(str, folders))}: name a directory that has a "
        "tokenizer.json or tokenizer.model"
    )
