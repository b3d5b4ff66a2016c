// csrc/wgmma.cuh without a GPU: products are computed at once.
#pragma once
#include "cluster.cuh"

inline void global_async_fence() {}
inline void box_load_kept(u32 dst, const TensorMap& map, int x, int y, int z, u32 bar) { box_load(dst, map, x, y, z, bar, 0); }
inline void box_load_shared(u32 dst, const TensorMap& map, int x, int y, int z, u32 bar, u16 mask) {
  for (u32 i = 0; i < 16; ++i)
    if (mask >> i & 1) box_load(remote(dst, i), map, x, y, z, remote(bar, i), 0);
}
inline u64 matrix(u32 addr, int stride = 1024) { return (u64)stride << 32 | addr >> 4; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
inline void wgmma_wait() {}
// Columns k to k + 15 of row r of a matrix whose rows are 128 bytes, swizzled, from a place within its first row on.
inline void elements(float (&to)[16], u32 where, u32 stride, int r) {
  const u32 addr = where << 4;
  const unsigned char* row = at((addr & ~127u) + r / 8 * stride + r % 8 * 128);
  for (int k = 0; k < 16; ++k) {
    const u32 in_row = (addr & 127) + k * 2;
    to[k] = number(*reinterpret_cast<const u16*>(row + ((in_row / 16 ^ r % 8) * 16 | in_row % 16)));
  }
}
template <int N>
inline void wgmma(float (&d)[N / 2], u64 a, u64 b, int adds) {
  const u32 given[5] = {(u32)a, (u32)b, threadIdx.x / 32 % 4u, (u32)(a >> 32), (u32)(b >> 32)};
  memcpy(lane_in(), given, sizeof given);
  float x[2][16], y[16];
  __syncwarp();
  const u32* in = machine.self->warp->in[0];
  const int lane = lane_id();
  for (int r = 0; r < 2; ++r) elements(x[r], in[0], in[3], (int)in[2] * 16 + lane / 4 + r * 8);
  for (int n = 0; n < N / 8; ++n)
    for (int j = 0; j < 2; ++j) {
      elements(y, in[1], in[4], n * 8 + lane % 4 * 2 + j);
      for (int r = 0; r < 2; ++r) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += x[r][k] * y[k];
        float& to = d[4 * n + 2 * r + j];
        to = (adds ? to : 0) + sum;
      }
    }
  __syncwarp();
}
