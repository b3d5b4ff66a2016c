// Every kernel, once, in terms of simd.h; each isa_*.cpp includes this file and returns its table.
#pragma once

#include "kernels.h"
#include "kernels_attention.h"
#include "kernels_matrix.h"
#include "kernels_rows.h"
#include "simd.h"

namespace {

void from_half(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load_half(x + i));
  if (i < n) {
    uint16_t a[LANES] = {};
    memcpy(a, x + i, 2 * (size_t)(n - i));
    store_part(out + i, load_half(a), (int)(n - i));
  }
}

void to_half(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_half(out + i, load(x + i));
  if (i < n) {
    uint16_t a[LANES];
    store_half(a, load_part(x + i, (int)(n - i)));
    memcpy(out + i, a, 2 * (size_t)(n - i));
  }
}

void quantize(const float* x, int k, int group, int limit, int scale_f32, int8_t* q,
              float* scales) {
  const int size = group ? group : k;
  const F16 high = splat((float)limit), low = splat(-(float)limit);
  for (int first = 0, g = 0; first < k; first += size, ++g) {
    const int stop = first + size < k ? first + size : k;
    const float* at = x + first;
    const int n = stop - first;
    float scale = largest_of(at, n) / (float)limit;
    if (!scale_f32) {
      uint16_t half;
      to_half(&scale, 1, &half);
      from_half(&half, 1, &scale);
    }
    scales[g] = scale;
    const F16 inverse = splat(scale > 0 ? 1.0f / scale : 0.0f);
    for (int i = 0; i < n; i += LANES) {
      const F16 scaled = mul(columns(at, i, n), inverse);
      const I16 rounded = round_to_int(max(low, min(high, scaled)));
      if (i + LANES <= n) {
        store_i8(q + first + i, rounded);
      } else {
        int8_t a[LANES];
        store_i8(a, rounded);
        memcpy(q + first + i, a, (size_t)(n - i));
      }
    }
  }
}

uint64_t read_memory(const void* p, int64_t num_bytes) {
  I16 a[8];
  for (int j = 0; j < 8; ++j) a[j] = splat_int(0);
  const char* at = (const char*)p;
  for (int64_t i = 0; i + 512 <= num_bytes; i += 512, at += 512)
    for (int j = 0; j < 8; ++j) {
      fetch(at + j * 64 + PREFETCH);
      a[j] = add(a[j], load_bytes(at + j * 64));
    }
  uint64_t total = 0;
  for (int j = 0; j < 8; ++j) {
    uint32_t lanes[LANES];
    memcpy(lanes, &a[j], sizeof lanes);
    for (uint32_t lane : lanes) total += lane;
  }
  return total;
}

const Kernels TABLE = {
#if defined(PUNA_VNNI)
    "avx512vnni", 1,
#elif defined(PUNA_AVX512)
    "avx512", 0,
#elif defined(PUNA_AVX2)
    "avx2", 0,
#else
    "portable", 0,
#endif
    norm,         convert, gemm,   row,      silu_mul,  rope,    store_key,   store_value,
    attend,       fold,    finish, quantize, from_half, to_half, read_memory,
};

}  // namespace
