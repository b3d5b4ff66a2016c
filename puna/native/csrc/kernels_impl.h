// Every kernel, once, in terms of simd.h. Each isa_*.cpp includes this file and returns its table.
//
// The order of summation for a row is fixed: products run over columns from first to last in every
// register tile, attention over positions from first to last within stretches of CONTEXT. How many
// rows are computed together changes nothing in any of them, to the bit.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

// Register tiles: rows of activations x tiles of the matrix. Sixteen-lane accumulators are what
// limits them: 32 registers of 16 lanes, or 16 of 8.
#if defined(PUNA_AVX512)
constexpr int Q8_ROWS = 6, Q4_ROWS = 6, DENSE_ROWS = 12, TILES = 2, HEAD_ROWS = 6, HEAD_VECS = 4;
#elif defined(PUNA_AVX2)
constexpr int Q8_ROWS = 2, Q4_ROWS = 2, DENSE_ROWS = 6, TILES = 1, HEAD_ROWS = 3, HEAD_VECS = 2;
#else
constexpr int Q8_ROWS = 1, Q4_ROWS = 1, DENSE_ROWS = 2, TILES = 1, HEAD_ROWS = 2, HEAD_VECS = 1;
#endif
// Where each integer weight is used once it is fetched this far ahead, into L2: 14 % faster than into L1
// for 8 bits, 2 % for 4, and 3 to 15 % faster than not at all. Floating-point weights are read from
// four tiles at a time instead (2 threads of a Zen 4, 2026-11; benchmarks/NOTES.md).
constexpr int PREFETCH = 4096;

PUNA_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- rows ---------------------------------------------------------------------------------------

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
    quantize_row<32>(x, k, a->q[0] + at, a->scale[0] + block, a->sum[0] + block, a->isum[0] + block);
  if (forms & AS_Q16)
    quantize_row<16>(x, k, a->q[1] + at, a->scale[1] + block, a->sum[1] + block, a->isum[1] + block);
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

// ---- matrices -----------------------------------------------------------------------------------

PUNA_INLINE int64_t padded_cols(const Matrix& w) { return (w.k + PAD - 1) / PAD * PAD; }
PUNA_INLINE int num_groups(const Matrix& w) {
  return w.group ? (w.k + w.group - 1) / w.group : 1;
}

struct Float32 {
  static constexpr int ROWS = DENSE_ROWS, SINGLE = 4;

  template <int MT, int NT>
  static PUNA_INLINE void micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                int64_t ld) {
    const float* p = (const float*)w.data + (int64_t)tile * w.k * TILE;
    const int64_t next = (int64_t)w.k * TILE;
    F16 f[MT][NT];
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) f[m][n] = splat(0);
    for (int k = 0; k < w.k; ++k) {
      F16 b[NT];
      for (int n = 0; n < NT; ++n) b[n] = load(p + n * next + (int64_t)k * TILE);
      for (int m = 0; m < MT; ++m) {
        F16 x = splat(a.f[(m0 + m) * a.stride + k]);
        for (int n = 0; n < NT; ++n) f[m][n] = fma(b[n], x, f[m][n]);
      }
    }
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) store(y + m * ld + n * TILE, f[m][n]);
  }
};

// Two columns lie side by side. With a dot product of bfloat16 pairs activations are rounded to
// bfloat16; elsewhere, and for float16, both become float32.
template <bool IS_BF16>
struct Pairs {
  static constexpr int ROWS = DENSE_ROWS, SINGLE = 4;

