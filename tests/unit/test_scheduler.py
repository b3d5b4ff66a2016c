"""Traces of the scheduler, as tables: one line a step.

A line is "joined | left | prefills | number decoding | copies", with sequence ids.
"""

from __future__ import annotations

import pytest

from puna.errors import ConfigError
from puna.runtime.block_pool import BlockPool
from puna.runtime.request import Request, SamplingParams
from puna.runtime.scheduler import Scheduler
from puna.runtime.step import StepResult


def make(
    num_blocks: int = 100,
    block_size: int = 4,
    batch: int = 4,
    tokens: int = 16,
    chunk: int | None = None,
    prefix_cache: bool = True,
) -> Scheduler:
    pool = BlockPool(num_blocks, block_size, prefix_cache)
    return Scheduler(pool, batch, tokens, max_seq_len=100, vocab_size=1000, max_chunk=chunk)


def add(scheduler: Scheduler, id: int, num_prompt: int, new: int = 2, n: int = 1) -> Request:
    params = SamplingParams(max_new_tokens=new, n=n)
    request = Request(id, tuple(100 * id + i for i in range(num_prompt)), params, seed=0)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> str:
    plan = scheduler.plan()
    if plan is None:
        return "idle"
    decoding = sum(seq.is_decoding for seq in scheduler.running)
    chunks = dict(plan.prefills)
    sampled = [
        1
        for seq in scheduler.running
        if seq.is_decoding or seq.num_computed + chunks.get(seq.id, 0) == len(seq.token_ids)
    ]
    scheduler.commit(plan, StepResult(token_ids=tuple(sampled)))
    scheduler.check()
    columns = (
        " ".join(f"{j.seq_id}@{j.num_computed}" for j in plan.joined),
        " ".join(map(str, plan.left)),
        " ".join(f"{seq_id}:{num_tokens}" for seq_id, num_tokens in plan.prefills),
        str(decoding),
        " ".join(f"{src}>{dst}" for src, dst in plan.copies),
    )
    return " | ".join(columns)


def trace(scheduler: Scheduler) -> list[str]:
    lines = []
    while not scheduler.is_idle:
        lines.append(step(scheduler))
    return lines


def test_in_flight_batching():
    scheduler = make()
    add(scheduler, 1, num_prompt=3, new=3)
    add(scheduler, 2, num_prompt=2, new=1)
    assert step(scheduler) == "0@0 1@0 |  | 0:3 1:2 | 0 | "
    add(scheduler, 3, num_prompt=5, new=1)
    assert trace(scheduler) == [
        "2@0 | 1 | 2:5 | 1 | ",
        " | 2 |  | 1 | ",
    ]
    assert step(scheduler) == "idle"
    add(scheduler, 4, num_prompt=1, new=1)
    assert step(scheduler) == "3@0 | 0 | 3:1 | 0 | "


def test_chunked_prefill_leaves_room_for_decode():
    scheduler = make(batch=4, tokens=6, chunk=4)
    add(scheduler, 1, num_prompt=2, new=8)
    assert step(scheduler) == "0@0 |  | 0:2 | 0 | "
    add(scheduler, 2, num_prompt=11, new=2)
    add(scheduler, 3, num_prompt=3, new=2)
    # The budget is 6: one for decode, at most a chunk of 4 for the next, one for the third.
    assert [step(scheduler) for _ in range(5)] == [
        "1@0 2@0 |  | 1:4 2:1 | 1 | ",
        " |  | 1:4 2:1 | 1 | ",
        " |  | 1:3 2:1 | 1 | ",
        " |  |  | 3 | ",
        " | 1 2 |  | 1 | ",
    ]


def test_an_idle_sequence_is_not_listed():
    scheduler = make(batch=3, tokens=3)
    add(scheduler, 1, num_prompt=1, new=9)
    step(scheduler)
    add(scheduler, 2, num_prompt=1, new=9)
    step(scheduler)
    add(scheduler, 3, num_prompt=5, new=1)
    assert step(scheduler) == "2@0 |  | 2:1 | 2 | "
    assert step(scheduler) == " |  | 2:1 | 2 | "


