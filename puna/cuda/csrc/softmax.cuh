// Keys and values of a stretch of tokens in shared memory, and a warp's softmax over such stretches.
//
// Defined by who includes it: HEAD_DIM (64, 128), GROUP: query heads of a KV head, at most eight.
#pragma once
#include "sm90.cuh"

constexpr int TOKENS = 32, EIGHTS = TOKENS / 8;     // most of a stretch
// Eight tokens of keys or values: the dimensions in parts of 64, each [8][64]; the 16-byte pieces of a row are swizzled by the row, so
// that neither a row's nor a column's accesses meet in a bank.
constexpr int EIGHT = 8 * HEAD_DIM * 2, KV_STAGE = EIGHTS * EIGHT;
__device__ __forceinline__ u32 kv_piece(int token, int piece) {       // token: of the eight; piece: of eight dimensions
  return piece / 8 * 1024 + token * 128 + (piece % 8 ^ token) * 16;
}
// A ring whose stages hold whole stretches, as `Softmax` reads it.
template <class R>
struct WholeStretches {
  R& ring;
  u32 stage = 0;
  __device__ __forceinline__ void wait() { stage = ring.wait(); }
  __device__ __forceinline__ u32 eight(int n) const { return stage + n * EIGHT; }
  __device__ __forceinline__ void next_out(int, bool) { ring.next_out(); }
};

// The queries of a KV head as fragments, unit by unit of 32 dimensions: lane (g, t) has of query g the dimensions 16t to 16t + 15 of
// each 64. And the key and value that this step adds, which the cache may not have had yet when they were requested: lane i has
// dimensions 8i to 8i + 7.
struct Queries {
  u32 q[HEAD_DIM / 32][4];
  uint4 key, value;
};

// A warp's softmax over its stretches of a task. Tokens are the rows of the scores' product, dimensions those of the values', so that the
// query heads of a KV head need no more than the eight columns. Lane (g, t) has heads 2t and 2t + 1: the largest score, the sum (of
// its own tokens, until `finish`), and of each sixteen dimensions the weighted values of the g-th and of the (g + 8)-th.
struct Softmax {
  static constexpr int UNITS = HEAD_DIM / 32, TILES = HEAD_DIM / 16, HEADS_OF_LANE = GROUP == 1 ? 1 : 2;
  float o[TILES][4] = {}, m[HEADS_OF_LANE], l[HEADS_OF_LANE] = {};
  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int j = 0; j < HEADS_OF_LANE; ++j) m[j] = -INFINITY_F;
  }
  // What a lane has of each head that there is: call(value, head, dimension).
  template <class Call>
  __device__ __forceinline__ void each(int lane, Call call) {
#pragma unroll
    for (int j = 0; j < HEADS_OF_LANE; ++j) {
      const int head = lane % 4 * 2 + j;
      if (head >= GROUP) continue;
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) call(o[i][2 * r + j], head, i * 16 + r * 8 + lane / 4);
    }
  }
  // Of the heads whose sums a lane tells: call(largest score, sum, head).
  template <class Call>
  __device__ __forceinline__ void each_sum(int lane, Call call) const {
#pragma unroll
    for (int j = 0; j < HEADS_OF_LANE; ++j)
      if (lane / 4 == 0 && lane % 4 * 2 + j < GROUP) call(m[j], l[j], lane % 4 * 2 + j);
  }
  // Keys and then values of a stretch from token `at` on lie in the ring, `num` eights of each; `refill(num, whether values)` is called as
  // each have been read. `is_early`: where the stretch holds the token that this step adds, it was requested before the cache had that.
  template <class R, class Refill>
  __device__ __forceinline__ void take(const Queries& fresh, R& ring, int num, int at, int end, int len, bool is_early, int lane, Refill refill) {
    constexpr int PIECES = HEAD_DIM / 8;
    const int g = lane >> 2, t = lane & 3, pos = len - 1 - at;
    const bool is_last = pos < TOKENS, lacks_new = is_last && is_early;
    const auto put_new = [&](uint4 v) {
      if (lane < PIECES) sts128(ring.eight(pos / 8) + kv_piece(pos % 8, lane), v);
    };
    ring.wait();
    if (lacks_new) {
      put_new(fresh.key);
      __syncwarp();
    }
    constexpr int SIXTEENS = EIGHTS / 2;
    float s[SIXTEENS][4] = {};    // tokens g and g + 8 of each sixteen, heads 2t and 2t + 1; of tokens that are not there whatever the last have
#pragma unroll
    for (int n = 0; n < SIXTEENS; ++n) {
      const u32 low = ring.eight(min(n * 2, num - 1)), high = ring.eight(min(n * 2 + 1, num - 1));
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        const u32 piece = kv_piece(g, u / 2 * 8 + t * 2 + u % 2);
        const uint4 a = lds128(low + piece), b = lds128(high + piece);
        mma16(s[n], a.x, b.x, a.y, b.y, fresh.q[u][0], fresh.q[u][1]);
        mma16(s[n], a.z, b.z, a.w, b.w, fresh.q[u][2], fresh.q[u][3]);
      }
    }
    if (lacks_new) async_fence();
    __syncwarp();
    refill(num, false);
    ring.next_out(num, false);
    constexpr float scale = 1.4426950408889634f / (HEAD_DIM == 64 ? 8.f : 11.313708498984761f);  // log2(e) / sqrt(HEAD_DIM)
