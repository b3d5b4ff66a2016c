// The KV cache and attention over it. Part of kernels_impl.h.
//
// The order of summation for a row is fixed: from the first position to the last within stretches
// of CONTEXT, which are folded in order. Rows that are computed together do not change each other.
#pragma once

#include <cmath>

#include "kernels.h"
#include "kernels_rows.h"
#include "simd.h"

namespace {

// Register tiles: query rows x vectors of 16 positions (or of 16 columns of the values).
#if defined(PUNA_AVX512)
constexpr int HEAD_ROWS = 6, HEAD_VECS = 4;
#elif defined(PUNA_AVX2)
constexpr int HEAD_ROWS = 3, HEAD_VECS = 2;
#else
constexpr int HEAD_ROWS = 2, HEAD_VECS = 1;
#endif

static_assert(HEAD_ROWS <= SCORE_ROWS, "scores have room for a register tile's rows");

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
    const F16 most = splat(65504), least = splat(-65504);  // rather than infinite
    uint16_t a[LANES];
    store_half(a, max(least, min(most, x)));
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

// The keys [E, P] and the values [P, E] of a block's KV head.
template <class Type>
PUNA_INLINE Type* keys_of(const Cache& c, int64_t block, int h) {
  return (Type*)c.keys_NKEP + (block * c.num_kv_heads + h) * c.head_dim * BLOCK;
}
template <class Type>
PUNA_INLINE Type* values_of(const Cache& c, int64_t block, int h) {
  return (Type*)c.values_NKPE + (block * c.num_kv_heads + h) * BLOCK * c.head_dim;
}

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
  Type* p = keys_of<Type>(c, slot / BLOCK, h) + slot % BLOCK;
  float* scale = KIND == CACHE_INT8 ? c.key_scales_NKP + head * BLOCK + slot % BLOCK : nullptr;
  store_head<KIND>(x, c.head_dim, scale, [&](int first, int n, const Type* a) {
    for (int i = 0; i < n; ++i) p[(int64_t)(first + i) * BLOCK] = a[i];
  });
}

template <int KIND>
void store_value_as(const Cache& c, int h, int slot, const float* x) {
  typedef typename Stored<KIND>::Type Type;
  const int64_t head = (int64_t)(slot / BLOCK) * c.num_kv_heads + h;
  Type* p = values_of<Type>(c, slot / BLOCK, h) + (int64_t)(slot % BLOCK) * c.head_dim;
  float* scale = KIND == CACHE_INT8 ? c.value_scales_NKP + head * BLOCK + slot % BLOCK : nullptr;
  store_head<KIND>(x, c.head_dim, scale, [&](int first, int n, const Type* a) {
    memcpy(p + first, a, sizeof(Type) * (size_t)n);
  });
}

#define PUNA_BY_CACHE(function, ...)                \
  switch (cache->kind) {                            \
    case CACHE_FLOAT32:                             \
      return function<CACHE_FLOAT32>(__VA_ARGS__);  \
    case CACHE_FLOAT16:                             \
      return function<CACHE_FLOAT16>(__VA_ARGS__);  \
    case CACHE_BFLOAT16:                            \
      return function<CACHE_BFLOAT16>(__VA_ARGS__); \
    default:                                        \
      return function<CACHE_INT8>(__VA_ARGS__);     \
  }

void store_key(const Cache* cache, int h, int slot, const float* x) {
  PUNA_BY_CACHE(store_key_as, *cache, h, slot, x)
}
void store_value(const Cache* cache, int h, int slot, const float* x) {
  PUNA_BY_CACHE(store_value_as, *cache, h, slot, x)
}

