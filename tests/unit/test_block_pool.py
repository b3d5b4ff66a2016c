"""BlockPool against a model that keeps whole prefixes instead of serials."""

from __future__ import annotations

import random

import pytest

from puna.runtime.block_pool import NULL_BLOCK, BlockPool


def fill(pool: BlockPool, tokens: list[int], shared: list[int] | None = None) -> list[int]:
    """Allocate and register the blocks of `tokens`, as a scheduler would."""
    shared = shared or []
    blocks = pool.allocate(pool.blocks_for(len(tokens)) - len(shared), shared)
    register(pool, tokens, blocks, len(shared))
    return blocks


def register(pool: BlockPool, tokens: list[int], blocks: list[int], first: int) -> None:
    size = pool.block_size
    for i in range(first, len(tokens) // size):
        parent = blocks[i - 1] if i else NULL_BLOCK
        pool.register(blocks[i], parent, tokens[i * size : (i + 1) * size])


def test_null_block_is_never_handed_out():
    pool = BlockPool(5, 2)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.allocate(1) == []
    pool.check([[1, 2, 3, 4]])


def test_allocate_is_all_or_nothing():
    pool = BlockPool(5, 2)
    held = pool.allocate(2)
    assert pool.allocate(3) == []
    assert pool.allocate(1, reserve=2) == []
    assert pool.num_free == 2
    pool.check([held])
    assert len(pool.allocate(1, reserve=1)) == 1


def test_allocate_counts_the_shared_blocks_that_are_idle():
    pool = BlockPool(4, 2)
    pool.free(fill(pool, [1, 2, 3, 4]))
    shared = pool.match_prefix([1, 2, 3, 4, 5], limit=4)
    assert len(shared) == 2
    assert pool.num_free == 3
    assert pool.allocate(2, shared) == []  # taking the shared ones leaves one
    blocks = pool.allocate(1, shared)
    assert blocks[:2] == shared
    pool.check([blocks])


def test_match_needs_full_blocks_and_obeys_the_limit():
    pool = BlockPool(9, 2)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert pool.match_prefix([1, 2, 3, 4, 5, 6], limit=6) == blocks[:2]
    assert pool.match_prefix([1, 2, 3, 4], limit=3) == blocks[:1]
    assert pool.match_prefix([1, 2, 9, 9], limit=4) == blocks[:1]
    assert pool.match_prefix([3, 4], limit=2) == []
    assert pool.match_prefix([1], limit=1) == []


def test_eviction_takes_leaves_first_and_the_oldest_sequence_first():
    pool = BlockPool(7, 1)
    old, new = [1, 2, 3], [4, 5, 6]
    blocks_old, blocks_new = fill(pool, old), fill(pool, new)
    pool.free(blocks_old)
    pool.free(blocks_new)
    taken = pool.allocate(2)
    assert taken == [blocks_old[2], blocks_old[1]]
    assert pool.match_prefix(old, limit=3) == blocks_old[:1]
    assert pool.match_prefix(new, limit=3) == blocks_new
    pool.check([taken])


def test_a_recomputed_parent_does_not_revive_its_children():
    pool = BlockPool(3, 1)
    parent, child = fill(pool, [1, 2])
    pool.free([child])
    pool.free([parent])
    taken = pool.allocate(2)  # child and parent lose their content
    pool.free(taken)
    fill(pool, [1])
    assert len(pool.match_prefix([1, 2], limit=2)) == 1


def test_children_of_a_parent_evicted_first_are_out_of_reach():
    pool = BlockPool(4, 1)
    parent, child = fill(pool, [1, 2])
    pool.free([parent])
    pool.free([child])
    assert len(pool.allocate(2)) == 2  # the never-used block, then the parent
    assert pool.match_prefix([1, 2], limit=2) == []
    # The same block now begins another prefix; what followed the old one does not follow it.
    pool.register(parent, NULL_BLOCK, [9])
    assert pool.match_prefix([9, 2], limit=2) == [parent]
    pool.check([[3, parent]])


def test_twins_share_what_follows():
    pool = BlockPool(9, 1)
    first, second = fill(pool, [1]), pool.allocate(2)
    register(pool, [1, 2], second, 0)  # computed at the same time as `first`
    assert pool.match_prefix([1, 2], limit=2) == [first[0], second[1]]
    pool.check([first, second])


def test_no_prefix_cache():
    pool = BlockPool(9, 1, prefix_cache=False)
    blocks = fill(pool, [1, 2, 3])
    assert pool.match_prefix([1, 2, 3], limit=3) == []
    pool.check([blocks])


def test_check_finds_a_leak_and_a_double_free():
    pool = BlockPool(4, 1)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="references"):
        pool.check([])
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed: int):
    """What a match returns must hold exactly that prefix, whatever was evicted in between."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3])
    pool = BlockPool(rng.randint(4, 24), size, prefix_cache=rng.random() < 0.8)
    content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
    live: list[list[int]] = []
    num_hits = 0
    for _ in range(400):
        if live and rng.random() < 0.45:
            pool.free(live.pop(rng.randrange(len(live))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 6 * size))]
            shared = pool.match_prefix(tokens, limit=len(tokens) - 1)
            num_hits += len(shared)
            assert len(shared) * size < len(tokens)
            for i, block in enumerate(shared):
                assert content[block] == tuple(tokens[: (i + 1) * size])
            num_free = pool.num_free
            blocks = pool.allocate(pool.blocks_for(len(tokens)) - len(shared), shared)
            if blocks:
                assert NULL_BLOCK not in blocks
                used = {block for table in live for block in table}
                assert not used & set(blocks[len(shared) :])
                for i in range(len(shared), len(blocks)):
                    content[blocks[i]] = tuple(tokens[: (i + 1) * size])
                register(pool, tokens, blocks, len(shared))
                live.append(blocks)
            else:
                assert pool.num_free == num_free < pool.blocks_for(len(tokens))
        pool.check(live)
    for blocks in live:
        pool.free(blocks)
    pool.check([])
    assert pool.num_free == pool.num_usable
    assert bool(num_hits) == pool.prefix_cache


def test_blocks_without_content_are_used_again_first():
    pool = BlockPool(10, 4, prefix_cache=False)
    blocks = pool.allocate(3)
    pool.free(blocks)
    assert pool.allocate(3) == blocks
    assert not set(pool.allocate(2)) & set(blocks)