  template <int MT, int NT>
  static PUNA_INLINE void micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                int64_t ld) {
    const int pairs = (w.k + 1) / 2;
    const int64_t next = (int64_t)pairs * 2 * TILE;
    const uint16_t* p = (const uint16_t*)w.data + tile * next;
    F16 f[MT][NT];
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) f[m][n] = splat(0);
#pragma GCC unroll 4
    for (int j = 0; j < pairs; ++j) {
      I16 b[NT];
      for (int n = 0; n < NT; ++n) {
        b[n] = load_bytes(p + n * next + (int64_t)j * 2 * TILE);
      }
#if defined(PUNA_VNNI)
      if (IS_BF16) {
        for (int m = 0; m < MT; ++m) {
          int32_t pair;
          memcpy(&pair, a.b + (m0 + m) * a.stride + 2 * j, 4);
          __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
          for (int n = 0; n < NT; ++n)
            f[m][n].v[0] = _mm512_dpbf16_ps(f[m][n].v[0], (__m512bh)b[n].v[0], x);
        }
        continue;
      }
#endif
      F16 even[NT], odd[NT];
      for (int n = 0; n < NT; ++n) {
        even[n] = IS_BF16 ? even_bf16(b[n]) : even_half(b[n]);
        odd[n] = IS_BF16 ? odd_bf16(b[n]) : odd_half(b[n]);
      }
      for (int m = 0; m < MT; ++m) {
        const float* x = a.f + (m0 + m) * a.stride + 2 * j;
        F16 x0 = splat(x[0]), x1 = splat(x[1]);
        for (int n = 0; n < NT; ++n) f[m][n] = fma(odd[n], x1, fma(even[n], x0, f[m][n]));
      }
    }
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) store(y + m * ld + n * TILE, f[m][n]);
  }
};

// Integers times int8 activations, summed exactly over a block of COLS columns, then scaled in float32
// by weight's scale times activation's. A zero point z of the weights enters as the start of the
// integer sum, -z * sum of the activations; a minimum as min * (scaled sum of the activations).
template <int BITS, bool HAS_MIN, int COLS>
struct Integer {
  static constexpr int ROWS = BITS == 8 ? Q8_ROWS : Q4_ROWS, SINGLE = 1;
  static constexpr int FORM = COLS == 32 ? 0 : 1;

  static PUNA_INLINE F16 scales(const uint8_t* p, bool is_f32) {
    return is_f32 ? load((const float*)p) : load_half((const uint16_t*)p);
  }

  template <int MT, int NT>
  static PUNA_INLINE void micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                int64_t ld) {
    const bool is_f32 = w.scale_f32;
    const int64_t scale_bytes = TILE * (is_f32 ? 4 : 2);
    const int64_t next_q = padded_cols(w) * TILE * BITS / 8, next_s = num_groups(w) * scale_bytes;
    const uint8_t* q = (const uint8_t*)w.data + tile * next_q;
    const uint8_t* s = (const uint8_t*)w.scale + tile * next_s;
    const uint8_t* lowest = HAS_MIN ? (const uint8_t*)w.min + tile * next_s : nullptr;
    const int8_t* x = a.q[FORM] + m0 * a.stride;
    const int64_t blocks_a_row = a.stride / 16;
    const float* x_scale = a.scale[FORM] + m0 * blocks_a_row;
    const float* x_sum = a.sum[FORM] + m0 * blocks_a_row;
    const int32_t* x_isum = a.isum[FORM] + m0 * blocks_a_row;
    const int num_blocks = (w.k + COLS - 1) / COLS;
    const int blocks_a_group = w.group ? w.group / COLS : num_blocks;

    F16 f[MT][NT];
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) f[m][n] = splat(0);
    int left = blocks_a_group;
    for (int b = 0; b < num_blocks; ++b) {
      I16 c[MT][NT];
      for (int m = 0; m < MT; ++m) {
        I16 start = HAS_MIN ? splat_int(0) : splat_int(x_isum[m * blocks_a_row + b]);
        if (!HAS_MIN && BITS == 8) start = shift_left(start, 4);
        for (int n = 0; n < NT; ++n) c[m][n] = start;
      }
      if (BITS == 8) {
#pragma GCC unroll 8
        for (int j = 0; j < COLS / 4; ++j) {
          I16 v[NT];
          for (int n = 0; n < NT; ++n) {
            const uint8_t* at = q + n * next_q + j * 4 * TILE;
            if (MT == 1) fetch(at + PREFETCH);
            v[n] = load_bytes(at);
          }
          for (int m = 0; m < MT; ++m) {
            X16 xs = four(x + m * a.stride + j * 4);
            for (int n = 0; n < NT; ++n) c[m][n] = dot4(c[m][n], v[n], xs);
          }
        }
      } else {
#pragma GCC unroll 4
        for (int j = 0; j < COLS / 8; ++j) {
          I16 low[NT], high[NT];
          for (int n = 0; n < NT; ++n) {
            const uint8_t* at = q + n * next_q + j * 4 * TILE;
            if (MT == 1) fetch(at + PREFETCH);
            I16 both = load_bytes(at);
            low[n] = low4(both);
            high[n] = high4(both);
          }
          for (int m = 0; m < MT; ++m) {
            X16 first = four(x + m * a.stride + j * 8), second = four(x + m * a.stride + j * 8 + 4);
            for (int n = 0; n < NT; ++n) c[m][n] = dot4(dot4(c[m][n], low[n], first), high[n], second);
          }
        }
      }
      F16 scale[NT], least[NT];
      for (int n = 0; n < NT; ++n) {
        scale[n] = scales(s + n * next_s, is_f32);
        if (HAS_MIN) least[n] = scales(lowest + n * next_s, is_f32);
      }
      for (int m = 0; m < MT; ++m) {
        F16 xs = splat(x_scale[m * blocks_a_row + b]);
        F16 total = HAS_MIN ? splat(x_sum[m * blocks_a_row + b]) : xs;
        for (int n = 0; n < NT; ++n) {
          f[m][n] = fma(to_float(c[m][n]), mul(scale[n], xs), f[m][n]);
          if (HAS_MIN) f[m][n] = fma(least[n], total, f[m][n]);
        }
      }
      q += COLS * TILE * BITS / 8;
      x += COLS;
      if (--left == 0) {
        left = blocks_a_group;
        s += scale_bytes;
        if (HAS_MIN) lowest += scale_bytes;
      }
    }
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) store(y + m * ld + n * TILE, f[m][n]);
  }
};

