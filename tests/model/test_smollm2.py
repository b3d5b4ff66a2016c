"""A real model: SmolLM2-135M-Instruct from its GGUF file, against transformers in float32.

transformers reads the same GGUF and dequantises it with the `gguf` package, so this checks puna's
GGUF reader, the RoPE order of q and k, and the whole model at its real size.
"""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.slow
def test_dequantised_float32_is_transformers(
    smollm2_gguf: Path, dequantised: np.ndarray, token_ids: list[int]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    assert model.config.architectures == ["LlamaForCausalLM"]
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0].numpy()
    assert relative_l2(dequantised, expected) <= 1e-4
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
