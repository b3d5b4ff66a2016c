"""Lowering: the arrays of small steps, spelled out."""

from __future__ import annotations

import numpy as np
import pytest

from puna.ops.sampling import SampleResult
from puna.runtime.lower import Lowering
from puna.runtime.request import SamplingParams
from puna.runtime.step import Branch, Join, StepPlan
from puna.spec import GenerationDefaults


def join(seq_id: int, tokens: list[int], blocks: list[int], **kwargs) -> Join:
    options = {"num_prompt": len(tokens), "num_computed": 0, "seed": seq_id, **kwargs}
    params = options.pop("params", SamplingParams()).resolve(GenerationDefaults())
    return Join(seq_id, tuple(tokens), block_ids=tuple(blocks), params=params, **options)


def sampled(*tokens: int) -> SampleResult:
    empty = np.zeros((len(tokens), 0))
    return SampleResult(
        np.array(tokens, np.int32), np.full(len(tokens), np.nan, np.float32), empty, empty
    )


LOGITS = np.zeros((16, 32), np.float32)


def test_prefill_then_decode():
    lowering = Lowering(block_size=4, max_batch_size=4, max_seq_len=16)
    step = lowering.lower(
        StepPlan(
            joined=(
                join(5, [10, 11, 12, 13, 14], [3, 1]),
                join(6, [20, 21, 22], [2], num_computed=1),
                join(7, [30], [4]),
            ),
            prefills=((5, 3), (6, 2)),
            copies=((7, 2),),
        )
    )
    batch = step.batch
    assert batch.token_ids_T.tolist() == [10, 11, 12, 21, 22]
    assert batch.positions_T.tolist() == [0, 1, 2, 1, 2]
    assert batch.slots_T.tolist() == [12, 13, 14, 9, 10]
    assert batch.query_start_S1.tolist() == [0, 3, 5]
    assert batch.seq_lens_S.tolist() == [3, 3]
    assert batch.block_table_SM.tolist() == [[3], [2]]
    assert batch.logits_rows_L.tolist() == [4]
    assert step.sample_rows is None
    assert step.copies_C2.tolist() == [[7, 2]]
    assert step.sampling.position_L.tolist() == [3]
    assert lowering.record(step, sampled(9), LOGITS).token_ids == (9,)

    step = lowering.lower(
        StepPlan(prefills=((5, 2), (7, 1)), new_blocks=((6, (8,)),))
    )  # 6 decodes without being listed
    batch = step.batch
    assert batch.token_ids_T.tolist() == [13, 14, 9, 30]
    assert batch.slots_T.tolist() == [15, 4, 11, 16]
    assert batch.block_table_SM.tolist() == [[3, 1], [2, 8], [4, 0]]
    assert batch.logits_rows_L.tolist() == [1, 2, 3]
    arrays = [name for name in type(batch).__dataclass_fields__ if name != "is_decode"]
    assert all(getattr(batch, name).dtype == np.int32 for name in arrays)
    lowering.record(step, sampled(1, 2, 3), LOGITS)

    step = lowering.lower(StepPlan(left=(5,), joined=(join(8, [40], [9]),), prefills=((8, 1),)))
    assert step.batch.token_ids_T.tolist() == [2, 3, 40]
    assert step.batch.positions_T.tolist() == [4, 1, 0]
    assert step.batch.slots_T.tolist() == [32, 17, 36]
    assert step.batch.block_table_SM.tolist() == [[2, 8], [4, 0], [9, 0]]


def test_prompt_logits_among_others():
    lowering = Lowering(block_size=4, max_batch_size=4, max_seq_len=16)
    step = lowering.lower(
        StepPlan(
            joined=(
                join(1, [1, 2], [1]),
                join(2, [3, 4, 5], [2], want_prompt_logits=True),
                join(3, [6, 7, 8], [3]),
            ),
            prefills=((1, 2), (2, 2), (3, 2)),
        )
    )
    assert step.batch.logits_rows_L.tolist() == [1, 2, 3]
    assert step.sample_rows is not None
    assert step.sample_rows.tolist() == [0]
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert step.sample_logits(logits).tolist() == [[0, 1, 2, 3]]
    (found,) = lowering.record(step, sampled(9), logits).prompt_logits
    assert (found.seq_id, found.start) == (2, 0)
    np.testing.assert_array_equal(found.logits, logits[1:3])
    assert not np.shares_memory(found.logits, logits)

    step = lowering.lower(StepPlan(prefills=((2, 1), (3, 1))))
    assert step.batch.logits_rows_L.tolist() == [0, 1, 2]
    assert step.prompt_rows == ((2, 2, slice(1, 2)),)