// Scores of R rows against V blocks of 16 positions each, dimension after dimension.
template <int KIND, int R, int V, bool FETCHES>
PUNA_INLINE void score(const Cache& c, int h, const int32_t* blocks, const float* const* q,
                       float scale, const int32_t* next_blocks, int next_h, float* scores) {
  typedef typename Stored<KIND>::Type Type;
  const int head_dim = c.head_dim;
  const Type *key[V], *next[V];
  for (int v = 0; v < V; ++v) {
    key[v] = keys_of<Type>(c, blocks[v], h);
    if (FETCHES) next[v] = keys_of<Type>(c, next_blocks[v], next_h);
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
      factor =
          mul(factor, load(c.key_scales_NKP + ((int64_t)blocks[v] * c.num_kv_heads + h) * BLOCK));
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
  F16 f[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) f[r][v] = splat(0);
  for (int j0 = 0; j0 < common; j0 += BLOCK) {
    const Type* value = values_of<Type>(c, blocks[j0 / BLOCK], h);
    const char* next =
        FETCHES ? (const char*)(values_of<Type>(c, next_blocks[j0 / BLOCK], next_h) + first)
                : nullptr;
    const int stop = common - j0 < BLOCK ? common - j0 : BLOCK;
    for (int j = 0; j < stop; ++j, value += head_dim) {
      F16 x[V];
      if (FETCHES) {
        for (int64_t i = 0; i < (int64_t)sizeof(Type) * V * LANES; i += 64) fetch(next + i);
        next += sizeof(Type) * (size_t)head_dim;
      }
      for (int v = 0; v < V; ++v)
        x[v] = value_at<KIND, IS_WHOLE>(value, first + v * LANES, head_dim);
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
      for (int j = common; j < visible[r]; ++j) {
        const Type* value = values_of<Type>(c, blocks[j / BLOCK], h) + j % BLOCK * head_dim;
        total = fma(value_at<KIND, IS_WHOLE>(value, at, head_dim), splat(scores[r * CONTEXT + j]),
                    total);
      }
      if (IS_WHOLE || at + LANES <= head_dim)
        store(out + r * size + at, total);
      else
        store_part(out + r * size + at, total, head_dim - at);
    }
}

// Scores become weights: exponentials relative to the largest of them, which goes to state[0], and
// their sum to state[1]. round(place, weights) gives the weights as they will be multiplied.
// Weights from n on, to the next multiple of 16, are 0; returns that multiple.
template <class Round>
PUNA_INLINE int soften(float* s, int n, float* state, Round round) {
  const int padded = (n + LANES - 1) / LANES * LANES;
  for (int i = n; i < padded; ++i) s[i] = -INFINITY;
  F16 most = splat(-INFINITY);
  for (int i = 0; i < padded; i += LANES) most = max(most, load(s + i));
  const float peak = largest(most);
  F16 total = splat(0);
  for (int i = 0; i < padded; i += LANES)
    total = add(total, round(i, exp(sub(load(s + i), splat(peak)))));
  state[0] = peak;
  state[1] = sum(total);
  return padded;
}

#if defined(PUNA_VNNI)
// `score` and `weigh` for a bfloat16 cache, with dot products of bfloat16 pairs: queries and
// weights are rounded to bfloat16, and pairs of dimensions, or of positions, are brought together
// on the way.

// q_ld: from one query of `q` to the next.
template <int R, int V, bool FETCHES>
PUNA_INLINE void score_pairs(const Cache& c, int h, const int32_t* blocks, const uint16_t* q,
                             int64_t q_ld, float scale, const int32_t* next_blocks, int next_h,
                             float* scores) {
  const int head_dim = c.head_dim;
  const uint16_t *key[V], *next[V];
  for (int v = 0; v < V; ++v) {
    key[v] = keys_of<uint16_t>(c, blocks[v], h);
    if (FETCHES) next[v] = keys_of<uint16_t>(c, next_blocks[v], next_h);
  }
  F16 f[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) f[r][v] = splat(0);
  for (int e = 0; e < head_dim; e += 2) {
    I16 k[V];
    for (int v = 0; v < V; ++v) {
      const uint16_t* p = key[v] + (int64_t)e * BLOCK;
      k[v] = zip_bf16(p, p + BLOCK);
      if (FETCHES) fetch(next[v] + (int64_t)e * BLOCK);
    }
    for (int r = 0; r < R; ++r) {
      const I16 x = two_bf16(q + r * q_ld + e);
      for (int v = 0; v < V; ++v) f[r][v] = dot_bf16(f[r][v], k[v], x);
    }
  }
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < R; ++r) store(scores + r * CONTEXT + v * BLOCK, mul(f[r][v], splat(scale)));
}

// Every row's weights are zero from its own context's end to the longest one's, `positions`.
template <int R, int V, bool IS_WHOLE, bool FETCHES>
PUNA_INLINE void weigh_pairs(const Cache& c, int h, const int32_t* blocks, int positions,
                             const uint16_t (*weights)[CONTEXT], int first,
                             const int32_t* next_blocks, int next_h, float* out) {
  const int head_dim = c.head_dim;
  const int64_t size = partial_size(head_dim);
  F16 f[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) f[r][v] = splat(0);
  for (int j0 = 0; j0 < positions; j0 += BLOCK) {
    const uint16_t* value = values_of<uint16_t>(c, blocks[j0 / BLOCK], h) + first;
    const uint16_t* next =
        FETCHES ? values_of<uint16_t>(c, next_blocks[j0 / BLOCK], next_h) + first : nullptr;
    const int stop = positions - j0 < BLOCK ? positions - j0 : BLOCK;
    for (int j = 0; j < stop; j += 2, value += 2 * head_dim) {
      if (FETCHES) {
        for (int i = 0; i < V * LANES; i += 32) fetch(next + i), fetch(next + head_dim + i);
        next += 2 * head_dim;
      }
      // What lies beyond the last position is not ours to multiply, not even by zero.
      const uint16_t zeros[LANES] = {};
      I16 x[V];
      for (int v = 0; v < V; ++v) {
        const int at = v * LANES, left = head_dim - first - at;
        const uint16_t *a = value + at, *b = value + head_dim + at;
        uint16_t part[2][LANES] = {};
        if (!IS_WHOLE && left < LANES) {
          for (int i = 0; i < left; ++i) part[0][i] = a[i];
          for (int i = 0; i < left && j + 1 < stop; ++i) part[1][i] = b[i];
          a = part[0], b = part[1];
        }
        x[v] = zip_bf16(a, j + 1 < stop ? b : zeros);
      }
      for (int r = 0; r < R; ++r) {
        const I16 p = two_bf16(weights[r] + j0 + j);
        for (int v = 0; v < V; ++v) f[r][v] = dot_bf16(f[r][v], x[v], p);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const int at = first + v * LANES;
      if (IS_WHOLE || at + LANES <= head_dim)
        store(out + r * size + at, f[r][v]);
      else if (at < head_dim)
        store_part(out + r * size + at, f[r][v], head_dim - at);
    }
}

template <int R, bool FETCHES>
__attribute__((noinline)) void attend_rows_in_pairs(const Cache& c, int h, const int32_t* blocks,
                                                    const float* const* q, const int32_t* visible,
                                                    float scale, const Stretch* next, float* scores,
                                                    float* out) {
  const int32_t* ahead = FETCHES ? next->blocks : blocks;
  const int next_h = FETCHES ? next->h : h;
  const int num_blocks = (visible[R - 1] + BLOCK - 1) / BLOCK;
  const int64_t q_ld = (c.head_dim + LANES - 1) / LANES * LANES;
  uint16_t* q_bf16 = (uint16_t*)(scores + R * CONTEXT);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < c.head_dim; i += LANES)
      store_bf16(q_bf16 + r * q_ld + i, columns(q[r], i, c.head_dim));
  int b = 0;
  for (; b + HEAD_VECS <= num_blocks; b += HEAD_VECS)
    score_pairs<R, HEAD_VECS, FETCHES>(c, h, blocks + b, q_bf16, q_ld, scale, ahead + b, next_h,
                                       scores + b * BLOCK);
  for (; b < num_blocks; ++b)
    score_pairs<R, 1, FETCHES>(c, h, blocks + b, q_bf16, q_ld, scale, ahead + b, next_h,
                               scores + b * BLOCK);
  uint16_t weights[R][CONTEXT];
  for (int r = 0; r < R; ++r) {
    float* s = scores + r * CONTEXT;
    float* state = out + r * partial_size(c.head_dim) + c.head_dim;
    const int padded = soften(s, visible[r], state, [&](int i, F16 p) {
      store_bf16(weights[r] + i, p);
      return load_bf16(weights[r] + i);
    });
    for (int i = padded; i < num_blocks * BLOCK; i += LANES) store_bf16(weights[r] + i, splat(0));
  }
  constexpr int STEP = HEAD_VECS * LANES;
  for (int first = 0; first < c.head_dim; first += STEP) {
    if (first + STEP <= c.head_dim)
      weigh_pairs<R, HEAD_VECS, true, FETCHES>(c, h, blocks, visible[R - 1], weights, first, ahead,
                                               next_h, out);
    else
      weigh_pairs<R, HEAD_VECS, false, FETCHES>(c, h, blocks, visible[R - 1], weights, first, ahead,
                                                next_h, out);
  }
}
#endif

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
    float* state = out + r * partial_size(c.head_dim) + c.head_dim;
    const int padded = soften(s, visible[r], state, [&](int i, F16 p) {
      store(s + i, p);
      return p;
    });
    if (KIND == CACHE_INT8)
      for (int i = 0; i < padded; i += BLOCK) {
        const float* scales =
            c.value_scales_NKP + ((int64_t)blocks[i / BLOCK] * c.num_kv_heads + h) * BLOCK;
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

typedef void (*AttendRows)(const Cache&, int, const int32_t*, const float* const*, const int32_t*,
                           float, const Stretch*, float*, float*);
template <int KIND, int R, bool FETCHES>
PUNA_INLINE AttendRows kernel_of() {
#if defined(PUNA_VNNI)
  if (KIND == CACHE_BFLOAT16) return attend_rows_in_pairs<R, FETCHES>;
#endif
  return attend_rows<KIND, R, FETCHES>;
}

template <int KIND, bool FETCHES>
void attend_as(const Cache& c, int h, const int32_t* blocks, int rows, const float* const* q,
               const int32_t* visible, float scale, const Stretch* next, float* scores,
               float* out) {
  const int64_t size = partial_size(c.head_dim);
  int r = 0;
  // What the first rows fetched the others need not.
#define PUNA_ATTEND(R)                                                                   \
  {                                                                                      \
    const auto attend_some =                                                             \
        FETCHES && r == 0 ? kernel_of<KIND, R, FETCHES>() : kernel_of<KIND, R, false>(); \
    attend_some(c, h, blocks, q + r, visible + r, scale, next, scores, out + r * size);  \
    r += R;                                                                              \
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
  // One of the two factors is e^0.
  const F16 one = splat(1);
  const F16 old_factor = peak == most ? one : exp(splat(peak - most));
  const F16 new_factor = other == most ? one : exp(splat(other - most));
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

}  // namespace
