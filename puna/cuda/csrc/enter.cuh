// Defined by who includes it: HIDDEN, EPS.
#pragma once
#include "sm90.cuh"

// Rows of the residual (`rows`; null: all, in order), normalised: the input of a product. 256 threads a row.
extern "C" __global__ __launch_bounds__(256) void enter(const float* h, const float* gamma, const int* rows, u16* next) {
  constexpr int THREADS = 256, V = (HIDDEN / 4 + THREADS - 1) / THREADS;
  float* words = reinterpret_cast<float*>(shared_memory());      // [8]
  const int tid = threadIdx.x;
  launch_dependents();
  grid_wait();
  const float* from = h + (size_t)(rows ? rows[blockIdx.x] : blockIdx.x) * HIDDEN;
  float4 v[V];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i * THREADS + tid >= HIDDEN / 4) continue;
    v[i] = ldcg_f4(from + (i * THREADS + tid) * 4);
    sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
  sum = warp_sum(sum);
  if (tid % 32 == 0) words[tid / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int j = 0; j < THREADS / 32; ++j) sum += words[j];
  const float r = rsqrtf(sum / HIDDEN + EPS);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i * THREADS + tid >= HIDDEN / 4) continue;
    const float4 g = ldg_f4(gamma + (i * THREADS + tid) * 4);
    reinterpret_cast<uint2*>(next)[blockIdx.x * (HIDDEN / 4) + i * THREADS + tid] =
        make_uint2(pack2(v[i].x * r * g.x, v[i].y * r * g.y), pack2(v[i].z * r * g.z, v[i].w * r * g.w));
  }
}
