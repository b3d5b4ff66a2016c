"""RoPE tables against transformers' own functions, and the angle of a token by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from puna.errors import CheckpointError
from puna.rope import inverse_frequencies, rope_tables
from puna.spec import RopeSpec

ORIGINAL = 64
SPECS = {
    "default": RopeSpec(500000.0),
    "linear": RopeSpec(type="linear", factor=2.5),
    "dynamic": RopeSpec(type="dynamic", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "llama3": RopeSpec(500000.0, "llama3", 8.0, ORIGINAL),
    "llama3-3.2": RopeSpec(500000.0, "llama3", 32.0, 8192, 1.0, 4.0),
    "llama3-wide": RopeSpec(10000.0, "llama3", 4.0, 512, 0.5, 20.0),
    "yarn": RopeSpec(type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "yarn-long": RopeSpec(1e6, "yarn", 16.0, 32768),
    "yarn-not-truncated": RopeSpec(1e6, "yarn", 16.0, 32768, truncate=False),
    "yarn-betas": RopeSpec(1e6, "yarn", 16.0, 32768, beta_fast=64.0, beta_slow=4.0),
    "yarn-factor": RopeSpec(1e6, "yarn", 16.0, 32768, attention_factor=1.25),
    "yarn-mscale": RopeSpec(1e6, "yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=0.707),
    "yarn-mscale-alone": RopeSpec(1e6, "yarn", 40.0, 4096, mscale=0.7),
    "yarn-below-1": RopeSpec(1e6, "yarn", 0.5, 4096),
    "yarn-short": RopeSpec(10000.0, "yarn", 4.0, 4),
}


def transformers_frequencies(
    rope: RopeSpec, head_dim: int, length: int | None = None
) -> tuple[np.ndarray, float]:
    pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    original = rope.original_max_position_embeddings
    parameters: dict[str, Any] = {
        "rope_type": rope.type,
        "rope_theta": rope.theta,
        "factor": rope.factor,
    }
    if rope.type in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = original
    if rope.type == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
    if rope.type == "yarn":
        for name in ("beta_fast", "beta_slow", "truncate"):
            parameters[name] = getattr(rope, name)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                parameters[name] = getattr(rope, name)
    config = llama.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=original or 2048,
        rope_parameters=parameters,
    )
    if rope.type == "default":
        found, scale = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        found, scale = functions[rope.type](config, "cpu", seq_len=length)
    return found.numpy().astype(np.float64), float(scale)


@pytest.mark.parametrize("head_dim", [6, 36, 64, 128])
@pytest.mark.parametrize("name", SPECS)
def test_frequencies_and_scale_are_transformers(name: str, head_dim: int) -> None:
    rope = SPECS[name]
    expected, scale = transformers_frequencies(rope, head_dim)
    np.testing.assert_allclose(inverse_frequencies(rope, head_dim), expected, rtol=2e-6)
    cos_PE, sin_PE = rope_tables(rope, head_dim, ORIGINAL)
    assert cos_PE.dtype == sin_PE.dtype == np.float32
    angles = np.arange(ORIGINAL)[:, None] * expected
    np.testing.assert_allclose(cos_PE, np.cos(angles) * scale, atol=3e-5)
    np.testing.assert_allclose(sin_PE, np.sin(angles) * scale, atol=3e-5)


@pytest.mark.parametrize("head_dim", [6, 64])
def test_dynamic_follows_the_length_that_decoding_has_reached(head_dim: int) -> None:
    rope = SPECS["dynamic"]
    cos_PE, sin_PE = rope_tables(rope, head_dim, 3 * ORIGINAL)
    for position in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL - 1):
        expected, _ = transformers_frequencies(rope, head_dim, length=position + 1)
        np.testing.assert_allclose(cos_PE[position], np.cos(position * expected), atol=5e-5)
        np.testing.assert_allclose(sin_PE[position], np.sin(position * expected), atol=5e-5)


@pytest.mark.parametrize("name", SPECS)
def test_an_angle_depends_on_the_position_alone(name: str) -> None:
    long, short = (rope_tables(SPECS[name], 36, n) for n in (200, 70))
    assert all(np.array_equal(a[:70], b) for a, b in zip(long, short, strict=True))
    assert long[0].shape == (200, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "longrope"}, "'longrope' is not supported"),
        ({"theta": 0.0}, "rope_theta"),
        ({"type": "linear", "factor": -1.0}, "factor"),
        ({"type": "dynamic", "factor": 2.0}, "original_max_position_embeddings"),
        (
            {
                "type": "llama3",
                "original_max_position_embeddings": 8,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            },
            "low_freq_factor",
        ),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        RopeSpec(**change)
