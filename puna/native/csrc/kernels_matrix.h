// Products of rows with packed matrices, and a matrix's rows as numbers. Part of kernels_impl.h.
//
// The order of summation for a row is fixed: from the first column to the last in every register
// tile. How many rows are computed together changes nothing in any of them, to the bit.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

// Register tiles: rows of activations x tiles of the matrix. Sixteen-lane accumulators are what
// limits them: 32 registers of 16 lanes, or 16 of 8.
#if defined(PUNA_AVX512)
constexpr int Q8_ROWS = 6, Q4_ROWS = 6, DENSE_ROWS = 12, TILES = 2;
#elif defined(PUNA_AVX2)
constexpr int Q8_ROWS = 2, Q4_ROWS = 2, DENSE_ROWS = 6, TILES = 1;
#else
constexpr int Q8_ROWS = 1, Q4_ROWS = 1, DENSE_ROWS = 2, TILES = 1;
#endif
// Where each integer weight is used once it is fetched this far ahead, into L2. With 2048 bytes a
// thread alone decodes a 1.1B int8 model 18 % faster than with 4096 and two decode small and large
// ones 3 to 13 % faster; L1 is worse, and not at all as good for one thread but not for two (Zen 4,
// 2026-11; benchmarks/NOTES.md). Floating-point weights are read from four tiles at a time instead.
constexpr int PREFETCH = 2048;

PUNA_INLINE int64_t padded_cols(const Matrix& w) { return (w.k + PAD - 1) / PAD * PAD; }
PUNA_INLINE int num_groups(const Matrix& w) { return w.group ? (w.k + w.group - 1) / w.group : 1; }

struct Float32 {
  static constexpr int ROWS = DENSE_ROWS, SINGLE = 4;

