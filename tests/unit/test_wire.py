"""Messages between ranks: back as they were, and nothing but messages."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from puna.runtime.request import SamplingParams, TokenLogprob
from puna.runtime.step import Branch, Join, PromptLogits, StepPlan, StepResult
from puna.runtime.wire import Order, decode_order, decode_result, encode_order, encode_result


def test_orders_come_back() -> None:
    join = Join(3, (1, 2, 3), 3, 0, (5, 6), SamplingParams(stop=("x",), seed=7), 2**64 - 1, 1)
    plan = StepPlan(
        left=(1,),
        joined=(join,),
        branches=(Branch(4, 3, 9, 1),),
        new_blocks=((3, (7,)),),
        prefills=((3, 2),),
        copies=((5, 6),),
    )
    for order in (Order(1, (4, 5), plan), Order(0, None, StepPlan())):
        assert decode_order(encode_order(order)) == order
    assert decode_order(encode_order(None)) is None


def test_results_come_back() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 5), np.float32)[:, ::-1]
    result = StepResult((1, 2), (None, TokenLogprob(1, -0.5, (1,), (-0.5,))))
    assert decode_result(encode_result(result)) == result
    result = StepResult(prompt_logits=(PromptLogits(1, 2, logits),))
    (found,) = decode_result(encode_result(result)).prompt_logits
    assert (found.seq_id, found.start) == (1, 2)
    np.testing.assert_array_equal(found.logits, logits)  # type: ignore


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("decode", [decode_order, decode_result])
def test_a_message_brings_no_code(decode) -> None:
    for value in (Evil(), np.float32, print):
        with pytest.raises(pickle.UnpicklingError, match="has no place in a message"):
            decode(pickle.dumps(value))
