"""What the sampler reads, from what requests ask: the part of the lowering's mirror that holds
each sequence's sampling parameters, and the tokens it has where penalties count them.

Knows rows of the mirror (see `puna.runtime.lower`), no positions, blocks or steps. Shape suffixes:
L rows that are sampled, R rows of the mirror, C pairs of (row, token).
"""

from __future__ import annotations

import numpy as np

from puna.ops.sampling import SampleResult, SamplingBatch
from puna.quant import Array
from puna.runtime.request import TokenLogprob
from puna.runtime.step import Branch, Join

_PARAMS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("seed", np.uint64),
        ("stream", np.uint32),
        ("num_logprobs", np.int32),
        ("is_beam", np.bool_),
    ]
)


class SamplingRows:
    """For each row of the mirror, how its sequence is sampled."""

    def __init__(self, num_rows: int) -> None:
        self._params_R = np.zeros(num_rows, _PARAMS)
        # Tokens that sequences with penalties have: by row, token id to times generated.
        self._seen: dict[int, dict[int, int]] = {}
        self._no_pairs = (np.zeros(0, np.int32),) * 3

    def join(self, row: int, join: Join) -> None:
        self._params_R[row] = _params_row(join)
        if join.params.has_penalties:
            seen = dict.fromkeys(join.token_ids, 0)
            for token_id in join.token_ids[join.num_prompt :]:
                seen[token_id] += 1
            self._seen[row] = seen

    def leave(self, row: int) -> None:
        self._seen.pop(row, None)

    def branch(self, rows: list[int], parents: list[int], branches: tuple[Branch, ...]) -> None:
        """Let beams continue others: all are read before any is written."""
        seen_by = {row: self._seen[row] for row in parents if row in self._seen}
        for row, parent, branch in zip(rows, parents, branches, strict=True):
            if parent in seen_by:
                seen = dict(seen_by[parent])
                seen[branch.token_id] = seen.get(branch.token_id, 0) + 1
                self._seen[row] = seen

    def take(self, rows: Array, token_ids: tuple[int, ...]) -> None:
        """Count the tokens that were sampled for `rows`; a beam's come with the next plan."""
        if self._seen:
            for row, token_id in zip(rows.tolist(), token_ids, strict=True):
                if row in self._seen and not self._params_R["is_beam"][row]:
                    seen = self._seen[row]
                    seen[token_id] = seen.get(token_id, 0) + 1

    def params(self, rows: Array) -> Array:
        """A copy of the parameters of `rows`, which stay as they are until a sequence joins."""
        return self._params_R[rows]

    def batch(self, rows: Array, params: Array, positions: Array) -> SamplingBatch:
        """How to sample `rows`, of which `params` are known, at int32 `positions`."""
        seen_rows, seen_ids, seen_counts = self._seen_pairs(rows) if self._seen else self._no_pairs
        return SamplingBatch(
            temperature_L=params["temperature"],
            top_k_L=params["top_k"],
            top_p_L=params["top_p"],
            min_p_L=params["min_p"],
            repetition_L=params["repetition"],
            presence_L=params["presence"],
            frequency_L=params["frequency"],
            seed_L=params["seed"],
            stream_L=params["stream"],
            position_L=positions.astype(np.uint32),
            num_logprobs_L=params["num_logprobs"],
            is_beam_L=params["is_beam"],
            seen_rows_C=seen_rows,
            seen_ids_C=seen_ids,
            seen_counts_C=seen_counts,
        )

    def _seen_pairs(self, rows: Array) -> tuple[Array, Array, Array]:
        """Of rows with penalties: (index of the row, token id, how often it was generated)."""
        seen_rows: list[int] = []
        seen_ids: list[int] = []
        seen_counts: list[int] = []
        for i, row in enumerate(rows.tolist()):
            if seen := self._seen.get(row):
                seen_rows += [i] * len(seen)
                seen_ids += seen.keys()
                seen_counts += seen.values()
        return (
            np.array(seen_rows, np.int32),
            np.array(seen_ids, np.int32),
            np.array(seen_counts, np.int32),
        )


def _params_row(join: Join) -> tuple:
    params = join.params
    num_logprobs = -1 if params.logprobs is None else params.logprobs
    return (
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        join.seed,
        join.stream,
        join.num_candidates or num_logprobs,
        bool(join.num_candidates),
    )


def token_logprobs(sampled: SampleResult, num_logprobs_L: Array) -> tuple[TokenLogprob | None, ...]:
    """One for each sampled row, None where it did not ask; () if none did."""
    wanted = num_logprobs_L.tolist()
    if max(wanted, default=-1) < 0:
        return ()
    found: list[TokenLogprob | None] = []
    for row, num_top in enumerate(wanted):
        if num_top < 0:
            found.append(None)
            continue
        found.append(
            TokenLogprob(
                token_id=int(sampled.token_ids_L[row]),
                logprob=float(sampled.logprobs_L[row]),
                top_token_ids=tuple(sampled.top_ids_LK[row, :num_top].tolist()),
                top_logprobs=tuple(sampled.top_logprobs_LK[row, :num_top].tolist()),
            )
        )
    return tuple(found)