// Not inlined: each register tile is a function of its own, so that the compiler sees one at a time.
template <class Kernel, int MT, int NT>
__attribute__((noinline)) void run_micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                         int64_t ld) {
  Kernel::template micro<MT, NT>(w, tile, a, m0, y, ld);
}

template <class Kernel, int NT>
void run_rows(const Matrix& w, int tile, const Acts& a, int m0, int m1, float* y, int64_t ld) {
  constexpr int ROWS = Kernel::ROWS;
  int m = m0;
  for (; m + ROWS <= m1; m += ROWS) run_micro<Kernel, ROWS, NT>(w, tile, a, m, y + (m - m0) * ld, ld);
  if (ROWS > 4)
    for (; m + 4 <= m1; m += 4) run_micro<Kernel, 4, NT>(w, tile, a, m, y + (m - m0) * ld, ld);
  if (ROWS > 2)
    for (; m + 2 <= m1; m += 2) run_micro<Kernel, 2, NT>(w, tile, a, m, y + (m - m0) * ld, ld);
  for (; m < m1; ++m) run_micro<Kernel, 1, NT>(w, tile, a, m, y + (m - m0) * ld, ld);
}

template <class Kernel>
void run_tiles(const Matrix& w, int t0, int t1, const Acts& a, int m0, int m1, float* y,
               int64_t ld) {
  int t = t0;
  if (m1 - m0 == 1) {  // each weight is used once: one stream, or several where a sum would wait
    constexpr int NT = Kernel::SINGLE;
    for (; t + NT <= t1; t += NT) run_micro<Kernel, 1, NT>(w, t, a, m0, y + (t - t0) * TILE, ld);
  } else if (TILES > 1) {
    for (; t + TILES <= t1; t += TILES) run_rows<Kernel, TILES>(w, t, a, m0, m1, y + (t - t0) * TILE, ld);
  }
  for (; t < t1; ++t) run_rows<Kernel, 1>(w, t, a, m0, m1, y + (t - t0) * TILE, ld);
}

