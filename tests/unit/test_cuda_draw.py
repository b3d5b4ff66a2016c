"""Drawing with torch against the NumPy sampler: the same tokens from the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from puna.dummy_values import counter_bits
from puna.ops.sampling import SamplingBatch, noise_keys, sample

torch = pytest.importorskip("torch")

from puna.cuda import draw  # noqa: E402  (needs torch)


def batch_of(num_rows: int, rng: np.random.Generator, **changes: Any) -> SamplingBatch:
    """Rows with random seeds, streams and positions; neutral but for the changes."""
    nothing = np.zeros(0, np.int32)
    values: dict[str, Any] = {
        "temperature_L": 1.0,
        "top_k_L": 0,
        "top_p_L": 1.0,
        "min_p_L": 0.0,
        "repetition_L": 1.0,
        "presence_L": 0.0,
        "frequency_L": 0.0,
        "num_logprobs_L": -1,
        "is_beam_L": False,
        **changes,
    }
    types = {"top_k_L": np.int32, "num_logprobs_L": np.int32, "is_beam_L": bool}
    arrays = {
        name: np.broadcast_to(np.asarray(value, types.get(name, np.float32)), num_rows).copy()
        for name, value in values.items()
    }
    return SamplingBatch(
        **arrays,
        seed_L=rng.integers(0, 2**64, num_rows, np.uint64),
        stream_L=rng.integers(0, 9, num_rows).astype(np.uint32),
        position_L=rng.integers(0, 2**20, num_rows).astype(np.uint32),
        seen_rows_C=nothing,
        seen_ids_C=nothing,
        seen_counts_C=nothing,
    )


def drawn(logits_LV: np.ndarray[Any, Any], batch: SamplingBatch) -> tuple[Any, Any, Any]:
    """(tokens, last tokens by row of a mirror, those rows), greedy ones in place before."""
    num_rows = len(logits_LV)
    rows = np.random.default_rng(3).permutation(2 * num_rows)[:num_rows].astype(np.int64)
    tokens = torch.from_numpy(logits_LV.argmax(1).astype(np.int32))
    last = torch.full((2 * num_rows,), -7, dtype=torch.int32)
    draw.draw_tokens(torch.from_numpy(logits_LV), batch, rows, last, tokens)
    return tokens.numpy(), last.numpy(), rows


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature_L": 30.0},
    "cold": {"temperature_L": 1e-4},
    "top-k": {"top_k_L": [1, 2, 5, 50] * 8},
    "top-k of all": {"top_k_L": [997, 2000, 0, 3] * 8},
    "top-p": {"top_p_L": [0.0, 0.1, 0.5, 0.95] * 8},
    "min-p": {"min_p_L": [0.0, 0.02, 0.3, 1.0] * 8},
    "all": {
        "temperature_L": [0.7, 1.3, 0.2, 5.0] * 8,
        "top_k_L": [40, 0, 7, 300] * 8,
        "top_p_L": [0.9, 0.6, 1.0, 0.99] * 8,
        "min_p_L": [0.0, 0.01, 0.0, 0.001] * 8,
    },
    "some greedy": {"temperature_L": [0.0, 1.0, 0.0, 0.5] * 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [997, 8, 40000])
def test_tokens_are_those_of_the_reference(case: str, vocab: int) -> None:
    rng = np.random.default_rng(len(case) + vocab)
    batch = batch_of(32, rng, **CASES[case])
    for scale in (0.0, 1.0, 8.0):
        logits_LV = (scale * rng.standard_normal((32, vocab))).astype(np.float32)
        expected = sample(logits_LV, batch).token_ids_L
        tokens, last, rows = drawn(logits_LV, batch)
        np.testing.assert_array_equal(tokens, expected)
        has_drawn = batch.temperature_L > 0
        np.testing.assert_array_equal(last[rows[has_drawn]], expected[has_drawn])
        assert (np.delete(last, rows[has_drawn]) == -7).all(), "others are left alone"


def test_ties_and_forbidden_tokens() -> None:
    """Few different values, so that ties lie at every bound; and tokens that cannot be."""
    rng = np.random.default_rng(0)
    logits_LV = rng.integers(-3, 3, (64, 301)).astype(np.float32)
    logits_LV[:, ::7] = -np.inf
    options = {
        "top_k_L": rng.integers(0, 200, 64),
        "top_p_L": rng.choice([0.2, 0.8, 1.0], 64),
        "min_p_L": rng.choice([0.0, 0.1], 64),
    }
    batch = batch_of(64, rng, **options)
    tokens, _, _ = drawn(logits_LV, batch)
    np.testing.assert_array_equal(tokens, sample(logits_LV, batch).token_ids_L)


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    batch = batch_of(9, rng, top_p_L=0.9)
    logits_LV = rng.standard_normal((9, 500)).astype(np.float32)
    together, *_ = drawn(logits_LV, batch)
    monkeypatch.setattr(draw, "_SCRATCH_BYTES", 2 * 500 * draw._BYTES_A_TOKEN)
    apart, *_ = drawn(logits_LV, batch)
    np.testing.assert_array_equal(together, apart)


def test_what_is_not_drawn_here() -> None:
    rng = np.random.default_rng(2)
    assert draw.can_draw(batch_of(3, rng)) and draw.can_draw(batch_of(3, rng, temperature_L=0.0))
    assert not draw.can_draw(batch_of(3, rng, num_logprobs_L=[-1, 0, -1]))


def test_noise_keys_of_many_rows() -> None:
    """As the sampler had them one row at a time: two words of (stream, position), hashed by the
    seed."""
    rng = np.random.default_rng(4)
    seed = rng.integers(0, 2**64, 5, np.uint64)
    stream, position = rng.integers(0, 2**32, (2, 5)).astype(np.uint32)
    key0, key1 = noise_keys(seed, stream, position)
    for i in range(5):
        counter = (2 * ((int(stream[i]) << 32) | int(position[i]))) % 2**64
        pair = np.array([counter, counter + 1], np.uint64)
        halves = int(seed[i]) & 0xFFFFFFFF, int(seed[i]) >> 32
        assert [int(key0[i]), int(key1[i])] == counter_bits(*halves, pair).tolist()
