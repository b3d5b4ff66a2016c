"""BlockPool: which blocks of the KV cache are free, shared, or hold a prefix worth keeping.

Counts references and finds cached prefixes. Knows block numbers and token ids only: neither what a
block holds on the device nor why a sequence wants one. Block 0 is the null block that padding
points to; it is never handed out.

The prefix cache needs no hash of its own. Content that is registered gets a serial number, and a
full block is found by (serial of the block before it, its tokens). A block that is computed again
gets a new serial, so what followed its old content can never match: it is merely waiting to be
evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0

_Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """Invariants: a block is free exactly when its reference count is 0; `_cached[key]` is a block
    whose content is `key`, free or not; a free block keeps its content until it is handed out."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        assert num_blocks > 1, f"{num_blocks} blocks: need one beside the null block"
        assert block_size > 0, f"block_size {block_size}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.clear()

    def clear(self) -> None:
        """Take back every block and forget every prefix."""
        num_blocks = self.num_blocks
        self._refs = [0] * num_blocks
        # Next first: what has no content, then the oldest. OrderedDict, because the first key of a
        # dict that is consumed from the front takes ever longer to find.
        self._free = OrderedDict.fromkeys(range(1, num_blocks))
        self._cached: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * num_blocks  # inverse of _cached
        self._serials = [0] * num_blocks  # of registered content; the null block's 0 is the root
        self._last_serial = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that a single sequence could have: all but the null block."""
        return self.num_blocks - 1

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """Return the blocks that hold the longest cached prefix of `token_ids[:limit]`."""
        blocks: list[int] = []
        if not self.prefix_cache:
            return blocks
        parent = NULL_BLOCK
        for end in range(self.block_size, limit + 1, self.block_size):
            key = (self._serials[parent], tuple(token_ids[end - self.block_size : end]))
            block = self._cached.get(key)
            if block is None:
                break
            blocks.append(block)
            parent = block
        return blocks

    def allocate(self, num_new: int, shared: Sequence[int] = (), reserve: int = 0) -> list[int]:
        """Take a reference on the `shared` blocks and on `num_new` fresh ones; return all of them.

        Returns [] and changes nothing if that would leave fewer than `reserve` blocks free.
        """
        num_idle = sum(not self._refs[block] for block in shared)
        if len(self._free) - num_idle < num_new + reserve:
            return []
        for block in shared:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1
        return [*shared, *(self._take_next() for _ in range(num_new))]

    def _take_next(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._keys[block]
        if key is not None:
            del self._cached[key]
            self._keys[block] = None
        self._refs[block] = 1
        return block

    def register(self, block: int, parent: int, token_ids: Sequence[int]) -> None:
        """Say that `block` is full and computed, with `token_ids`, after registered `parent`."""
        if not self.prefix_cache:
            return
        assert len(token_ids) == self.block_size, f"{len(token_ids)} tokens in a full block"
        key = (self._serials[parent], tuple(token_ids))
        twin = self._cached.setdefault(key, block)
        if twin == block:
            self._keys[block] = key
            self._last_serial += 1
            self._serials[block] = self._last_serial
        else:  # two sequences computed the same; what follows either is found under the first
            self._serials[block] = self._serials[twin]

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference on each block of a sequence.

        Last block first, so that of a prefix that nobody uses the leaves are evicted before their
        parents, without which they could not be found. What holds no prefix is handed out first:
        memory that was never touched stays so, and what was touched last is nearest.
        """
        for block in reversed(list(block_ids)):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} freed twice"
            if not self._refs[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that the pool agrees with itself and with all block tables in use."""
        refs = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            assert self._refs[block] == refs[block], (
                f"block {block}: {self._refs[block]} references, {refs[block]} in tables"
            )
            is_free = block != NULL_BLOCK and not refs[block]
            assert (block in self._free) == is_free, f"block {block}: free list is wrong"
            key = self._keys[block]
            assert key is None or self._cached[key] == block, f"block {block}: cache is wrong"
        assert not refs[NULL_BLOCK], "the null block is in use"
        num_keys = sum(key is not None for key in self._keys)
        assert len(self._cached) == num_keys, f"{len(self._cached)} cached, {num_keys} keys"
