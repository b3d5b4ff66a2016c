// The best token of a row: of equals the lowest.
#pragma once
#include "sm90.cuh"

__device__ __forceinline__ bool is_better(float2 a, float2 b) {
  return a.x > b.x || (a.x == b.x && __float_as_int(a.y) < __float_as_int(b.y));
}
__device__ __forceinline__ float2 better_of_lanes(float2 mine, int first, int end) {
#pragma unroll
  for (int o = first; o < end; o <<= 1) {
    const float2 other = make_float2(__shfl_xor_sync(~0u, mine.x, o), __shfl_xor_sync(~0u, mine.y, o));
    if (is_better(other, mine)) mine = other;
  }
  return mine;
}

// tokens[r] = the best of each CTA's best tokens of row r; it becomes the last token of row rows[r] of the mirror. After a lost
// signal all tokens are -1.
extern "C" __global__ void pick(const float2* best, const int* rows, int* last, int* tokens, const int* error, int num_ctas) {
  grid_wait();
  const int r = blockIdx.x;
  float2 mine = make_float2(-INFINITY_F, __int_as_float(0x7fffffff));
  for (int j = threadIdx.x; j < num_ctas; j += 32) {
    const float2 other = __ldcg(best + j * ROWS + r);
    if (is_better(other, mine)) mine = other;
  }
  mine = better_of_lanes(mine, 1, 32);
  if (threadIdx.x) return;
  const int token = __ldcg(error) ? -1 : __float_as_int(mine.y);
  tokens[r] = token;
  if (rows[r] >= 0) last[rows[r]] = token;
}
