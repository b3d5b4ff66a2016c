"""SamplingParams: what is refused, what is filled in."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from puna.errors import RequestError
from puna.runtime.request import Request, SamplingParams, Sequence
from puna.spec import GenerationDefaults


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_new_tokens", 3.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0"),
        ("temperature", False),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 1.0),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", True),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 3),
        ("logprobs", -1),
        ("n", 0),
        ("ignore_eos", 1),
    ],
)
def test_refused(field: str, value: object):
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


def test_edges_are_legal():
    SamplingParams(
        max_new_tokens=None, temperature=0, top_k=0, top_p=0, min_p=1, seed=2**64 - 1, logprobs=0
    )


def test_stop_takes_what_users_write():
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[1]).stop_token_ids == (1,)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2


def test_resolve_prefers_the_user_then_the_engine_then_neutral():
    params = SamplingParams(top_k=5).resolve(
        GenerationDefaults(temperature=0.6, top_p=0.9, top_k=50, repetition_penalty=1.1)
    )
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 0.9)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.1)
    neutral = SamplingParams().resolve(GenerationDefaults())
    assert (neutral.temperature, neutral.top_k, neutral.top_p) == (0.0, 0, 1.0)
    assert (
        SamplingParams(temperature=0).resolve(GenerationDefaults(temperature=0.6)).temperature == 0
    )


def test_has_penalties():
    assert not SamplingParams().has_penalties
    assert not SamplingParams(repetition_penalty=1.0).has_penalties
    assert SamplingParams(repetition_penalty=1.1).has_penalties
    assert SamplingParams(presence_penalty=-1).has_penalties
    assert SamplingParams(frequency_penalty=1).has_penalties


def test_sequence_ends():
    request = Request(0, (7, 8), SamplingParams(), seed=0, stop_token_ids=frozenset({9}))
    request.max_new_tokens = 2
    seq = Sequence(0, request, 0)
    assert seq.append(1) == (1,)
    assert seq.finish_reason is None
    assert seq.append(9) == (9,)
    assert seq.finish_reason == "stop"  # rather than its length
    assert seq.generated_token_ids == [1, 9]
    request.max_new_tokens = 0
    seq = Sequence(1, request, 0)
    assert seq.append(9) == ()
    assert seq.finish_reason == "length"