#pragma unroll
    for (int j = 0; j < HEADS_OF_LANE; ++j) {
      float top = m[j];
#pragma unroll
      for (int n = 0; n < SIXTEENS; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& score = s[n][2 * r + j];
          score = at + n * 16 + r * 8 + g < end ? score * scale : -INFINITY_F;
          top = fmaxf(top, score);
        }
#pragma unroll
      for (int o = 4; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));    // finite: a stretch's first token is one of the context
      const float by = approximate_exp2(m[j] - top);
      m[j] = top;
      l[j] *= by;
#pragma unroll
      for (int n = 0; n < SIXTEENS; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& score = s[n][2 * r + j];
          score = approximate_exp2(score - top);
          l[j] += score;
        }
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        o[i][j] *= by;
        o[i][2 + j] *= by;
      }
    }
    u32 p[SIXTEENS][2];     // tokens 2t and 2t + 1 of each eight, head g
#pragma unroll
    for (int n = 0; n < SIXTEENS; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) p[n][r] = transposed(pack2(s[n][2 * r], HEADS_OF_LANE == 2 ? s[n][2 * r + 1] : 0));
    ring.wait();
    if (is_last) {          // zeros after the last token: whatever lies there must not become a NaN
      if (lacks_new) put_new(fresh.value);
      for (int n = pos / 8; n < num; ++n)
#pragma unroll
        for (int row = lane / PIECES; row < 8; row += 32 / PIECES)
          if (n * 8 + row > pos) sts128(ring.eight(n) + kv_piece(row, lane % PIECES), make_uint4(0, 0, 0, 0));
      __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < SIXTEENS; ++n) {
      const u32 from = ring.eight(min(n * 2 + lane / 16, num - 1));
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        u32 a[4];           // dimensions g and g + 8 of the sixteen, tokens 2t and 2t + 1, and both of the next eight tokens
        ldmatrix_t(a, from + kv_piece(lane & 7, i * 2 + (lane >> 3 & 1)));
        mma16(o[i], a[0], a[1], a[2], a[3], p[n][0], p[n][1]);
      }
    }
    if (is_last) async_fence();
    __syncwarp();
    refill(num, true);
    ring.next_out(num, true);
  }
  // All of the warp's stretches have been taken.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int j = 0; j < HEADS_OF_LANE; ++j)
#pragma unroll
      for (int o = 4; o < 32; o *= 2) l[j] += __shfl_xor_sync(~0u, l[j], o);
  }
  // The attended values, two dimensions of head g: call(eight of dimensions, their 2t-th and next).
  template <class Call>
  __device__ __forceinline__ void result(Call call) const {
    const float first = 1 / l[0], other = HEADS_OF_LANE == 2 ? 1 / l[HEADS_OF_LANE - 1] : 0;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) call(i * 2 + r, transposed(pack2(o[i][2 * r] * first, o[i][2 * r + 1] * other)));
  }
  // What was found of some tokens, in `piece` [HEAD_DIM + 2, GROUP]: by a warp. GLOBAL: for other CTAs.
  template <bool GLOBAL>
  __device__ __forceinline__ void put(float* piece, int lane) {
    auto write = [&](float* to, float v) {
      if (GLOBAL) __stcg(to, v);
      else *to = v;
    };
    each(lane, [&](float& v, int head, int d) { write(piece + d * GROUP + head, v); });
    each_sum(lane, [&](float top, float sum, int head) {
      write(piece + HEAD_DIM * GROUP + head, top);
      write(piece + (HEAD_DIM + 1) * GROUP + head, sum);
    });
  }
  // And of others.
  template <bool GLOBAL>
  __device__ __forceinline__ void add(const float* piece, int lane) {
    auto read = [](const float* from) { return GLOBAL ? __ldcg(from) : *from; };
    float mine[HEADS_OF_LANE], others[HEADS_OF_LANE];
#pragma unroll
    for (int j = 0; j < HEADS_OF_LANE; ++j) {
      const int head = min(lane % 4 * 2 + j, GROUP - 1);
      const float other_top = read(piece + HEAD_DIM * GROUP + head), top = fmaxf(m[j], other_top);
      mine[j] = exp2f(m[j] - top);
      others[j] = exp2f(other_top - top);
      m[j] = top;
      l[j] = l[j] * mine[j] + read(piece + (HEAD_DIM + 1) * GROUP + head) * others[j];
    }
    each(lane, [&](float& v, int head, int d) { v = v * mine[head % 2] + read(piece + d * GROUP + head) * others[head % 2]; });
  }
};
