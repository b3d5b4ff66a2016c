"""Sampling: from logits to one token a row. The NumPy reference; every other sampler must agree.

Order: penalties, temperature, top-k, top-p, min-p, draw. Every row is computed alone, and its draw
is keyed by (seed, stream, position, token), so neither the batch nor the order of arrival changes
it. Knows rows and arrays only, no sequences.

Shape suffixes: L rows, V vocabulary, C pairs of (row, token the row's sequence already has), K most
alternatives asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from puna.dummy_values import counter_bits
from puna.quant import Array

# The best tokens are sought among those this far below the best one before all are sorted.
_MARGINS = (2.0, 4.0, 8.0, 16.0)
# Largest minus smallest value of `gumbel`: -log(-log(u)) for u = 1 - 2^-33 and u = 2^-33.
_GUMBEL_RANGE = 26.01
# Noise above this is rare (one token in 400); its bits are at least _LARGE_BITS.
_LARGE_NOISE = 6.0
_LARGE_BITS = int(math.exp(-math.exp(-(_LARGE_NOISE - 0.01))) * 2**32)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What each row of logits is sampled with; neutral values as in SamplingParams.

    `num_logprobs_L` is -1 for rows that want no logprobs. The C pairs exist only for rows with
    penalties: `seen_counts_C` is how often the sequence generated the token, 0 for a token that
    only its prompt has.
    """

    temperature_L: Array  # float32; 0 is greedy
    top_k_L: Array  # int32
    top_p_L: Array  # float32
    min_p_L: Array  # float32
    repetition_L: Array  # float32
    presence_L: Array  # float32
    frequency_L: Array  # float32
    seed_L: Array  # uint64
    stream_L: Array  # uint32
    position_L: Array  # uint32, of the token to be sampled
    num_logprobs_L: Array  # int32
    is_beam_L: Array  # bool; the logprobs of a beam are taken after its repetition penalty
    seen_rows_C: Array  # int32
    seen_ids_C: Array  # int32
    seen_counts_C: Array  # int32

    @property
    def num_rows(self) -> int:
        return len(self.temperature_L)

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes the largest of its logits, and asks for nothing else."""
        is_plain = not len(self.seen_rows_C) and not self.temperature_L.any()
        return bool(is_plain and (self.num_logprobs_L < 0).all())


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One token a row. Logprobs are of the raw logits, before penalties and temperature; those of a
    beam are then penalised for repetition, as transformers does it.

    `logprobs_L` is NaN in rows that did not ask. `top_ids_LK` are the most likely tokens, best
    first; a row that asked for fewer than K has as many as it asked for, then -1.
    """

    token_ids_L: Array  # int32
    logprobs_L: Array  # float32
    top_ids_LK: Array  # int32
    top_logprobs_LK: Array  # float32


def sample(logits_LV: Array, batch: SamplingBatch) -> SampleResult:
    """Choose a token for each row of float32 logits; the logits are not changed."""
    assert logits_LV.shape[0] == batch.num_rows, f"{logits_LV.shape} for {batch.num_rows} rows"
    chosen_LV = logits_LV
    if len(batch.seen_rows_C):
        chosen_LV = logits_LV.copy()
        _apply_penalties(chosen_LV, batch)
    token_ids_L = chosen_LV.argmax(axis=1).astype(np.int32)  # ties: the lowest id
    for row, temperature in enumerate(batch.temperature_L.tolist()):
        if not temperature:
            continue
        token_ids_L[row] = _draw(
            chosen_LV[row],
            temperature=temperature,
            top_k=int(batch.top_k_L[row]),
            top_p=float(batch.top_p_L[row]),
            min_p=float(batch.min_p_L[row]),
            key=(int(batch.seed_L[row]), int(batch.stream_L[row]), int(batch.position_L[row])),
        )
    return _with_logprobs(token_ids_L, logits_LV, batch)


def _apply_penalties(logits_LV: Array, batch: SamplingBatch) -> None:
    """Repetition over prompt and generated tokens; presence and frequency over generated ones."""
    rows, ids, counts = batch.seen_rows_C, batch.seen_ids_C, batch.seen_counts_C
    x = _less_repeated(logits_LV[rows, ids], batch.repetition_L[rows])
    x -= batch.frequency_L[rows] * counts
    x -= batch.presence_L[rows] * (counts > 0)
    logits_LV[rows, ids] = x


def _less_repeated(x: Array, penalty: Array) -> Array:
    """The repetition penalty of CTRL (Keskar et al., 2019), on logits or log-probabilities."""
    return np.where(x > 0, x / penalty, x * penalty)


