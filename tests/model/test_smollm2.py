"""A real model: SmolLM2-135M-Instruct from its GGUF file, against transformers in float32.

transformers reads the same GGUF and dequantises it with the `gguf` package, so this checks puna's
GGUF reader, the RoPE order of q and k, and the whole model at its real size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.builder import build
from puna.llm import LLM
from puna.plan import BuildConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NUM_PREFILL, NUM_DECODE = 64, 16
LIMITS = {"max_seq_len": 128, "max_batch_size": 16, "max_num_tokens": 64}


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return np.random.default_rng(11).integers(0, 49152, NUM_PREFILL + NUM_DECODE).tolist()


def logits(gguf: Path, engine: Path, config: BuildConfig, token_ids: list[int]) -> np.ndarray:
    build(gguf, engine, config)
    with LLM(engine) as llm:
        return llm.logits(token_ids, num_prefill=NUM_PREFILL)


@pytest.fixture(scope="module")
def dequantised(
    smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory, token_ids: list[int]
) -> np.ndarray:
    config = BuildConfig(quant="none", dtype="float32", **LIMITS)
    return logits(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "f32", config, token_ids)


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def transformers_model(gguf: Path, folder: Path) -> Any:
    """The GGUF as transformers reads it; from_pretrained(gguf_file=...) would need accelerate."""
    from safetensors.torch import save_file
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(**load_gguf_checkpoint(str(gguf))["config"])
    with torch.device("meta"):  # names only
        names = transformers.LlamaForCausalLM(config)
    found = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=names)
    save_file(found["tensors"], folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
def test_dequantised_float32_is_transformers(
    smollm2_gguf: Path, dequantised: np.ndarray, token_ids: list[int], tmp_path: Path
) -> None:
    model = transformers_model(smollm2_gguf, tmp_path)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0].numpy()
    error = relative_l2(dequantised, expected)
    assert error <= 1e-4, error
    assert np.array_equal(dequantised.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.slow
def test_kept_blocks_are_the_dequantised_weights(
    smollm2_gguf: Path, dequantised: np.ndarray, token_ids: list[int], tmp_path: Path
) -> None:
    """Blocks are repacked, never requantised, so only the KV cache's dtype could differ."""
    kept = logits(
        smollm2_gguf, tmp_path / "kept", BuildConfig(dtype="float32", **LIMITS), token_ids
    )
    assert np.array_equal(kept, dequantised)


@pytest.mark.slow
def test_perplexity_of_wikitext2(
    smollm2_gguf: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the four windows that benchmarks/accuracy.py measures: 13.70 (of 23.1 in all),
    and int8 within 1 %."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2])
    from benchmarks import accuracy

    text = shared_data / "wikitext2" / "wiki.test.raw"
    (ids, *_) = accuracy.windows(smollm2_gguf, text)
    perplexity = {}
    for name in ("float32", "int8"):
        with LLM(accuracy.build_engine(name, smollm2_gguf, tmp_path / name)) as llm:
            nll = accuracy.negative_log_likelihood(llm.logits(ids), ids)
        assert len(nll) == 1023
        perplexity[name] = float(np.exp(nll.mean()))
    assert abs(perplexity["float32"] - 13.7046) < 0.03
    assert abs(perplexity["int8"] / perplexity["float32"] - 1) < 0.01