def test_penalties_see_prompt_and_generated_tokens_apart():
    lowering = Lowering(block_size=4, max_batch_size=4, max_seq_len=16)
    penalised = SamplingParams(repetition_penalty=1.5)
    step = lowering.lower(
        StepPlan(
            joined=(
                join(1, [1, 1], [1]),
                # Resumes after a preemption: 5 and 6 were generated.
                join(2, [5, 7, 5, 6], [2], num_prompt=2, params=penalised),
            ),
            prefills=((1, 2), (2, 4)),
        )
    )

    def seen():
        batch = step.sampling
        return list(
            zip(
                batch.seen_rows_C.tolist(),
                batch.seen_ids_C.tolist(),
                batch.seen_counts_C.tolist(),
                strict=True,
            )
        )

    assert seen() == [(1, 5, 1), (1, 7, 0), (1, 6, 1)]
    lowering.record(step, sampled(9, 6), LOGITS)
    step = lowering.lower(StepPlan())
    assert seen() == [(1, 5, 1), (1, 7, 0), (1, 6, 2)]
    lowering.record(step, sampled(9, 6), LOGITS)
    step = lowering.lower(StepPlan(left=(2,)))
    assert seen() == []


def test_beams_continue_each_other():
    lowering = Lowering(block_size=4, max_batch_size=4, max_seq_len=16)
    params = SamplingParams(repetition_penalty=1.5)
    prompt = [10, 11, 12, 13, 14]
    beams = [
        join(i, prompt, [3, 1] if i == 1 else [], params=params, num_candidates=4) for i in (1, 2)
    ]
    step = lowering.lower(StepPlan(joined=tuple(beams), prefills=((1, 5),)))
    assert step.sampling.num_logprobs_L.tolist() == [4] and step.sampling.is_beam_L.all()
    lowering.record(step, sampled(9), LOGITS)  # 9 is no beam's: the plan says what they take

    step = lowering.lower(
        StepPlan(
            branches=(Branch(1, 1, 20, 2), Branch(2, 1, 21, 1)),
            new_blocks=((2, (5,)),),
            copies=((1, 5),),
        )
    )
    assert step.batch.token_ids_T.tolist() == [20, 21]
    assert step.batch.positions_T.tolist() == [5, 5]
    assert step.batch.block_table_SM.tolist() == [[3, 1], [3, 5]]
    assert step.batch.slots_T.tolist() == [5, 21]
    seen = step.sampling.seen_rows_C, step.sampling.seen_ids_C, step.sampling.seen_counts_C
    generated = [(row, token) for row, token, count in zip(*map(list, seen), strict=True) if count]
    assert generated == [(0, 20), (1, 21)] and len(seen[0]) == 2 * 6
    lowering.record(step, sampled(9, 9), LOGITS)

    step = lowering.lower(StepPlan(branches=(Branch(1, 2, 30, 2), Branch(2, 1, 31, 2))))
    assert step.batch.token_ids_T.tolist() == [30, 31]
    assert step.batch.block_table_SM.tolist() == [[3, 5], [3, 1]]
    assert step.batch.slots_T.tolist() == [22, 6]
    seen = step.sampling.seen_rows_C, step.sampling.seen_ids_C, step.sampling.seen_counts_C
    generated = [(row, token) for row, token, count in zip(*map(list, seen), strict=True) if count]
    assert generated == [(0, 21), (0, 30), (1, 20), (1, 31)]


def test_rows_are_reused_and_reset_forgets_all():
    lowering = Lowering(block_size=4, max_batch_size=2, max_seq_len=16)
    for i in range(0, 10, 2):
        left = (i - 2, i - 1) if i else ()
        joined = (join(i, [1, 2, 3, 4, 5], [1, 2]), join(i + 1, [i], [3]))
        step = lowering.lower(StepPlan(left=left, joined=joined, prefills=((i, 5), (i + 1, 1))))
        assert step.batch.block_table_SM.tolist() == [[1, 2], [3, 0]]
        lowering.record(step, sampled(1, 1), LOGITS)
    step = lowering.lower(StepPlan(reset=True, joined=(join(8, [3], [1]),), prefills=((8, 1),)))
    assert step.batch.token_ids_T.tolist() == [3]


def test_the_scheduler_may_not_join_a_sequence_twice():
    lowering = Lowering(block_size=4, max_batch_size=2, max_seq_len=16)
    plan = StepPlan(joined=(join(1, [1], [1]),), prefills=((1, 1),))
    lowering.lower(plan)
    with pytest.raises(AssertionError, match="joins twice"):
        lowering.lower(plan)
