"""Wire: messages between rank 0 and the other ranks, as bytes.

Plans and results are pickled, which is quick and takes them as they are. What arrives is unpickled
against a list of the types they are made of: a connection can bring wrong data, and no code.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from puna.runtime.request import SamplingParams, TokenLogprob
from puna.runtime.step import Branch, Join, PromptLogits, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Order:
    """Rank 0 to all: run `plan` on a lane, whose last step (None: of no interest) sampled
    `token_ids`."""

    lane: int
    token_ids: tuple[int, ...] | None
    plan: StepPlan


@dataclass(frozen=True, slots=True)
class _Floats:
    """An array on its way."""

    data: bytes
    shape: tuple[int, ...]


_TYPES = MappingProxyType(
    {
        (cls.__module__, cls.__qualname__): cls
        for cls in (
            Order,
            StepPlan,
            Join,
            Branch,
            StepResult,
            PromptLogits,
            SamplingParams,
            TokenLogprob,
            _Floats,
        )
    }
)
_END = b""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _TYPES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a message")
        return _TYPES[module, name]


def encode_order(order: Order | None) -> bytes:
    """None is the end: there will be no more steps."""
    return _END if order is None else pickle.dumps(order, pickle.HIGHEST_PROTOCOL)


def decode_order(message: bytes) -> Order | None:
    """Inverse of `encode_order`."""
    if message == _END:
        return None
    found = _Unpickler(io.BytesIO(message)).load()
    assert isinstance(found, Order), type(found)
    return found


def encode_result(result: StepResult) -> bytes:
    """A StepResult; prompts' logits, float32 arrays, go as their bytes."""
    logits = tuple(
        PromptLogits(part.seq_id, part.start, _flat(part.logits)) for part in result.prompt_logits
    )
    plain = StepResult(result.token_ids, result.logprobs, logits)
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def decode_result(message: bytes) -> StepResult:
    """Inverse of `encode_result`."""
    found = _Unpickler(io.BytesIO(message)).load()
    assert isinstance(found, StepResult), type(found)
    logits = tuple(
        PromptLogits(part.seq_id, part.start, _array(part.logits)) for part in found.prompt_logits
    )
    return StepResult(found.token_ids, found.logprobs, logits)


def _flat(array: object) -> _Floats:
    assert isinstance(array, np.ndarray) and array.dtype == np.float32, array
    return _Floats(array.tobytes(), array.shape)


def _array(floats: object) -> np.ndarray:
    assert isinstance(floats, _Floats), type(floats)
    return np.frombuffer(floats.data, np.float32).reshape(floats.shape)
