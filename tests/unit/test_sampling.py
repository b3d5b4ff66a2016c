"""The reference sampler: against plain loops, and its distributions against chi-square."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_session import sampling_batch

from puna.ops import sampling
from puna.ops.sampling import log_softmax, sample
from puna.runtime.request import SamplingParams
from puna.spec import GenerationDefaults

RNG = np.random.default_rng(0)


def params(**kwargs) -> SamplingParams:
    return SamplingParams(**kwargs).resolve(GenerationDefaults())


def draw(logits: np.ndarray, count: int, **kwargs) -> np.ndarray:
    """`count` independent draws from one row, one a position."""
    row = params(**{"temperature": 1.0, **kwargs})
    batch = sampling_batch([(row, 1, 0, [0], 1)] * count)
    batch = replace(batch, position_L=np.arange(count, dtype=np.uint32))
    return sample(np.tile(logits.astype(np.float32), (count, 1)), batch).token_ids_L


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def assert_distribution(draws: np.ndarray, probs: np.ndarray) -> None:
    """Chi-square at five standard deviations; tokens with probability 0 must not occur."""
    counts = np.bincount(draws, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * len(draws)
    assert expected.min() > 5
    chi2 = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert abs(chi2 - freedom) <= 5 * math.sqrt(2 * freedom), (chi2, freedom)


LOGITS = np.log(np.array([0.3, 0.02, 0.18, 0.1, 0.25, 0.05, 0.1]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float):
    draws = draw(LOGITS + 3, 6000, temperature=temperature)
    assert_distribution(draws, softmax(LOGITS / temperature))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 4]),
        ({"top_k": 4}, [0, 4, 2, 3, 6]),  # 3 and 6 tie
        ({"top_k": 7}, range(7)),
        ({"top_k": 100}, range(7)),
        ({"top_k": 0}, range(7)),
        ({"top_p": 0.0}, [0]),
        ({"top_p": 0.29}, [0]),
        ({"top_p": 0.31}, [0, 4]),
        ({"top_p": 0.74}, [0, 4, 2, 3]),  # of a tie, the lower id is first
        ({"top_p": 0.999}, range(7)),
        ({"top_p": 1.0}, range(7)),
        ({"min_p": 0.0}, range(7)),
        ({"min_p": 0.5}, [0, 4, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4]),  # top-p is of what top-k has left
        ({"top_k": 5, "min_p": 0.34}, [0, 4, 2]),
        ({"temperature": 2.0, "min_p": 0.5}, [0, 2, 3, 4, 6]),  # after the temperature
    ],
)
def test_filters(options: dict, kept: list[int]):
    probs = np.zeros(7)
    kept = list(kept)
    probs[kept] = softmax(LOGITS[kept] / options.get("temperature", 1.0))
    assert_distribution(draw(LOGITS, 2000, **options), probs)


def test_min_p_with_all_equal():
    assert_distribution(draw(np.zeros(8), 4000, min_p=1.0), np.full(8, 1 / 8))


@pytest.mark.parametrize("margins", [(), (0.0,), (0.5, 1.0, 3.0), (100.0,)])
def test_nucleus_does_not_depend_on_the_first_guess(margins: tuple[float, ...], monkeypatch):
    logits = np.round(RNG.normal(size=50), 1) * 2  # with ties
    whole = [sampling._nucleus(logits, p / 20).tolist() for p in range(20)]
    monkeypatch.setattr(sampling, "_MARGINS", margins)
    assert whole == [sampling._nucleus(logits, p / 20).tolist() for p in range(20)]
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(softmax(logits)[order])
    for p, found in enumerate(whole):
        size = 1 + int((cumulative < p / 20 - 1e-12).sum())
        assert found == sorted(order[:size].tolist())


def test_a_large_vocabulary():
    logits = RNG.normal(size=5000).astype(np.float32) * 3
    probs = softmax(logits.astype(np.float64))
    draws = draw(logits, 3000)
    top = probs.argsort()[-20:]
    seen = np.isin(draws, top).mean()
    assert abs(seen - probs[top].sum()) < 5 * math.sqrt(0.25 / 3000)
    assert np.isin(draw(logits, 200, top_k=20), top).all()


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float):
    assert set(draw(LOGITS * 100, 20, temperature=temperature).tolist()) == {0}


def test_no_noise_can_lift_a_token_by_more_than_the_range(monkeypatch):
    ends = []
    for bits in (0, 2**32 - 1):
        monkeypatch.setattr(sampling, "counter_bits", lambda *_, bits=bits: np.uint32([bits, bits]))
        ends.append(sampling.gumbel(0, 0, 0, np.zeros(2, np.int64))[0])
    assert 0 < sampling._GUMBEL_RANGE - (ends[1] - ends[0]) < 0.1


def test_few_logarithms_draw_what_all_would(monkeypatch):
    """Over flat and peaked rows, and with noise thresholds that rule many tokens out or none."""
    rows = [RNG.normal(size=3000) * spread for spread in (0.0, 0.3, 1.0, 3.0, 10.0)]
    for large_noise in (-1.0, 1.0, sampling._LARGE_NOISE, 20.0):
        monkeypatch.setattr(sampling, "_LARGE_NOISE", large_noise)
        bits = int(math.exp(-math.exp(-(large_noise - 0.01))) * 2**32)
        monkeypatch.setattr(sampling, "_LARGE_BITS", bits)
        for row in rows:
            x = row.astype(np.float32).astype(np.float64)
            noise = [sampling.gumbel(1, 0, position, np.arange(3000)) for position in range(60)]
            expected = [int(np.argmax(x - x.max() + n)) for n in noise]
            assert draw(row, 60).tolist() == expected


def test_masked_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0])
    assert set(draw(logits, 100, temperature=100.0).tolist()) == {1, 3}


def test_greedy_takes_the_lowest_of_equals():
    logits = np.array([[0, 2, 2, 1]], np.float32)
    batch = sampling_batch([(params(), 0, 0, [0], 1)])
    assert sample(logits, batch).token_ids_L.tolist() == [1]


def test_a_row_does_not_depend_on_its_company():
    logits = RNG.normal(size=(12, 300)).astype(np.float32)
    rows = [
        (
            params(
                temperature=float(RNG.choice([0.0, 0.7, 1.5])),
                top_k=int(RNG.choice([0, 5])),
                top_p=float(RNG.choice([0.8, 1.0])),
                repetition_penalty=float(RNG.choice([1.0, 1.2])),
            ),
            int(RNG.integers(2**63)),
            i % 3,
            RNG.integers(0, 300, size=5 + i).tolist(),
            3,
        )
        for i in range(12)
    ]
    together = sample(logits, sampling_batch(rows)).token_ids_L.tolist()
    alone = [
        int(sample(logits[i : i + 1], sampling_batch([row])).token_ids_L[0])
        for i, row in enumerate(rows)
    ]
    assert together == alone
    order = RNG.permutation(12)
    shuffled = sample(logits[order], sampling_batch([rows[i] for i in order])).token_ids_L
    assert shuffled.tolist() == [together[i] for i in order]


def test_draws_differ_by_seed_stream_and_position():
    logits = np.zeros((64, 1000), np.float32)
    base = sampling_batch([(params(temperature=1.0), 0, 0, [0], 1)] * 64)
    index = np.arange(64)
    for change in (
        {"seed_L": index.astype(np.uint64)},
        {"seed_L": index.astype(np.uint64) << np.uint64(58)},
        {"stream_L": index.astype(np.uint32)},
        {"position_L": index.astype(np.uint32)},
    ):
        tokens = sample(logits, replace(base, **change)).token_ids_L.tolist()
        assert len(set(tokens)) > 50, change


def test_penalties_against_a_loop():
    logits = RNG.normal(size=(20, 50)).astype(np.float32)
    rows = [
        (
            params(
                repetition_penalty=float(RNG.choice([1.0, 0.8, 1.7])),
                presence_penalty=float(RNG.choice([0.0, -1.5, 0.5])),
                frequency_penalty=float(RNG.choice([0.0, 0.3])),
            ),
            0,
            0,
            RNG.integers(0, 50, size=12).tolist(),
            int(RNG.integers(1, 12)),
        )
        for _ in range(20)
    ]
    before = logits.copy()
    found = logits.copy()
    sampling._apply_penalties(found, sampling_batch(rows))
    for row, (p, _, _, tokens, num_prompt) in enumerate(rows):
        for token_id in range(50):
            x = float(logits[row, token_id])
            if token_id in tokens:
                x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
            count = tokens[num_prompt:].count(token_id)
            x -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
            assert found[row, token_id] == pytest.approx(x, abs=1e-5)
    assert sample(logits, sampling_batch(rows)).token_ids_L.tolist() == found.argmax(1).tolist()
    np.testing.assert_array_equal(logits, before)  # sampling leaves its input alone


def test_logprobs_are_of_the_raw_logits():
    logits = (RNG.normal(size=(4, 40)) * 20).astype(np.float32)
    logits[1, :3] = logits[1].max() + 1  # ties
    rows = [
        (params(logprobs=count, temperature=t, frequency_penalty=1.0), 5, 0, [1, 2, 2], 1)
        for count, t in [(3, 0.0), (2, 1.0), (None, 0.0), (0, 0.0)]
    ]
    found = sample(logits, sampling_batch(rows))
    expected = np.log([softmax(row) for row in logits.astype(np.float64)])
    for row in (0, 1, 3):
        token_id = found.token_ids_L[row]
        assert found.logprobs_L[row] == pytest.approx(expected[row, token_id], abs=1e-5)
    assert np.isnan(found.logprobs_L[2])
    best = np.argsort(-logits, axis=1, kind="stable")
    assert found.top_ids_LK.tolist() == [
        best[0, :3].tolist(),
        [0, 1, -1],
        [-1, -1, -1],
        [-1, -1, -1],
    ]
    np.testing.assert_allclose(found.top_logprobs_LK[0], expected[0, best[0, :3]], atol=1e-5)


def test_more_logprobs_than_tokens():
    batch = sampling_batch([(params(logprobs=9), 0, 0, [0], 1)])
    found = sample(np.array([[1, 3, 2]], np.float32), batch)
    assert found.top_ids_LK.tolist() == [[1, 2, 0]]


def test_log_softmax_is_safe():
    x = np.array([[1e4, -1e4, 0], [-np.inf, 0, 0]], np.float32)
    np.testing.assert_allclose(
        log_softmax(x), [[0, -2e4, -1e4], [-np.inf, -np.log(2), -np.log(2)]], rtol=1e-6
    )


def test_no_rows():
    result = sample(np.zeros((0, 5), np.float32), sampling_batch([]))
    assert len(result.token_ids_L) == 0
