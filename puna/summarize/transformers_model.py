"""Summaries of Hugging Face transformers, of the same token ids as the engine's.

Decides how transformers is called: greedy or with beams, a batch after the other, prompts padded on
the left, and none of the checkpoint's sampling defaults, as for the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puna.errors import CheckpointError, ConfigError
from puna.summarize.systems import Progress, SummaryOptions, SystemResult, system_result
from puna.tokenizer import Tokenizer

DTYPES = MappingProxyType({"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"})


def summarize_with_transformers(
    model_dir: str | Path,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: SummaryOptions,
    *,
    eos: tuple[int, ...],
    data_type: str = "fp16",
    batch_size: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> SystemResult:
    """Load the checkpoint in `data_type` (fp32, fp16, bf16) onto a torch `device`, and answer.

    `eos` ends a sequence. `progress` is told the prompts answered so far and in all.
    """
    torch, transformers = _libraries()
    folder = check_model_dir(model_dir)
    if options.top_k != 1:
        raise ConfigError(f"top_k is {options.top_k}; Hugging Face is compared at top_k 1: use it")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1: raise it")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, DTYPES[data_type]), local_files_only=True
        )
    except Exception as error:  # whatever it raises for files that are not as it expects
        raise CheckpointError(f"{folder}: transformers cannot load it ({error!r})") from error
    model = model.to(device).eval()
    # Replaced, not passed: transformers fills what a passed one leaves open from the model's own.
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=options.output_len,
        do_sample=False,
        num_beams=options.num_beams,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
    )
    answers: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        answers += [_until_end(ids, eos) for ids in _generate(torch, model, batch)]
        if progress is not None:
            progress(len(answers), len(prompts))
    seconds = time.perf_counter() - start
    return system_result("transformers", seconds, answers, tokenizer, eos)


def check_model_dir(model_dir: str | Path) -> Path:
    """The folder of the Hugging Face checkpoint: `model_dir`, or its hf/ folder."""
    path = Path(model_dir)
    for folder in (path, path / "hf"):
        if (folder / "config.json").is_file():
            return folder
    kind = "is a file" if path.is_file() else "has no config.json"
    raise CheckpointError(
        f"{path} {kind}; transformers loads Hugging Face checkpoints only, not GGUF or Meta ones: "
        "pass --hf-model DIR with one, or leave out --test-hf"
    )


def _generate(torch: Any, model: Any, batch: Sequence[Sequence[int]]) -> list[list[int]]:
    longest = max(map(len, batch))
    pads = [longest - len(ids) for ids in batch]
    padded = [[0] * pad + list(ids) for pad, ids in zip(pads, batch, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    with torch.inference_mode():
        found = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
        )
    return found[:, longest:].tolist()


def _until_end(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    """Up to and including the first end-of-text token; the rest is padding."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return ids[: end + 1]


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f'--test-hf needs torch and transformers ({error}): pip install "puna[eval]"'
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers
