// What the products of a layer have in common: a head's numbers, and SiLU. Defined by who compiles it: HEADS, KV_HEADS, HEAD_DIM,
// KV_BLOCK.
#pragma once
#include "sm90.cuh"

constexpr int Q_SIZE = HEADS * HEAD_DIM, ALL_HEADS = HEADS + 2 * KV_HEADS;
// Of float16's range up to 65,504, so that residuals of a million may still be told.
constexpr float SCALE = BF16 ? 1.f : 1 / 16.f;

__device__ __forceinline__ float silu(float v) { return v / (1.f + __expf(-v)); }
// In half as many instructions, where nothing else runs meanwhile.
__device__ __forceinline__ float fast_silu(float v) { return v * approximate_inverse(1.f + approximate_exp2(v * -1.44269504f)); }
// A query's or key's numbers of dimensions d and d + HEAD_DIM / 2 of a head.
__device__ __forceinline__ float2 rotated(float a, float b, float2 rotation) {
  return make_float2(a * rotation.x - b * rotation.y, b * rotation.x + a * rotation.y);
}
// Where the cache has a head of keys or values: `head` is behind those of queries, of keys, then of values.
__device__ __forceinline__ u16* cache_place(u16* keys, u16* values, int head, int slot) {
  return (head < HEADS + KV_HEADS ? keys : values) +
         (((size_t)(slot / KV_BLOCK) * KV_HEADS + (head - HEADS) % KV_HEADS) * KV_BLOCK + slot % KV_BLOCK) * HEAD_DIM;
}
