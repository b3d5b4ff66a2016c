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

// The input of up to eight rows, as fragments: lane (g, t) has columns 8t to 8t + 7 of each unit of row g.
template <bool NORM, bool PICKS, int K>
struct Fragments {
  static constexpr int UNITS = Slice<K>::MOST * CHUNK / UNIT, IN_REGISTERS = UNITS < REGISTER_UNITS ? UNITS : REGISTER_UNITS;
  u32 f[IN_REGISTERS][4];
  u32 rest;                 // of the lane, in shared memory
  // `scratch`: K floats that are free until the next barrier.
  __device__ __forceinline__ void load(const Args& p, unsigned char* input, float* scratch, float* words, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3, num_units = Slice<K>::count(warp) * (CHUNK / UNIT);    // UNITS, or a chunk less
    const bool is_row = g < p.num_rows;
    auto is_mine = [&](int u) { return is_row && (Slice<K>::IS_EVEN || u < num_units); };
    auto column = [&](int u) { return Slice<K>::column(warp, u / (CHUNK / UNIT)) + u % (CHUNK / UNIT) * UNIT + t * 8; };
    rest = smem32(input) + (warp * (UNITS - IN_REGISTERS) * 32 + lane) * 16;
    if constexpr (!NORM) {
      grid_wait();
#pragma unroll
      for (int u = 0; u < UNITS; ++u) set(u, is_mine(u) ? ldcg128(p.x + (size_t)g * K + column(u)) : make_uint4(0, 0, 0, 0));
    } else {
      for (int i = threadIdx.x; i < K / 4; i += NT) reinterpret_cast<float4*>(scratch)[i] = ldg_f4(p.gamma + i * 4);
      const float* h = p.h + (size_t)(PICKS && is_row ? __ldg(p.rows + g) : g) * K;
      grid_wait();
      float4 a[UNITS], b[UNITS];
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        a[u] = is_mine(u) ? ldcg_f4(h + column(u)) : make_float4(0, 0, 0, 0);
        b[u] = is_mine(u) ? ldcg_f4(h + column(u) + 4) : make_float4(0, 0, 0, 0);
      }
      float sum = 0;
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        sum += a[u].x * a[u].x + a[u].y * a[u].y + a[u].z * a[u].z + a[u].w * a[u].w + b[u].x * b[u].x + b[u].y * b[u].y +
               b[u].z * b[u].z + b[u].w * b[u].w;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) words[warp * ROWS + g] = sum;
      __syncthreads();
      float total = 0;
#pragma unroll
      for (int j = 0; j < NW; ++j) total += words[j * ROWS + g];
      const float r = rsqrtf(total / K + EPS);
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        const int from = Slice<K>::IS_EVEN || u < num_units ? column(u) : 0;
        const float4 c = *reinterpret_cast<float4*>(scratch + from), d = *reinterpret_cast<float4*>(scratch + from + 4);
        set(u, make_uint4(pack2(a[u].x * r * c.x, a[u].y * r * c.y), pack2(a[u].z * r * c.z, a[u].w * r * c.w),
                          pack2(b[u].x * r * d.x, b[u].y * r * d.y), pack2(b[u].z * r * d.z, b[u].w * r * d.w)));
      }
    }
  }
  __device__ __forceinline__ void set(int u, uint4 v) {
    if (u < IN_REGISTERS) {
      f[u][0] = v.x;
      f[u][1] = v.y;
      f[u][2] = v.z;
      f[u][3] = v.w;
    } else {
      sts128(rest + (u - IN_REGISTERS) * 512, v);
    }
  }
  __device__ __forceinline__ uint4 get(int u) const {
    if (u < IN_REGISTERS) return make_uint4(f[u][0], f[u][1], f[u][2], f[u][3]);
    return lds128(rest + (u - IN_REGISTERS) * 512);
  }
};

