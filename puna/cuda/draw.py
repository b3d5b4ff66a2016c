"""Drawing tokens on the GPU: what `puna.ops.sampling` does for rows with a temperature, by torch.

Temperature, top-k, top-p, min-p and the draw, in that order and in float64, with the same noise
for the same (seed, stream, position, token): the token is the reference's unless two scores lie
within a rounding error. Penalties, logprobs and beams are not here. Nothing waits for the GPU.

Shape suffixes as in `puna.ops.sampling`; G rows that are drawn at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from puna.cuda.hash32 import mix32
from puna.ops.sampling import SamplingBatch, noise_keys
from puna.quant import Array

Tensor = Any  # a torch.Tensor

# Temporaries of a group of rows take at most about so much, beyond the memory plan.
_SCRATCH_BYTES = 48 << 20
_BYTES_A_TOKEN = 80


def can_draw(batch: SamplingBatch) -> bool:
    """Whether all rows are greedy or drawn, and none asks for more."""
    return not len(batch.seen_rows_C) and bool((batch.num_logprobs_L < 0).all())


def draw_tokens(
    logits_LV: Tensor,
    batch: SamplingBatch,
    rows: Array,
    last_tokens_R: Tensor,
    out_tokens_L: Tensor,
) -> None:
    """Replace the tokens of the rows that have a temperature, in `out_tokens_L` and, for row
    `rows[l]` of the mirror, in `last_tokens_R`. On the current stream."""
    drawn = np.flatnonzero(batch.temperature_L)
    at_once = max(1, _SCRATCH_BYTES // (_BYTES_A_TOKEN * logits_LV.shape[1]))
    for start in range(0, len(drawn), at_once):
        group = drawn[start : start + at_once]
        index_G = _to(logits_LV, group.astype(np.int64))
        tokens_G = _draw(logits_LV[index_G], batch, group)
        out_tokens_L[index_G] = tokens_G
        last_tokens_R[_to(logits_LV, rows[group].astype(np.int64))] = tokens_G


def _draw(x_GV: Tensor, batch: SamplingBatch, group: Array) -> Tensor:
    """int32 [G]: a token for each row of float32 logits."""
    vocab = x_GV.shape[1]
    temperature_G1 = _column(x_GV, batch.temperature_L[group])
    z_GV = (x_GV.double() - x_GV.amax(1, keepdim=True).double()) / temperature_G1
    is_kept_GV = x_GV > -torch.inf
    top_k_G = batch.top_k_L[group].astype(np.int64)
    top_k_G[top_k_G >= vocab] = 0
    if top_k_G.any():
        # Tokens that tie with the k-th stay.
        best_GK = torch.topk(x_GV, int(top_k_G.max()), dim=1).values
        kth_G1 = best_GK.gather(1, _to(x_GV, np.maximum(top_k_G - 1, 0))[:, None])
        is_kept_GV &= (x_GV >= kth_G1) | _to(x_GV, top_k_G == 0)[:, None]
    top_p_G = batch.top_p_L[group]
    if (top_p_G < 1).any():
        is_kept_GV &= _nucleus(z_GV.masked_fill(~is_kept_GV, -torch.inf), _column(z_GV, top_p_G))
    min_p_G = batch.min_p_L[group].astype(np.float64)
    if min_p_G.any():
        with np.errstate(divide="ignore"):  # no bound where it is 0
            is_kept_GV &= z_GV >= _column(z_GV, np.log(min_p_G))
    keys = noise_keys(*(x[group] for x in (batch.seed_L, batch.stream_L, batch.position_L)))
    z_GV += _gumbel(vocab, *(_to(x_GV, key_G.view(np.int32))[:, None] for key_G in keys))
    return z_GV.masked_fill_(~is_kept_GV, -torch.inf).argmax(1).int()


def _nucleus(z_GV: Tensor, top_p_G1: Tensor) -> Tensor:
    """bool [G, V]: the fewest best whose probabilities reach top_p; of equals, the first."""
    sorted_GV, ids_GV = torch.sort(z_GV, dim=1, descending=True, stable=True)
    mass_GV = sorted_GV.exp_().cumsum(1)
    # The first that reaches it is in; rounding may leave none that does.
    is_in_GV = torch.ones_like(ids_GV, dtype=torch.bool)
    is_in_GV[:, 1:] = (mass_GV < top_p_G1 * mass_GV[:, -1:])[:, :-1]
    is_in_GV |= top_p_G1 >= 1
    return torch.empty_like(is_in_GV).scatter_(1, ids_GV, is_in_GV)


def _gumbel(vocab: int, key0_G1: Tensor, key1_G1: Tensor) -> Tensor:
    """float64 [G, V]: `puna.ops.sampling.gumbel` of all tokens."""
    ids_V = torch.arange(vocab, dtype=torch.int32, device=key0_G1.device)
    bits_GV = ids_V ^ key0_G1
    spare_GV = torch.empty_like(bits_GV)
    mix32(bits_GV, spare_GV)
    bits_GV ^= key1_G1
    mix32(bits_GV, spare_GV)
    uniform_GV = bits_GV.double()
    uniform_GV += torch.where(bits_GV < 0, float(2**32), 0.0).double()  # as unsigned
    uniform_GV += 0.5
    uniform_GV *= 2.0**-32
    return uniform_GV.log_().neg_().log_().neg_()


def _column(like: Tensor, values_G: Array) -> Tensor:
    """float64 [G, 1] on the device of `like`."""
    return _to(like, values_G.astype(np.float64))[:, None]


def _to(like: Tensor, array: Array) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