def _draw(
    logits_V: Array,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    key: tuple[int, int, int],
) -> int:
    """Draw from the filtered distribution of one row by the Gumbel-max trick."""
    if 0 < top_k < len(logits_V):
        ids = next(top for top in _tops(logits_V) if len(top) >= top_k)
        x = logits_V[ids]
        # Tokens that tie with the k-th stay: which of them goes must not be a matter of sorting.
        ids = ids[x >= np.partition(x, -top_k)[-top_k]]
    elif top_p < 1:
        ids = np.flatnonzero(logits_V > -np.inf)
    else:  # no noise can make up for being further below the best
        ids = np.flatnonzero(logits_V >= float(logits_V.max()) - _GUMBEL_RANGE * temperature)
    x = logits_V[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # relative to the best: any positive temperature is safe
        z = (x - x.max()) / temperature
    if top_p < 1:
        kept = _nucleus(z, top_p)
        ids, z = ids[kept], z[kept]
    if min_p:
        kept = np.flatnonzero(z >= math.log(min_p))
        ids, z = ids[kept], z[kept]
    bits = _noise_bits(*key, ids)
    # Only who is near the best token's score, or has rare luck, can beat it: few need logarithms.
    best = z.argmax()
    score = z[best] + _gumbel_of(bits[best])
    contenders = np.flatnonzero((z >= score - _LARGE_NOISE) | (bits >= _LARGE_BITS))
    scores = z[contenders] + _gumbel_of(bits[contenders])
    return int(ids[contenders[scores.argmax()]])


def _nucleus(z: Array, top_p: float) -> Array:
    """Return the indices of the fewest best whose probabilities reach `top_p`, at least one.

    `z` are log-probabilities up to a constant. Indices are ascending; of equals, the first is best.
    """
    total = np.exp(z).sum()
    top = next(top for top in _tops(z) if np.exp(z[top]).sum() >= top_p * total)
    descending = np.sort(z[top])[::-1]
    reached = np.cumsum(np.exp(descending)) >= top_p * total
    size = int(reached.argmax()) + 1 if reached.any() else len(top)
    last = descending[size - 1]
    above = np.flatnonzero(z > last)
    ties = np.flatnonzero(z == last)[: size - len(above)]
    return np.sort(np.concatenate((above, ties)))


def _tops(x: Array) -> Iterator[Array]:
    """Indices, ascending, of ever more of the largest, at last of all."""
    largest = x.max()
    for margin in _MARGINS:
        yield np.flatnonzero(x >= largest - margin)
    yield np.arange(len(x))


def gumbel(seed: int, stream: int, position: int, token_ids: Array) -> Array:
    """Return standard Gumbel noise that depends on the arguments alone.

    Two 32-bit keys are drawn from (seed, stream, position), then 32 bits for each token from them.
    """
    return _gumbel_of(_noise_bits(seed, stream, position, token_ids))


def _noise_bits(seed: int, stream: int, position: int, token_ids: Array) -> Array:
    keys = noise_keys(np.array([seed], np.uint64), *np.array([[stream], [position]], np.uint64))
    key0, key1 = (int(key_L[0]) for key_L in keys)
    return counter_bits(key0, key1, token_ids.astype(np.uint64))


def noise_keys(seed_L: Array, stream_L: Array, position_L: Array) -> tuple[Array, Array]:
    """The two uint32 keys of each row's noise: its bits for a token are
    `counter_bits(key0, key1, token id)`."""
    seed_L = np.asarray(seed_L, np.uint64)
    stream_L, position_L = (np.asarray(x, np.uint64) for x in (stream_L, position_L))
    counter_L = np.uint64(2) * ((stream_L << np.uint64(32)) | position_L)
    low_L, high_L = seed_L & np.uint64(0xFFFFFFFF), seed_L >> np.uint64(32)
    first, second = (counter_bits(low_L, high_L, counter_L + np.uint64(i)) for i in (0, 1))
    return first, second


def _gumbel_of(bits: Array) -> Array:
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-32  # never 0 or 1
    return -np.log(-np.log(uniform))


def log_softmax(logits_LV: Array) -> Array:
    """Log-probabilities of each row, float32; the sum is taken in float64."""
    shifted = logits_LV - logits_LV.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return (shifted - np.log(total)).astype(np.float32)


def _with_logprobs(token_ids_L: Array, logits_LV: Array, batch: SamplingBatch) -> SampleResult:
    num_rows, vocab_size = logits_LV.shape
    wanted = batch.num_logprobs_L.tolist()
    num_top = min(max(0, 0, *wanted), vocab_size)
    logprobs_L = np.full(num_rows, np.nan, np.float32)
    top_ids_LK = np.full((num_rows, num_top), -1, np.int32)
    top_logprobs_LK = np.full((num_rows, num_top), np.nan, np.float32)
    for row, num_wanted in enumerate(wanted):
        if num_wanted < 0:
            continue
        logprobs_V = log_softmax(logits_LV[row : row + 1])[0]
        if batch.is_beam_L[row] and len(batch.seen_rows_C):
            ids = batch.seen_ids_C[batch.seen_rows_C == row]
            logprobs_V[ids] = _less_repeated(logprobs_V[ids], batch.repetition_L[row])
        logprobs_L[row] = logprobs_V[token_ids_L[row]]
        k = min(num_wanted, vocab_size)
        if k:
            kth = np.partition(logprobs_V, -k)[-k]
            top = np.flatnonzero(logprobs_V >= kth)
            top = top[np.argsort(-logprobs_V[top], kind="stable")][:k]
            top_ids_LK[row, :k] = top
            top_logprobs_LK[row, :k] = logprobs_V[top]
    return SampleResult(token_ids_L, logprobs_L, top_ids_LK, top_logprobs_LK)