void gemm(const Matrix* w, int t0, int t1, const Acts* a, int m0, int m1, float* y, int64_t ld) {
  const bool by_32 = w->group % 32 == 0;
  switch (w->kind) {
    case FLOAT32:
      return run_tiles<Float32>(*w, t0, t1, *a, m0, m1, y, ld);
    case FLOAT16:
      return run_tiles<Pairs<false>>(*w, t0, t1, *a, m0, m1, y, ld);
    case BFLOAT16:
      return run_tiles<Pairs<true>>(*w, t0, t1, *a, m0, m1, y, ld);
    case INT8:
      if (by_32 && w->has_min) return run_tiles<Integer<8, true, 32>>(*w, t0, t1, *a, m0, m1, y, ld);
      if (by_32) return run_tiles<Integer<8, false, 32>>(*w, t0, t1, *a, m0, m1, y, ld);
      if (w->has_min) return run_tiles<Integer<8, true, 16>>(*w, t0, t1, *a, m0, m1, y, ld);
      return run_tiles<Integer<8, false, 16>>(*w, t0, t1, *a, m0, m1, y, ld);
    default:
      if (by_32 && w->has_min) return run_tiles<Integer<4, true, 32>>(*w, t0, t1, *a, m0, m1, y, ld);
      if (by_32) return run_tiles<Integer<4, false, 32>>(*w, t0, t1, *a, m0, m1, y, ld);
      if (w->has_min) return run_tiles<Integer<4, true, 16>>(*w, t0, t1, *a, m0, m1, y, ld);
      return run_tiles<Integer<4, false, 16>>(*w, t0, t1, *a, m0, m1, y, ld);
  }
}

// A lane of a half or float array, through the same conversion as everywhere.
PUNA_INLINE float half_at(const uint16_t* p) {
  uint16_t a[LANES] = {*p};
  return lane0(load_half(a));
}

void row(const Matrix* w, int n, float* out) {
  const int64_t tile = n / TILE, lane = n % TILE, k = w->k;
  if (w->kind == FLOAT32) {
    const float* p = (const float*)w->data + tile * k * TILE + lane;
    for (int64_t i = 0; i < k; ++i) out[i] = p[i * TILE];
    return;
  }
  if (w->kind == FLOAT16 || w->kind == BFLOAT16) {
    const uint16_t* p = (const uint16_t*)w->data + tile * ((k + 1) / 2) * 2 * TILE + lane * 2;
    for (int64_t i = 0; i < k; i += LANES) {
      uint16_t a[LANES] = {};
      const int here = (int)(k - i < LANES ? k - i : LANES);
      for (int c = 0; c < here; ++c) a[c] = p[((i + c) / 2) * 2 * TILE + (i + c) % 2];
      store_part(out + i, w->kind == FLOAT16 ? load_half(a) : load_bf16(a), here);
    }
    return;
  }
  const int groups = num_groups(*w), group = w->group ? w->group : (int)k;
  const int bits = w->kind == INT8 ? 8 : 4, zero = w->has_min ? 0 : bits == 8 ? 128 : 8;
  const uint8_t* q = (const uint8_t*)w->data + tile * padded_cols(*w) * TILE * bits / 8;
  for (int g = 0; g < groups; ++g) {
    const int64_t at = (tile * groups + g) * TILE + lane;
    float scale, least = 0;
    if (w->scale_f32) {
      scale = ((const float*)w->scale)[at];
      if (w->has_min) least = ((const float*)w->min)[at];
    } else {
      scale = half_at((const uint16_t*)w->scale + at);
      if (w->has_min) least = half_at((const uint16_t*)w->min + at);
    }
    const int64_t stop = (g + 1) * (int64_t)group < k ? (g + 1) * (int64_t)group : k;
    for (int64_t i = g * (int64_t)group; i < stop; ++i) {
      int u;
      if (bits == 8) {
        u = q[(i / 4) * 4 * TILE + lane * 4 + i % 4];
      } else {
        int both = q[(i / 8) * 4 * TILE + lane * 4 + i % 4];
        u = i % 8 < 4 ? both & 15 : both >> 4;
      }
      float value = scale * (float)(u - zero);
      out[i] = w->has_min ? value + least : value;
    }
  }
}

