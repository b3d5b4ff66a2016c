"""Shapes that steps are padded to on a GPU, and what a padded step is."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_session import random_prompt
from test_lower import join

from puna.engine import Limits
from puna.runtime.cuda_inputs import (
    InputPlaces,
    InputWriter,
    StepShape,
    StepShapes,
    decode_sizes,
    most_ints,
    prefill_sizes,
)
from puna.runtime.lower import LoweredStep, Lowering
from puna.runtime.step import StepPlan

LIMITS = Limits(max_seq_len=300, max_batch_size=20, max_num_tokens=200, block_size=64, num_blocks=9)
MAX_BLOCKS = 5


def test_sizes_are_few_and_near():
    assert decode_sizes(1) == (1,)
    assert decode_sizes(7) == (1, 2, 3, 4, 6, 7)
    assert decode_sizes(64) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert decode_sizes(150)[-4:] == (64, 96, 128, 150)
    sizes = prefill_sizes(2048)
    assert sizes[-1] == 2048 and len(sizes) < 40
    assert all(size % 16 == 0 for size in sizes)
    for i in range(len(sizes) - 1):
        assert sizes[i + 1] - sizes[i] <= max(16, sizes[i] / 4)
    assert prefill_sizes(7) == (7,)


def test_shapes():
    shapes = StepShapes(LIMITS)
    assert shapes.decode(5) == StepShape(6, 6, 6, True)
    assert shapes.decode(20) == StepShape(20, 20, 20, True)
    lowering = Lowering(64, 20, 300)
    step = lowering.lower(StepPlan(joined=(join(1, [1] * 70, [1, 2]),), prefills=((1, 33),)))
    assert shapes.of(step) == StepShape(48, 20, 1, False)
    step = lowering.lower(StepPlan(joined=(join(2, [1] * 3, [3]),), prefills=((1, 37), (2, 3))))
    assert shapes.of(step) == StepShape(48, 20, 20, False)
    # Chunks of one token are a decode step, whether anything is sampled or not.
    step = lowering.lower(
        StepPlan(left=(1, 2), joined=(join(3, [1] * 3, [3]),), prefills=((3, 1),))
    )
    assert shapes.of(step) == StepShape(1, 1, 1, True)
    wants = join(4, [1] * 2, [4], want_prompt_logits=True)
    step = lowering.lower(StepPlan(joined=(wants,), prefills=((4, 1),)))
    assert shapes.of(step) == StepShape(1, 1, 1, True)
    assert (written(step, shapes.of(step))["rows"] == -1).all(), "sampled where the logits go"
    wants = join(5, [1] * 30, [5], want_prompt_logits=True)
    for num_logits in (20, 0):  # of 9 tokens, and then of more than are computed at once
        step = lowering.lower(
            StepPlan(
                joined=(wants,) if num_logits else (), prefills=((5, 9 if num_logits else 21),)
            )
        )
        assert shapes.of(step) == StepShape(16 if num_logits else 32, 20, num_logits, False)


def written(step: LoweredStep, shape: StepShape) -> dict[str, np.ndarray]:
    """What a GPU finds of a step in a buffer that held anything before."""
    places = InputPlaces.of(shape, MAX_BLOCKS)
    buffer = np.full(most_ints(LIMITS), -77, np.int32)
    assert places.num_ints <= len(buffer)
    InputWriter(buffer, places, 64).write(step)
    tokens, seqs, logits = shape.num_tokens, shape.num_seqs, shape.num_logits
    sizes = {
        "token_ids": tokens,
        "positions": tokens,
        "slots": tokens,
        "query_start": seqs + 1,
        "seq_lens": seqs,
        "logits_rows": logits,
        "rows": logits,
        "block_table": seqs * MAX_BLOCKS,
    }
    starts = [getattr(places, name) for name in sizes]
    assert starts == sorted(starts) and all(start % 4 == 0 for start in starts)
    return {name: buffer[getattr(places, name) :][:size] for name, size in sizes.items()}


@pytest.mark.parametrize("seed", range(20))
def test_a_padded_step_is_the_step_and_nothing_else(seed: int):
    """Random sequences, some in decode: the real part is as lowered, the rest belongs to nobody."""
    rng = random.Random(seed)
    lowering, shapes = Lowering(64, 20, 300), StepShapes(LIMITS)
    num_seqs, is_decode = rng.randint(1, 20), rng.random() < 0.5
    prompts = [random_prompt(rng, 1, 9) for _ in range(num_seqs)]
    joined = tuple(join(i, prompt, [i + 1]) for i, prompt in enumerate(prompts))
    chunks = [len(p) if is_decode else rng.randint(1, len(p)) for p in prompts]
    step = lowering.lower(StepPlan(joined=joined, prefills=tuple(enumerate(chunks))))
    if is_decode:
        step = lowering.lower(StepPlan())
        assert (step.batch.token_ids_T == -1 - step.rows).all()
    batch, shape = step.batch, shapes.of(step)
    found = written(step, shape)
    num_tokens, num_logits = batch.num_tokens, len(batch.logits_rows_L)
    real = {
        "token_ids": batch.token_ids_T,
        "positions": batch.positions_T,
        "slots": batch.slots_T,
        "query_start": batch.query_start_S1,
        "seq_lens": batch.seq_lens_S,
        "logits_rows": batch.logits_rows_L,
        "rows": [] if step.prompt_rows else step.rows,
    }
    for name, array in real.items():
        np.testing.assert_array_equal(found[name][: len(array)], array, name)
    table_SM = found["block_table"].reshape(shape.num_seqs, MAX_BLOCKS)
    num_blocks = batch.block_table_SM.shape[1]
    np.testing.assert_array_equal(table_SM[:num_seqs, :num_blocks], batch.block_table_SM)
    assert not table_SM[num_seqs:].any() and not table_SM[:, num_blocks:].any()
    assert not found["token_ids"][num_tokens:].any() and not found["positions"][num_tokens:].any()
    assert (found["slots"][num_tokens:] < 64).all() and (found["slots"][num_tokens:] >= 0).all()
    assert (found["query_start"][num_seqs:] == num_tokens).all()
    assert not found["seq_lens"][num_seqs:].any()
    assert not found["logits_rows"][num_logits:].any()
    assert (found["rows"][num_logits:] == -1).all()