  template <int MT, int NT>
  static PUNA_INLINE void micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                int64_t ld, int) {
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
                                int64_t ld, int) {
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
          const I16 x = two_bf16(a.b + (m0 + m) * a.stride + 2 * j);
          for (int n = 0; n < NT; ++n) f[m][n] = dot_bf16(f[m][n], b[n], x);
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

// Integers times int8 activations, summed exactly over a block of COLS columns, then scaled in
// float32 by weight's scale times activation's. A zero point z of the weights enters as the start
// of the integer sum, -z * sum of the activations; a minimum as min * (scaled sum of the
// activations).
template <int BITS, bool HAS_MIN, int COLS>
struct Integer {
  static constexpr int ROWS = BITS == 8 ? Q8_ROWS : Q4_ROWS, SINGLE = 1;

  static PUNA_INLINE F16 scales(const uint8_t* p, bool is_f32) {
    return is_f32 ? load((const float*)p) : load_half((const uint16_t*)p);
  }

  template <int MT, int NT>
  static PUNA_INLINE void micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                int64_t ld, int quarter) {
    const bool is_f32 = w.scale_f32;
    const int64_t scale_bytes = TILE * (is_f32 ? 4 : 2);
    const int64_t next_q = padded_cols(w) * TILE * BITS / 8, next_s = num_groups(w) * scale_bytes;
    const uint8_t* q = (const uint8_t*)w.data + tile * next_q;
    const uint8_t* s = (const uint8_t*)w.scale + tile * next_s;
    const uint8_t* lowest = HAS_MIN ? (const uint8_t*)w.min + tile * next_s : nullptr;
    const ActBlock<COLS>* x = a.blocks<COLS>(m0);
    const int64_t next_x = a.stride / COLS;
    const int num_blocks = (w.k + COLS - 1) / COLS;
    const int blocks_a_group = w.group ? w.group / COLS : num_blocks;

    F16 f[MT][NT];
    for (int m = 0; m < MT; ++m)
      for (int n = 0; n < NT; ++n) f[m][n] = splat(0);
    const uint8_t* ahead = q + NT * next_q + quarter * 64;
    int left = blocks_a_group;
    for (int b = 0; b < num_blocks; ++b) {
      if (MT == ROWS && quarter >= 0)
        for (int n = 0; n < NT; ++n)
          for (int i = 0; i < COLS * TILE * BITS / 8; i += 256)
            fetch(ahead + n * next_q + (int64_t)b * COLS * TILE * BITS / 8 + i);
      I16 c[MT][NT];
      for (int m = 0; m < MT; ++m) {
        I16 start = HAS_MIN ? splat_int(0) : splat_int(x[m * next_x].isum);
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
            X16 xs = four(x[m * next_x].q + j * 4);
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
            const int8_t* xq = x[m * next_x].q + j * 8;
            X16 first = four(xq), second = four(xq + 4);
            for (int n = 0; n < NT; ++n)
              c[m][n] = dot4(dot4(c[m][n], low[n], first), high[n], second);
          }
        }
      }
      F16 scale[NT], least[NT];
      for (int n = 0; n < NT; ++n) {
        scale[n] = scales(s + n * next_s, is_f32);
        if (HAS_MIN) least[n] = scales(lowest + n * next_s, is_f32);
      }
      for (int m = 0; m < MT; ++m) {
        F16 xs = splat(x[m * next_x].scale);
        F16 total = HAS_MIN ? splat(x[m * next_x].sum) : xs;
        for (int n = 0; n < NT; ++n) {
          f[m][n] = fma(to_float(c[m][n]), mul(scale[n], xs), f[m][n]);
          if (HAS_MIN) f[m][n] = fma(least[n], total, f[m][n]);
        }
      }
      q += COLS * TILE * BITS / 8;
      ++x;
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

// Not inlined: each register tile is a function of its own, so that the compiler sees one at a
// time. Its results are written to lines that came nearer meanwhile: 6 % of a product of 2048
// columns whose results are not in the cache (Zen 4, 2026-11).
template <class Kernel, int MT, int NT>
__attribute__((noinline)) void run_micro(const Matrix& w, int tile, const Acts& a, int m0, float* y,
                                         int64_t ld, int quarter) {
  for (int m = 0; m < MT; ++m)
    for (int n = 0; n < NT; ++n) fetch_to_write(y + m * ld + n * TILE);
  Kernel::template micro<MT, NT>(w, tile, a, m0, y, ld, quarter);
}

// Each of the first four register tiles fetches a quarter of the next tiles' weights if `fetches`:
// 3 % of a prompt of 128 tokens. That every register tile does so costs 2 % (Zen 4, 2026-11).
template <class Kernel, int NT>
void run_rows(const Matrix& w, int tile, const Acts& a, int m0, int m1, float* y, int64_t ld,
              bool fetches) {
  constexpr int ROWS = Kernel::ROWS;
  int m = m0, quarter = fetches ? 0 : 4;
  for (; m + ROWS <= m1; m += ROWS, ++quarter)
    run_micro<Kernel, ROWS, NT>(w, tile, a, m, y + (m - m0) * ld, ld, quarter < 4 ? quarter : -1);
  if (ROWS > 4)
    for (; m + 4 <= m1; m += 4) run_micro<Kernel, 4, NT>(w, tile, a, m, y + (m - m0) * ld, ld, -1);
  if (ROWS > 2)
    for (; m + 2 <= m1; m += 2) run_micro<Kernel, 2, NT>(w, tile, a, m, y + (m - m0) * ld, ld, -1);
  for (; m < m1; ++m) run_micro<Kernel, 1, NT>(w, tile, a, m, y + (m - m0) * ld, ld, -1);
}

template <class Kernel>
void run_tiles(const Matrix& w, int t0, int t1, const Acts& a, int m0, int m1, float* y, int64_t ld,
               bool fetches) {
  int t = t0;
  if (m1 - m0 == 1) {  // each weight is used once: one stream, or several where a sum would wait
    constexpr int NT = Kernel::SINGLE;
    for (; t + NT <= t1; t += NT)
      run_micro<Kernel, 1, NT>(w, t, a, m0, y + (t - t0) * TILE, ld, -1);
  } else if (TILES > 1) {
    for (; t + TILES <= t1; t += TILES)
      run_rows<Kernel, TILES>(w, t, a, m0, m1, y + (t - t0) * TILE, ld, fetches);
  }
  for (; t < t1; ++t) run_rows<Kernel, 1>(w, t, a, m0, m1, y + (t - t0) * TILE, ld, fetches);
}

void gemm(const Matrix* w, int t0, int t1, const Acts* a, int m0, int m1, float* y, int64_t ld,
          bool fetches) {
  const bool by_32 = w->group % 32 == 0;
  switch (w->kind) {
    case FLOAT32:
      return run_tiles<Float32>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
    case FLOAT16:
      return run_tiles<Pairs<false>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
    case BFLOAT16:
      return run_tiles<Pairs<true>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
    case INT8:
      if (by_32 && w->has_min)
        return run_tiles<Integer<8, true, 32>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
      if (by_32) return run_tiles<Integer<8, false, 32>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
      if (w->has_min)
        return run_tiles<Integer<8, true, 16>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
      return run_tiles<Integer<8, false, 16>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
    default:
      if (by_32 && w->has_min)
        return run_tiles<Integer<4, true, 32>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
      if (by_32) return run_tiles<Integer<4, false, 32>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
      if (w->has_min)
        return run_tiles<Integer<4, true, 16>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
      return run_tiles<Integer<4, false, 16>>(*w, t0, t1, *a, m0, m1, y, ld, fetches);
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

}  // namespace
