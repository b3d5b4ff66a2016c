"""Random steps over a poisoned paged KV cache, for the tests of the operations.

Unused slots hold NaN (the scales of an int8 cache; its numbers -128, which no operation writes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puna.batch import ForwardBatch
from puna.ops import LayerCache
from puna.quant import KV_DTYPES, Array

BLOCK = 16


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def poisoned(*shape: int, dtype: str = "float32") -> Array:
    return np.full(shape, -128 if dtype == "int8" else np.nan, KV_DTYPES[dtype])


@dataclass(frozen=True)
class Sequence:
    """`num_new` tokens of a step, the last of `num_context`."""

    num_new: int
    num_context: int


@dataclass(frozen=True)
class Paged:
    """A step over random blocks of a poisoned cache."""

    batch: ForwardBatch
    cache: LayerCache

    def slot(self, seq: int, position: int) -> tuple[int, int]:
        return int(self.batch.block_table_SM[seq, position // BLOCK]), position % BLOCK

    def new_slots(self) -> list[tuple[int, int]]:
        """Block and offset of each of the step's tokens."""
        return [(slot // BLOCK, slot % BLOCK) for slot in self.batch.slots_T.tolist()]


def poisoned_cache(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: str = "float32"
) -> LayerCache:
    scales = None, None
    if dtype == "int8":
        scales = (
            poisoned(num_blocks, num_kv_heads, BLOCK),
            poisoned(num_blocks, num_kv_heads, BLOCK),
        )
    return LayerCache(
        poisoned(num_blocks, num_kv_heads, head_dim, BLOCK, dtype=dtype),
        poisoned(num_blocks, num_kv_heads, BLOCK, head_dim, dtype=dtype),
        *scales,
    )


def store(cache: LayerCache, at: tuple[int, int], keys_KE: Array, values_KE: Array) -> None:
    """What qkv should leave of one token's float32 keys and values."""
    block, offset = at
    for head in range(len(keys_KE)):
        k_E, v_E = keys_KE[head], values_KE[head]
        if cache.key_scales_NKP is not None and cache.value_scales_NKP is not None:
            k_E, cache.key_scales_NKP[block, head, offset] = naive_int8(k_E)
            v_E, cache.value_scales_NKP[block, head, offset] = naive_int8(v_E)
        cache.keys_NKEP[block, head, :, offset] = k_E
        cache.values_NKPE[block, head, offset, :] = v_E


def naive_int8(x_E: Array) -> tuple[Array, np.float32]:
    largest = np.float32(max(abs(x) for x in x_E))
    if largest == 0:
        return np.zeros(len(x_E), np.int8), np.float32(0)
    inverse = np.float32(127) / largest
    q_E = np.array([np.rint(x * inverse) for x in x_E.astype(np.float32)]).astype(np.int8)
    return q_E, largest / np.float32(127)


def cache_arrays(cache: LayerCache) -> list[Array]:
    arrays = (cache.keys_NKEP, cache.values_NKPE, cache.key_scales_NKP, cache.value_scales_NKP)
    return [array for array in arrays if array is not None]


def contents(cache: LayerCache) -> tuple[Array, Array]:
    """Keys and values as float64 [N, P, K, E]; NaN where a number or its scale was not stored."""
    found = []
    for stored_NPKE, scales_NKP in (
        (cache.keys_NKEP.transpose(0, 3, 1, 2), cache.key_scales_NKP),
        (cache.values_NKPE.transpose(0, 2, 1, 3), cache.value_scales_NKP),
    ):
        x_NPKE = stored_NPKE.astype(np.float64)
        if scales_NKP is not None:
            x_NPKE[stored_NPKE == -128] = np.nan
            x_NPKE *= scales_NKP.transpose(0, 2, 1)[..., None]
        found.append(x_NPKE)
    return found[0], found[1]


def paged(
    rng: np.random.Generator,
    sequences: list[Sequence],
    num_kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
) -> Paged:
    """Blocks are dealt out of order; the context before the step's tokens holds random numbers."""
    num_blocks = [-(-seq.num_context // BLOCK) for seq in sequences]
    total = sum(num_blocks) + 3
    dealt = iter(rng.permutation(np.arange(1, total)).tolist())
    table_SM = np.zeros((len(sequences), max(num_blocks) + 2), np.int32)
    cache = poisoned_cache(total, num_kv_heads, head_dim, dtype)
    positions: list[int] = []
    slots: list[int] = []
    for s, seq in enumerate(sequences):
        for m in range(num_blocks[s]):
            table_SM[s, m] = next(dealt)
        for position in range(seq.num_context):
            block, offset = int(table_SM[s, position // BLOCK]), position % BLOCK
            if position >= seq.num_context - seq.num_new:
                positions.append(position)
                slots.append(block * BLOCK + offset)
                continue
            keys_KE, values_KE = floats(rng, 2, num_kv_heads, head_dim)
            store(cache, (block, offset), keys_KE, values_KE)
    starts = np.cumsum([0, *(seq.num_new for seq in sequences)])
    batch = ForwardBatch(
        token_ids_T=np.zeros(len(positions), np.int32),
        positions_T=np.array(positions, np.int32),
        slots_T=np.array(slots, np.int32),
        query_start_S1=starts.astype(np.int32),
        seq_lens_S=np.array([seq.num_context for seq in sequences], np.int32),
        block_table_SM=table_SM,
        logits_rows_L=(starts[1:] - 1).astype(np.int32),
    )
    return Paged(batch, cache)