def test_prefix_cache_leaves_one_token_to_compute():
    scheduler = make()
    add(scheduler, 1, num_prompt=8, new=1)
    assert trace(scheduler) == ["0@0 |  | 0:8 | 0 | "]
    add(scheduler, 1, num_prompt=8, new=1)
    add(scheduler, 1, num_prompt=9, new=1)
    assert trace(scheduler) == ["1@4 2@8 | 0 | 1:4 2:1 | 0 | "]


def test_fork_shares_full_blocks_and_copies_the_tail():
    scheduler = make(prefix_cache=False)
    add(scheduler, 1, num_prompt=6, new=2, n=3)
    add(scheduler, 2, num_prompt=5, new=2, n=2)
    assert trace(scheduler) == [
        "0@0 3@0 |  | 0:6 3:5 | 0 | ",
        # Both share block 1 and get a copy of block 2, which has the fifth token of the prompt.
        "1@5 2@5 |  | 1:1 2:1 | 2 | 2>5 2>6",
        # The batch was full until nobody was left to fork from.
        "4@0 | 0 3 | 4:5 | 2 | ",
        " | 1 2 |  | 1 | ",
    ]


def test_fork_at_the_edge_of_a_block_copies_nothing():
    scheduler = make(prefix_cache=False)
    add(scheduler, 1, num_prompt=5, new=2, n=2)
    assert trace(scheduler) == ["0@0 |  | 0:5 | 0 | ", "1@4 |  | 1:1 | 1 | ", " | 0 |  | 1 | "]


def test_preemption_trace():
    # 5 blocks of 2. Both join with 2 blocks for 3 tokens; the fifth block is kept for them, so the
    # third waits. At 5 tokens both need a block: the older gets it, the newer gives up its own.
    scheduler = make(num_blocks=6, block_size=2, prefix_cache=False)
    add(scheduler, 1, num_prompt=3, new=5)
    add(scheduler, 2, num_prompt=3, new=5)
    add(scheduler, 3, num_prompt=1, new=1)
    assert trace(scheduler) == [
        "0@0 1@0 |  | 0:3 1:3 | 0 | ",
        " |  |  | 2 | ",
        " | 1 |  | 1 | ",
        " |  |  | 1 | ",
        " |  |  | 1 | ",
        "1@0 2@0 | 0 | 1:5 2:1 | 0 | ",  # with the two tokens it had generated
        " | 2 |  | 1 | ",
        " |  |  | 1 | ",
    ]
    assert scheduler.num_preemptions == 1


def test_limits_are_checked():
    with pytest.raises(ConfigError, match="max_num_tokens is 3 and max_batch_size 4"):
        make(batch=4, tokens=3)
    with pytest.raises(ConfigError, match="max_chunk"):
        make(chunk=0)


def test_abort_while_waiting_for_the_prompt():
    """The sequences that follow an aborted leader compute the prompt themselves."""
    scheduler = make(tokens=4, prefix_cache=False)
    request = add(scheduler, 1, num_prompt=6, new=1, n=3)
    step(scheduler)
    scheduler.abort(request.sequences[2])
    scheduler.abort(request.sequences[0])
    scheduler.abort(request.sequences[0])
    assert trace(scheduler) == ["1@0 | 0 | 1:4 | 0 | ", " |  | 1:2 | 0 | "]
    assert [seq.finish_reason for seq in request.sequences] == ["abort", "length", "abort"]


def test_events_are_in_the_order_of_joining():
    scheduler = make()
    for id in (3, 1, 2):
        add(scheduler, id, num_prompt=id, new=2)
    plan = scheduler.plan()
    assert plan is not None
    events = scheduler.commit(plan, StepResult(token_ids=(7, 8, 9)))
    assert [(e.sequence.request.id, e.token_ids) for e in events] == [
        (3, (7,)),
        (1, (8,)),
        (2, (9,)),
    ]