// ---- KV cache -----------------------------------------------------------------------------------

template <int KIND>
struct Stored;
template <>
struct Stored<CACHE_FLOAT32> {
  typedef float Type;
  static PUNA_INLINE F16 get(const float* p) { return load(p); }
  static PUNA_INLINE void put(float* p, F16 x, int n) { store_part(p, x, n); }
};
template <>
struct Stored<CACHE_FLOAT16> {
  typedef uint16_t Type;
  static PUNA_INLINE F16 get(const uint16_t* p) { return load_half(p); }
  static PUNA_INLINE void put(uint16_t* p, F16 x, int n) {
    uint16_t a[LANES];
    store_half(a, x);
    memcpy(p, a, 2 * (size_t)n);
  }
};
template <>
struct Stored<CACHE_BFLOAT16> {
  typedef uint16_t Type;
  static PUNA_INLINE F16 get(const uint16_t* p) { return load_bf16(p); }
  static PUNA_INLINE void put(uint16_t* p, F16 x, int n) {
    float a[LANES];
    store(a, x);
    for (int i = 0; i < n; ++i) p[i] = bf16_of(a[i]);
  }
};
template <>
struct Stored<CACHE_INT8> {
  typedef int8_t Type;
  static PUNA_INLINE F16 get(const int8_t* p) { return load_i8(p); }
  static PUNA_INLINE void put(int8_t* p, F16 x, int n) {
    int8_t a[LANES];
    store_i8(a, round_to_int(x));
    memcpy(p, a, (size_t)n);
  }
};

PUNA_INLINE float largest_of(const float* x, int n) {
  F16 most = splat(0);
  for (int i = 0; i < n; i += LANES) most = max(most, abs(columns(x, i, n)));
  return largest(most);
}

// Sixteen elements at a time, multiplied by the scale's inverse where the cache is int8.
template <int KIND, class Put>
PUNA_INLINE void store_head(const float* x, int head_dim, float* scale, Put put) {
  F16 factor = splat(1);
  if (KIND == CACHE_INT8) {
    float most = largest_of(x, head_dim);
    *scale = most / 127.0f;
    factor = splat(most > TINY ? 127.0f / most : 0.0f);
  }
  for (int i = 0; i < head_dim; i += LANES) {
    int n = head_dim - i < LANES ? head_dim - i : LANES;
    F16 v = columns(x, i, head_dim);
    if (KIND == CACHE_INT8) v = mul(v, factor);
    typename Stored<KIND>::Type a[LANES];
    Stored<KIND>::put(a, v, LANES);
    put(i, n, a);
  }
}

template <int KIND>
void store_key_as(const Cache& c, int h, int slot, const float* x) {
  typedef typename Stored<KIND>::Type Type;
  const int64_t head = (int64_t)(slot / BLOCK) * c.num_kv_heads + h;
  Type* p = (Type*)c.keys_NKEP + head * c.head_dim * BLOCK + slot % BLOCK;
  float* scale = KIND == CACHE_INT8 ? c.key_scales_NKP + head * BLOCK + slot % BLOCK : nullptr;
  store_head<KIND>(x, c.head_dim, scale, [&](int first, int n, const Type* a) {
    for (int i = 0; i < n; ++i) p[(int64_t)(first + i) * BLOCK] = a[i];
  });
}

template <int KIND>
void store_value_as(const Cache& c, int h, int slot, const float* x) {
  typedef typename Stored<KIND>::Type Type;
  const int64_t head = (int64_t)(slot / BLOCK) * c.num_kv_heads + h;
  Type* p = (Type*)c.values_NKPE + (head * BLOCK + slot % BLOCK) * c.head_dim;
  float* scale = KIND == CACHE_INT8 ? c.value_scales_NKP + head * BLOCK + slot % BLOCK : nullptr;
  store_head<KIND>(x, c.head_dim, scale, [&](int first, int n, const Type* a) {
    memcpy(p + first, a, sizeof(Type) * (size_t)n);
  });
}

