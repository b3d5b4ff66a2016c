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

template <int BLOCK_COLS>
void quantize_row(const float* x, int k, int8_t* q, float* scale, float* scaled_sum,
                  int32_t* isum) {
  constexpr int N = BLOCK_COLS / LANES;
  int padded = (k + PAD - 1) / PAD * PAD;
  for (int i = 0, b = 0; i < padded; i += BLOCK_COLS, ++b) {
    F16 v[N];
    F16 most = splat(0);
    for (int j = 0; j < N; ++j) {
      v[j] = columns(x, i + j * LANES, k);
      most = max(most, abs(v[j]));
    }
    float m = largest(most);
    F16 inverse = splat(m > TINY ? 127.0f / m : 0.0f);
    I16 total = splat_int(0);
    for (int j = 0; j < N; ++j) {
      I16 rounded = round_to_int(mul(v[j], inverse));
      store_i8(q + i + j * LANES, rounded);
      total = add(total, rounded);
    }
    const int32_t sum_q = sum(total);
    scale[b] = m / 127.0f;
    scaled_sum[b] = scale[b] * (float)sum_q;
    isum[b] = -8 * sum_q;
  }
}

void convert(const float* x, int k, int forms, const Acts* a, int row) {
  int padded = (k + PAD - 1) / PAD * PAD;
  int64_t at = row * a->stride, block = row * (a->stride / 16);
  if (forms & AS_FLOAT) {
    float* out = a->f + at;
    if (out != x) memcpy(out, x, 4 * (size_t)k);
    for (int i = k; i < padded; ++i) out[i] = 0;
  }
  if (forms & AS_BF16)
    for (int i = 0; i < padded; i += LANES) store_bf16(a->b + at + i, columns(x, i, k));
  if (forms & AS_Q32)
    quantize_row<32>(x, k, a->q[0] + at, a->scale[0] + block, a->sum[0] + block,
                     a->isum[0] + block);
  if (forms & AS_Q16)
    quantize_row<16>(x, k, a->q[1] + at, a->scale[1] + block, a->sum[1] + block,
                     a->isum[1] + block);
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
