// Kernels over a row: norm, conversion of activations, gated SiLU, RoPE. Part of kernels_impl.h.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

void norm(const float* residual, const float* partial, const float* weight, float eps, int n,
          float* out, float* sum_out) {
  F16 squares = splat(0);
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    F16 x = add(load(residual + i), load(partial + i));
    store(out + i, x);
    squares = fma(x, x, squares);
  }
  if (i < n) {
    F16 x = add(load_part(residual + i, n - i), load_part(partial + i, n - i));
    store_part(out + i, x, n - i);
    squares = fma(x, x, squares);
  }
  if (sum_out) memcpy(sum_out, out, 4 * (size_t)n);
  F16 scale = splat(1.0f / sqrtf(sum(squares) / (float)n + eps));
  for (i = 0; i + LANES <= n; i += LANES)
    store(out + i, mul(mul(load(out + i), scale), load(weight + i)));
  if (i < n)
    store_part(out + i, mul(mul(load_part(out + i, n - i), scale), load_part(weight + i, n - i)),
               n - i);
}

// 16 columns of x from i on, zeros beyond k.
PUNA_INLINE F16 columns(const float* x, int i, int k) {
  if (i + LANES <= k) return load(x + i);
  return i < k ? load_part(x + i, k - i) : splat(0);
}

// Magnitudes below this count as 0: the inverse of their scale would overflow.
constexpr float TINY = 1e-30f;

// Quantise `count` blocks of COLS columns, at most sixteen: one instruction then serves the
// maximum, the scale or the sum of all of them. x has `k` columns from here on, all of them unless
// IS_PART.
template <int COLS, bool IS_PART>
PUNA_INLINE void quantize_blocks(const float* x, int k, int count, ActBlock<COLS>* out) {
  constexpr int N = COLS / LANES;
  F16 most[LANES];
  I16 total[LANES];
  float inverse[LANES], scale[LANES], scaled_sum[LANES];
  int32_t isum[LANES];
  for (int b = count; b < LANES; ++b) {
    most[b] = splat(0);
    total[b] = splat_int(0);
  }
  for (int b = 0; b < count; ++b) {
    most[b] = splat(0);
    for (int j = 0; j < N; ++j) {
      const int i = b * COLS + j * LANES;
      most[b] = max(most[b], abs(IS_PART ? columns(x, i, k) : load(x + i)));
    }
  }
  const F16 m = largest_of_each(most);
  store(inverse, zero_below(div(splat(127), m), m, splat(TINY)));
  for (int b = 0; b < count; ++b) {
    const F16 factor = splat(inverse[b]);
    total[b] = splat_int(0);
    for (int j = 0; j < N; ++j) {
      const int i = b * COLS + j * LANES;
      const I16 rounded = round_to_int(mul(IS_PART ? columns(x, i, k) : load(x + i), factor));
      store_i8(out[b].q + j * LANES, rounded);
      total[b] = add(total[b], rounded);
    }
  }
  const I16 sum_q = sum_of_each(total);
  const F16 step = div(m, splat(127));
  store(scale, step);
  store(scaled_sum, mul(step, to_float(sum_q)));
  store_bytes(isum, shift_left(sub(splat_int(0), sum_q), 3));
  for (int b = 0; b < count; ++b) {
    out[b].scale = scale[b];
    out[b].sum = scaled_sum[b];
    out[b].isum = isum[b];
  }
}

template <int COLS>
void quantize_row(const float* x, int k, ActBlock<COLS>* out) {
  const int num_blocks = (k + PAD - 1) / PAD * PAD / COLS;
  for (int b = 0; b < num_blocks; b += LANES) {
    const int i = b * COLS, count = num_blocks - b < LANES ? num_blocks - b : LANES;
    if (i + LANES * COLS <= k)
      quantize_blocks<COLS, false>(x + i, k - i, LANES, out + b);
    else
      quantize_blocks<COLS, true>(x + i, k - i, count, out + b);
  }
}

void convert(const float* x, int k, int forms, const Acts* a, int row) {
  int padded = (k + PAD - 1) / PAD * PAD;
  int64_t at = row * a->stride;
  if (forms & AS_FLOAT) {
    float* out = a->f + at;
    if (out != x) memcpy(out, x, 4 * (size_t)k);
    for (int i = k; i < padded; ++i) out[i] = 0;
  }
  if (forms & AS_BF16)
    for (int i = 0; i < padded; i += LANES) store_bf16(a->b + at + i, columns(x, i, k));
  if (forms & AS_Q32) quantize_row<32>(x, k, a->blocks<32>(row));
  if (forms & AS_Q16) quantize_row<16>(x, k, a->blocks<16>(row));
}

void silu_mul(const float* gate, const float* up, int n, float* out) {
  const F16 one = splat(1);
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    F16 g = load(gate + i);
    store(out + i, mul(div(g, add(one, exp(sub(splat(0), g)))), load(up + i)));
  }
  if (i < n) {
    F16 g = load_part(gate + i, n - i);
    F16 u = load_part(up + i, n - i);
    store_part(out + i, mul(div(g, add(one, exp(sub(splat(0), g)))), u), n - i);
  }
}

void rope(const float* x, const float* cos, const float* sin, int head_dim, float* out) {
  int half = head_dim / 2, i = 0;
  for (; i + LANES <= half; i += LANES) {
    F16 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, sub(mul(a, c), mul(b, s)));
    store(out + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    float a = x[i], b = x[half + i];
    out[i] = a * cos[i] - b * sin[i];
    out[half + i] = b * cos[i] + a * sin[i];
  }
}

}  // namespace
