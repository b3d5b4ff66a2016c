// csrc/wgmma.cuh without a GPU: products are computed at once.
#pragma once
#include "sm90.cuh"

inline void input_load(u32 dst, const TensorMap& map, int x, u32 bar) { box_load(dst, map, x, 0, 0, bar); }
inline void global_async_fence() {}
inline u64 matrix(u32 addr) { return addr >> 4; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
inline void wgmma_wait() {}
// Column k of row r of a matrix whose rows are 128 bytes, swizzled, from a place within its first row on.
inline float element(u64 where, int r, int k) {
  const u32 addr = (u32)where << 4, in_row = (addr & 127) + k * 2;
  const unsigned char* row = at((addr & ~127u) + r * 128);
  return number(*reinterpret_cast<const u16*>(row + ((in_row / 16 ^ r % 8) * 16 | in_row % 16)));
}
inline void wgmma(float (&d)[ROWS / 2], u64 a, u64 b, int adds) {
  const u32 given[3] = {(u32)a, (u32)b, threadIdx.x / 32 % 4u};
  memcpy(lane_in(), given, sizeof given);
  together([](Warp& w) {
    float x[16][16], y[ROWS][16];
    for (int k = 0; k < 16; ++k) {
      for (int r = 0; r < 16; ++r) x[r][k] = element(w.in[0][0], (int)w.in[0][2] * 16 + r, k);
      for (int t = 0; t < ROWS; ++t) y[t][k] = element(w.in[0][1], t, k);
    }
    for (int i = 0; i < 32; ++i)
      for (int n = 0; n < ROWS / 8; ++n)
        for (int r = 0; r < 4; ++r) {
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += x[i / 4 + r / 2 * 8][k] * y[n * 8 + i % 4 * 2 + r % 2][k];
          w.out[i][n * 4 + r] = __float_as_uint(sum);
        }
  });
  for (int i = 0; i < ROWS / 2; ++i) d[i] = (adds ? d[i] : 0) + __uint_as_float(lane_out()[i]);
}
