"""The whole model against transformers' LlamaForCausalLM with the same weights.

float32 logits of 64 prefilled and 16 decoded tokens agree to 1e-4 (relative L2, the bar; measured:
about 1e-6), over the variants of the family and on both devices. In half precision the error
against the float32 model is at most twice the error that transformers makes in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
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
BAR = 1e-4
RandomLlama = Callable[..., Path]


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, "rope_type": rope_type, **parameters}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True, "num_key_value_heads": 2},
    "mlp-bias": {"mlp_bias": True},
    "head-dim-36": {"head_dim": 36, "num_key_value_heads": 4},
    "head-dim-96": {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "hidden-144-ffn-200": {"hidden_size": 144, "intermediate_size": 200, "rms_norm_eps": 1e-6},
}
ROPES: dict[str, dict[str, Any]] = {
    "theta-500000": rope("default", rope_theta=500000.0),
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=3.0),
    "llama3": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=48,
    ),
    "yarn": rope("yarn", **YARN),
    "yarn-mscale": rope("yarn", **YARN, mscale=1.2, mscale_all_dim=0.7),
    "yarn-attention-factor": rope("yarn", **YARN, attention_factor=0.8),
    "yarn-not-truncated": rope("yarn", **YARN, truncate=False),
    "yarn-betas": rope("yarn", **YARN, beta_fast=8.0, beta_slow=0.5),
}


def rope_config(name: str) -> dict[str, Any]:
    # The dynamic scaling begins at the model's own length, which decoding then passes.
    positions = NUM_PREFILL if name == "dynamic" else 128
    return {
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "rope_parameters": ROPES[name],
    }


def tokens(vocab_size: int) -> list[int]:
    rng = np.random.default_rng(7)
    return rng.integers(0, vocab_size, NUM_PREFILL + NUM_DECODE).tolist()


def load(checkpoint: Path, dtype: Any = None) -> Any:
    dtype = dtype or torch.float32
    return transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def transformers_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """Prefill, then decode one by one with transformers' own KV cache."""
    with torch.no_grad():
        out = model(torch.tensor([token_ids[:NUM_PREFILL]]), use_cache=True)
        rows = [out.logits[0]]
        for token_id in token_ids[NUM_PREFILL:]:
            out = model(torch.tensor([[token_id]]), past_key_values=out.past_key_values)
            rows.append(out.logits[0])
    return torch.cat(rows).float().numpy()


def puna_logits(
    checkpoint: Path, engine: Path, token_ids: list[int], dtype: str, device: str
) -> np.ndarray:
    build(checkpoint, engine, BuildConfig(dtype=dtype, max_seq_len=128))  # type: ignore[arg-type]
    with LLM(engine, device=device) as llm:
        assert llm.session is not None and llm.session.device == device
        return llm.logits(token_ids, num_prefill=NUM_PREFILL)


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(found - wide) / np.linalg.norm(wide))


def check_float32(checkpoint: Path, engine: Path, device: str) -> None:
    model = load(checkpoint)
    ids = tokens(model.config.vocab_size)
    expected = transformers_logits(model, ids)
    found = puna_logits(checkpoint, engine, ids, "float32", device)
    assert found.shape == expected.shape and found.dtype == np.float32
    error = relative_l2(found, expected)
    assert error <= BAR, error


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_biases_in_float32(
    name: str, random_llama: RandomLlama, tmp_path: Path, device: str
) -> None:
    check_float32(random_llama(**SHAPES[name]), tmp_path / "engine", device)


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings_in_float32(
    name: str, random_llama: RandomLlama, tmp_path: Path, device: str
) -> None:
    check_float32(random_llama(**rope_config(name)), tmp_path / "engine", device)


@pytest.mark.parametrize("seed", range(8))
def test_random_members_of_the_family(
    seed: int, random_llama: RandomLlama, tmp_path: Path, device: str
) -> None:
    rng = np.random.default_rng(seed)
    num_kv_heads = int(rng.choice([1, 2, 3]))
    num_heads = num_kv_heads * int(rng.choice([1, 2, 3]))
    name = str(rng.choice(list(ROPES)))
    config = rope_config(name) | {
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_heads,
        "head_dim": 2 * int(rng.integers(8, 28)),
        # transformers refuses other hidden sizes, although head_dim is given.
        "hidden_size": num_heads * int(rng.integers(5, 25)),
        "intermediate_size": int(rng.integers(20, 200)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "vocab_size": int(rng.integers(50, 400)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
    }
    check_float32(random_llama(seed=seed, **config), tmp_path / "engine", device)


@pytest.mark.parametrize("name", ROPES)
def test_each_rope_scaling_changes_the_logits(name: str, random_llama: RandomLlama) -> None:
    """Without this, a scaling that both libraries ignore would pass the test above."""
    plain = load(random_llama(**rope_config(name) | {"rope_parameters": rope("default")}))
    scaled = load(random_llama(**rope_config(name)))
    ids = tokens(plain.config.vocab_size)
    assert relative_l2(transformers_logits(scaled, ids), transformers_logits(plain, ids)) > 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gqa", "attention-bias", "hidden-144-ffn-200"])
def test_half_precision_errs_at_most_twice_as_much(
    name: str, dtype: str, random_llama: RandomLlama, tmp_path: Path, device: str
) -> None:
    half = load(random_llama(**SHAPES[name]), getattr(torch, dtype))
    rounded = tmp_path / "rounded"
    half.save_pretrained(rounded)
    exact = load(rounded)  # the same rounded weights, computed in float32
    ids = tokens(exact.config.vocab_size)
    expected = transformers_logits(exact, ids)
    allowed = relative_l2(transformers_logits(half, ids), expected)
    found = relative_l2(puna_logits(rounded, tmp_path / "engine", ids, dtype, device), expected)
    assert 0 < found <= 2 * allowed, (found, allowed)
