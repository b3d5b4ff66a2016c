// The input of a product: loaded after the kernel has waited, normalised where it has a norm, rounded to the engine's dtype.
#pragma once
#include "stream.cuh"

// The input of one row, normalised where the kernel has a norm, into shared memory.
template <bool NORM, bool PICKS, int K>
__device__ __forceinline__ void load_row(const Args& p, unsigned char* input, float* words) {
  const int tid = threadIdx.x;
  if constexpr (!NORM) {
    grid_wait();
#pragma unroll
    for (int i = 0; i < (K / 8 + NT - 1) / NT; ++i)
      if (i * NT + tid < K / 8) reinterpret_cast<uint4*>(input)[i * NT + tid] = ldcg128(p.x + (i * NT + tid) * 8);
  } else {
    constexpr int V = (K / 4 + NT - 1) / NT;
    float4 gamma[V], v[V];
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4) gamma[i] = ldg_f4(p.gamma + (i * NT + tid) * 4);
    const float* h = PICKS ? p.h + (size_t)__ldg(p.rows) * K : p.h;
    grid_wait();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4) v[i] = ldcg_f4(h + (i * NT + tid) * 4);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4) sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    sum = warp_sum(sum);
    if (tid % 32 == 0) words[tid / 32] = sum;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int j = 0; j < NW; ++j) total += words[j];
    const float r = rsqrtf(total / K + EPS);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4)
        reinterpret_cast<uint2*>(input)[i * NT + tid] = make_uint2(pack2(v[i].x * r * gamma[i].x, v[i].y * r * gamma[i].y),
                                                                   pack2(v[i].z * r * gamma[i].z, v[i].w * r * gamma[i].w));
  }
}