#define PUNA_BY_CACHE(function, ...)                                       \
  switch (cache->kind) {                                                   \
    case CACHE_FLOAT32: return function<CACHE_FLOAT32>(__VA_ARGS__);       \
    case CACHE_FLOAT16: return function<CACHE_FLOAT16>(__VA_ARGS__);       \
    case CACHE_BFLOAT16: return function<CACHE_BFLOAT16>(__VA_ARGS__);     \
    default: return function<CACHE_INT8>(__VA_ARGS__);                     \
  }

void store_key(const Cache* cache, int h, int slot, const float* x) {
  PUNA_BY_CACHE(store_key_as, *cache, h, slot, x)
}
void store_value(const Cache* cache, int h, int slot, const float* x) {
  PUNA_BY_CACHE(store_value_as, *cache, h, slot, x)
}

// ---- attention ----------------------------------------------------------------------------------

// Scores of R rows against V blocks of 16 positions each, dimension after dimension.
template <int KIND, int R, int V, bool FETCHES>
PUNA_INLINE void score(const Cache& c, int h, const int32_t* blocks, const float* const* q,
                       float scale, const int32_t* next_blocks, int next_h, float* scores) {
  typedef typename Stored<KIND>::Type Type;
  const int head_dim = c.head_dim;
  const auto keys_of = [&](int64_t block, int head) {
    return (const Type*)c.keys_NKEP + (block * c.num_kv_heads + head) * head_dim * BLOCK;
  };
  const Type *key[V], *next[V];
  for (int v = 0; v < V; ++v) {
    key[v] = keys_of(blocks[v], h);
    if (FETCHES) next[v] = keys_of(next_blocks[v], next_h);
  }
  F16 f[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) f[r][v] = splat(0);
  for (int e = 0; e < head_dim; ++e) {
    F16 k[V];
    for (int v = 0; v < V; ++v) {
      k[v] = Stored<KIND>::get(key[v] + (int64_t)e * BLOCK);
      if (FETCHES) fetch(next[v] + (int64_t)e * BLOCK);
    }
    for (int r = 0; r < R; ++r) {
      F16 x = splat(q[r][e]);
      for (int v = 0; v < V; ++v) f[r][v] = fma(k[v], x, f[r][v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    F16 factor = splat(scale);
    if (KIND == CACHE_INT8)
      factor = mul(factor, load(c.key_scales_NKP + ((int64_t)blocks[v] * c.num_kv_heads + h) * BLOCK));
    for (int r = 0; r < R; ++r) store(scores + r * CONTEXT + v * BLOCK, mul(f[r][v], factor));
  }
}

// 16 columns of a value, from `first` on; those beyond head_dim are zero.
template <int KIND, bool IS_WHOLE>
PUNA_INLINE F16 value_at(const typename Stored<KIND>::Type* value, int first, int head_dim) {
  if (IS_WHOLE || first + LANES <= head_dim) return Stored<KIND>::get(value + first);
  typename Stored<KIND>::Type a[LANES] = {};
  if (first < head_dim) memcpy(a, value + first, sizeof a[0] * (size_t)(head_dim - first));
  return Stored<KIND>::get(a);
}

// out[r] = the values' sum weighted by scores[r], columns [first, first + 16 V), position after
// position. All rows see the first visible[0] positions, later ones only some: those are added row
// by row.
template <int KIND, int R, int V, bool IS_WHOLE, bool FETCHES>
PUNA_INLINE void weigh(const Cache& c, int h, const int32_t* blocks, const int32_t* visible,
                       const float* scores, int first, const int32_t* next_blocks, int next_h,
                       float* out) {
  typedef typename Stored<KIND>::Type Type;
  const int head_dim = c.head_dim, common = visible[0];
  const int64_t size = partial_size(head_dim);
  const auto values_of = [&](const int32_t* table, int head, int position) {
    const int64_t block = table[position / BLOCK];
    return (const Type*)c.values_NKPE +
           ((block * c.num_kv_heads + head) * BLOCK + position % BLOCK) * head_dim;
  };
  F16 f[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) f[r][v] = splat(0);
  for (int j0 = 0; j0 < common; j0 += BLOCK) {
    const Type* value = values_of(blocks, h, j0);
    const char* next = FETCHES ? (const char*)(values_of(next_blocks, next_h, j0) + first) : nullptr;
    const int stop = common - j0 < BLOCK ? common - j0 : BLOCK;
    for (int j = 0; j < stop; ++j, value += head_dim) {
      F16 x[V];
      if (FETCHES) {
        for (int64_t i = 0; i < (int64_t)sizeof(Type) * V * LANES; i += 64) fetch(next + i);
        next += sizeof(Type) * (size_t)head_dim;
      }
      for (int v = 0; v < V; ++v) x[v] = value_at<KIND, IS_WHOLE>(value, first + v * LANES, head_dim);
      for (int r = 0; r < R; ++r) {
        F16 p = splat(scores[r * CONTEXT + j0 + j]);
        for (int v = 0; v < V; ++v) f[r][v] = fma(x[v], p, f[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const int at = first + v * LANES;
      if (!IS_WHOLE && at >= head_dim) continue;
      F16 total = f[r][v];
      for (int j = common; j < visible[r]; ++j)
        total = fma(value_at<KIND, IS_WHOLE>(values_of(blocks, h, j), at, head_dim),
                    splat(scores[r * CONTEXT + j]), total);
      if (IS_WHOLE || at + LANES <= head_dim)
        store(out + r * size + at, total);
      else
        store_part(out + r * size + at, total, head_dim - at);
    }
}

template <int KIND, int R, bool FETCHES>
__attribute__((noinline)) void attend_rows(const Cache& c, int h, const int32_t* blocks,
                                           const float* const* q, const int32_t* visible,
                                           float scale, const Stretch* next, float* scores,
                                           float* out) {
  const int32_t* ahead = FETCHES ? next->blocks : blocks;
  const int next_h = FETCHES ? next->h : h;
  const int num_blocks = (visible[R - 1] + BLOCK - 1) / BLOCK;
  int b = 0;
  for (; b + HEAD_VECS <= num_blocks; b += HEAD_VECS)
    score<KIND, R, HEAD_VECS, FETCHES>(c, h, blocks + b, q, scale, ahead + b, next_h,
                                       scores + b * BLOCK);
  for (; b < num_blocks; ++b)
    score<KIND, R, 1, FETCHES>(c, h, blocks + b, q, scale, ahead + b, next_h, scores + b * BLOCK);

  for (int r = 0; r < R; ++r) {
    float* s = scores + r * CONTEXT;
    const int n = visible[r], padded = (n + LANES - 1) / LANES * LANES;
    for (int i = n; i < padded; ++i) s[i] = -INFINITY;
    F16 most = splat(-INFINITY);
    for (int i = 0; i < padded; i += LANES) most = max(most, load(s + i));
    const float peak = largest(most);
    F16 total = splat(0);
    for (int i = 0; i < padded; i += LANES) {
      F16 p = exp(sub(load(s + i), splat(peak)));
      store(s + i, p);
      total = add(total, p);
    }
    float* state = out + r * partial_size(c.head_dim) + c.head_dim;
    state[0] = peak;
    state[1] = sum(total);
    if (KIND == CACHE_INT8)
      for (int i = 0; i < padded; i += BLOCK) {
        const float* scales = c.value_scales_NKP +
                              ((int64_t)blocks[i / BLOCK] * c.num_kv_heads + h) * BLOCK;
        store(s + i, mul(load(s + i), load(scales)));
      }
  }
  constexpr int STEP = HEAD_VECS * LANES;
  int first = 0;
  for (; first + STEP <= c.head_dim; first += STEP)
    weigh<KIND, R, HEAD_VECS, true, FETCHES>(c, h, blocks, visible, scores, first, ahead, next_h,
                                             out);
  if (first < c.head_dim)
    weigh<KIND, R, HEAD_VECS, false, FETCHES>(c, h, blocks, visible, scores, first, ahead, next_h,
                                              out);
}

template <int KIND, bool FETCHES>
void attend_as(const Cache& c, int h, const int32_t* blocks, int rows, const float* const* q,
               const int32_t* visible, float scale, const Stretch* next, float* scores,
               float* out) {
  const int64_t size = partial_size(c.head_dim);
  int r = 0;
  // What the first rows fetched the others need not.
#define PUNA_ATTEND(R)                                                                      \
  {                                                                                         \
    const auto attend_some = FETCHES && r == 0 ? attend_rows<KIND, R, FETCHES>              \
                                               : attend_rows<KIND, R, false>;               \
    attend_some(c, h, blocks, q + r, visible + r, scale, next, scores + r * CONTEXT,        \
                out + r * size);                                                            \
    r += R;                                                                                 \
  }
  while (r + HEAD_ROWS <= rows) PUNA_ATTEND(HEAD_ROWS)
  if (HEAD_ROWS > 4)
    while (r + 4 <= rows) PUNA_ATTEND(4)
  if (HEAD_ROWS > 3)
    while (r + 3 <= rows) PUNA_ATTEND(3)
  if (HEAD_ROWS > 2)
    while (r + 2 <= rows) PUNA_ATTEND(2)
  while (r < rows) PUNA_ATTEND(1)
#undef PUNA_ATTEND
}

template <int KIND>
void attend_and_fetch(const Cache& c, int h, const int32_t* blocks, int rows, const float* const* q,
                      const int32_t* visible, float scale, const Stretch* next, float* scores,
                      float* out) {
  const auto attend_kind = next ? attend_as<KIND, true> : attend_as<KIND, false>;
  attend_kind(c, h, blocks, rows, q, visible, scale, next, scores, out);
}

void attend(const Cache* cache, int h, const int32_t* blocks, int start, int rows,
            const float* const* q, const int32_t* visible, float scale, const Stretch* next,
            float* scores, float* out) {
  const int32_t* here = blocks + start / BLOCK;
  PUNA_BY_CACHE(attend_and_fetch, *cache, h, here, rows, q, visible, scale, next, scores, out)
}

// Online softmax (arXiv:1805.02867), stretch by stretch. A state is [values of E | peak | total].
void fold(float* state, const float* part, int head_dim) {
  const float peak = state[head_dim], other = part[head_dim];
  const float most = peak > other ? peak : other;
  const F16 old_factor = exp(splat(peak - most)), new_factor = exp(splat(other - most));
  int i = 0;
  for (; i + LANES <= head_dim; i += LANES)
    store(state + i, fma(load(part + i), new_factor, mul(load(state + i), old_factor)));
  if (i < head_dim) {
    int n = head_dim - i;
    F16 v = fma(load_part(part + i, n), new_factor, mul(load_part(state + i, n), old_factor));
    store_part(state + i, v, n);
  }
  const float a = lane0(old_factor), b = lane0(new_factor);
  state[head_dim] = most;
  state[head_dim + 1] = state[head_dim + 1] * a + part[head_dim + 1] * b;
}

void finish(const float* state, int head_dim, float* out) {
  const F16 total = splat(state[head_dim + 1]);
  int i = 0;
  for (; i + LANES <= head_dim; i += LANES) store(out + i, div(load(state + i), total));
  if (i < head_dim) {
    int n = head_dim - i;
    store_part(out + i, div(load_part(state + i, n), total), n);
  }
}

// ---- building -----------------------------------------------------------------------------------

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
  int64_t total = 0;
  for (int j = 0; j < 8; ++j) total += sum(a[j]);
  return (uint64_t)total;
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
    norm,  convert,     gemm,   row,    silu_mul, rope, store_key, store_value,
    attend, fold, finish, quantize, from_half, to_half, read_memory,
};

}  // namespace
