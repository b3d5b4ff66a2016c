// What the program asks of the arithmetic: plain structs and a table of functions, filled once for
// each instruction set (isa_*.cpp). Kernels know rows and tiles; they know no threads, no batches
// and no model.
//
// Shape suffixes as in puna/ops/__init__.py: T tokens, D hidden, H query heads, K KV heads, E
// head_dim, N KV blocks, P block size. A tile is 16 output rows of a matrix (puna/layout.py).
#pragma once

#include <cstdint>

enum MatrixKind : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, INT4 = 4 };
enum CacheKind : int32_t {
  CACHE_FLOAT32 = 0,
  CACHE_FLOAT16 = 1,
  CACHE_BFLOAT16 = 2,
  CACHE_INT8 = 3
};

constexpr int TILE = 16;   // rows of a matrix in a tile
constexpr int BLOCK = 16;  // tokens in a KV block
constexpr int CONTEXT =
    128;                 // context positions that attention sums at a time, always the same ones
constexpr int PAD = 32;  // columns are padded to this

// A packed matrix [n, k] in layout "tiles".
struct Matrix {
  int32_t kind;  // MatrixKind
  int32_t n, k;
  int32_t group;  // columns a scale serves; 0: all of a row
  int32_t has_min;
  int32_t scale_f32;  // scales and minima are float32, else float16
  const void* data;
  const void* scale;
  const void* min;
};

// Forms in which a kernel wants its activations. Columns up to the next multiple of PAD are zero.
enum Form : int32_t {
  AS_FLOAT = 1,
  AS_BF16 = 2,
  AS_Q32 = 4,  // int8 with a scale for every 32 columns
  AS_Q16 = 8,  // int8 with a scale for every 16 columns
};

// COLS columns of a row as int8, and what belongs to them. Side by side, because a register tile
// would read three times as many streams otherwise: 3 % of its time (Zen 4, 2026-11).
template <int COLS>
struct ActBlock {
  int8_t q[COLS];
  float scale;
  float sum;     // scale * sum of q
  int32_t isum;  // -8 * sum of q: what a zero point of 8 adds
};

// Rows of activations in the forms that were asked for, `stride` columns each.
struct Acts {
  int64_t stride;
  float* f;
  uint16_t* b;
  ActBlock<32>* q32;
  ActBlock<16>* q16;

  // Row m in blocks of COLS columns.
  template <int COLS>
  ActBlock<COLS>* blocks(int64_t m) const {
    const int64_t at = m * (stride / COLS);
    if constexpr (COLS == 32)
      return q32 + at;
    else
      return q16 + at;
  }
};

// One layer's KV cache.
struct Cache {
  int32_t kind;  // CacheKind
  int32_t num_kv_heads, head_dim;
  void* keys_NKEP;
  void* values_NKPE;
  float* key_scales_NKP;  // CACHE_INT8 only
  float* value_scales_NKP;
};

// CONTEXT positions of one KV head: as many blocks from here on in a block table.
struct Stretch {
  const int32_t* blocks;
  int h;
};

// What one row of attention over one stretch of context leaves: the largest score, the sum of
// exponentials, and the weighted values [E].
inline int64_t partial_size(int head_dim) { return head_dim + 2; }

// Floats that attention needs for itself: scores of as many rows as a register tile has, and their
// queries in another form.
constexpr int SCORE_ROWS = 6;
inline int64_t score_size(int head_dim) {
  return SCORE_ROWS * (CONTEXT + (head_dim + 31) / 16 * 8);
}

struct Kernels {
  const char* name;
  int32_t has_bf16_dot;

  // out[d] = (residual + partial)[d] / rms * weight[d], and sum[d] = residual + partial if wanted.
  void (*norm)(const float* residual, const float* partial, const float* weight, float eps, int n,
               float* out, float* sum);
  // One row x[k] into row `row` of the forms asked for (AS_FLOAT: unless x is that row already).
  void (*convert)(const float* x, int k, int forms, const Acts* acts, int row);
  // y[(m - m0) * ld + (t - t0) * 16 + lane] = dot products of rows m0..m1 with tiles t0..t1. The
  // weights of the tiles behind these are fetched on the way if `fetches`.
  void (*gemm)(const Matrix* w, int t0, int t1, const Acts* acts, int m0, int m1, float* y,
               int64_t ld, bool fetches);
  // Row n of a matrix as float32.
  void (*row)(const Matrix* w, int n, float* out);
  // out[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  // Half-split rotation of one head.
  void (*rope)(const float* x, const float* cos, const float* sin, int head_dim, float* out);
  // Store one token's key (or value) of KV head h at slot = block * BLOCK + offset.
  void (*store_key)(const Cache* cache, int h, int slot, const float* x);
  void (*store_value)(const Cache* cache, int h, int slot, const float* x);
  // Rows q[r] of KV head h against positions start .. start + visible[r] of a sequence with block
  // table `blocks`; start is a multiple of CONTEXT, 1 <= visible[r] <= CONTEXT and ascending in r.
  // Row r's result is at out + r * (E + 2). `scores` has room for score_size(E) floats. Where
  // `next` is not null, what it names is fetched on the way.
  void (*attend)(const Cache* cache, int h, const int32_t* blocks, int start, int rows,
                 const float* const* q, const int32_t* visible, float scale, const Stretch* next,
                 float* scores, float* out);
  // Fold one stretch's result into that of those before it.
  void (*fold)(float* state, const float* part, int head_dim);
  // out[e] = weighted values / sum of exponentials
  void (*finish)(const float* state, int head_dim, float* out);
  // Round-to-nearest quantisation of one row in groups (0: one), as puna.quant.quantize: q, and the
  // scales in float32, rounded to float16 first unless scale_f32.
  void (*quantize)(const float* x, int k, int group, int limit, int scale_f32, int8_t* q,
                   float* scales);
  // Half precision to float32 and back.
  void (*from_half)(const uint16_t* x, int64_t n, float* out);
  void (*to_half)(const float* x, int64_t n, uint16_t* out);
  // Some number that depends on every 64th byte: to read memory as fast as it can be read.
  uint64_t (*read)(const void* p, int64_t num_bytes);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* vnni_kernels();
