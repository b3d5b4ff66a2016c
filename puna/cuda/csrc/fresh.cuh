// Queries, keys and values between CTAs that run, in words with a tag. Defined by who includes it: GROUP, ALL_HEADS.
#pragma once
#include "softmax.cuh"

constexpr int SPIN = 1 << 22;                       // a bound on polls: a lost signal sets `error` and does not hang

// The queries of a task's KV head and the key and value that this step adds, all from other CTAs that run.
struct Fresh : Queries {
  // `words` [ALL_HEADS, HEAD_DIM / 2]; `has_new`: the lane wants of key and value.
  __device__ __forceinline__ void poll(const uint2* words, int* error, int kv, bool has_new, u32 tag, int lane) {
    constexpr int HALF = HEAD_DIM / 2;
    const int g = lane >> 2, t = lane & 3;
    const uint2* queries = words + (kv * GROUP + g) * HALF + t * 16 % HALF;
    const uint2* new_key = words + (HEADS + kv) * HALF + lane % (HALF / 8) * 8;
    const uint2* new_value = new_key + KV_HEADS * HALF;
    const u32 half = lane < HALF / 8 ? 0x5410 : 0x7632;
    for (int polls = 0;; ++polls) {
      u32 wrong = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        u32 w[8] = {};
        if (g < GROUP) wrong |= ld_tagged(queries + u * 8, w, tag);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const u32 low = __byte_perm(w[2 * j], w[2 * j + 1], 0x5410), high = __byte_perm(w[2 * j], w[2 * j + 1], 0x7632);
          if constexpr (HEAD_DIM == 128) {
            q[u][j] = low;
            q[u + 2][j] = high;
          } else {
            q[u][j] = t < 2 ? low : high;
          }
        }
      }
      if (has_new) {
        u32 k[8], v[8];
        wrong |= ld_tagged(new_key, k, tag) | ld_tagged(new_value, v, tag);
        auto pair = [&](u32 (&w)[8], int j) { return __byte_perm(w[2 * j], w[2 * j + 1], half); };
        key = make_uint4(pair(k, 0), pair(k, 1), pair(k, 2), pair(k, 3));
        value = make_uint4(pair(v, 0), pair(v, 1), pair(v, 2), pair(v, 3));
      }
      if (!__any_sync(~0u, wrong != 0)) return;
      if (polls == SPIN) {
        if (lane == 0) atomicOr(error, 1);
        return;
      }
    }
  }
};
