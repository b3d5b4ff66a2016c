// Keys and values of a stretch of tokens in shared memory, and a warp's softmax over such stretches.
//
// Defined by who compiles it: HEAD_DIM (64, 128).
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
  __device__ __forceinline__ void next_out(int) { ring.next_out(); }
};

// The queries of a KV head as fragments, unit by unit of 32 dimensions: lane (g, t) has of query g the dimensions 16t to 16t + 15 of
// each 64. And the key and value that this step adds, which the cache may not have had yet when they were requested: lane i has
// dimensions 8i to 8i + 7.
struct Queries {
  u32 q[HEAD_DIM / 32][4];
  uint4 key, value;
};

// A warp's softmax over its stretches of a task: for row g (a query head) the largest score, the sum, the weighted values.
struct Softmax {
  static constexpr int UNITS = HEAD_DIM / 32, TILES = HEAD_DIM / 8;
  float o[TILES][2] = {}, m = -INFINITY_F, l = 0;
  template <bool GLOBAL>
  static __device__ __forceinline__ void put_pair(float2* to, float2 v) {
    if (GLOBAL) __stcg(to, v);
    else *to = v;
  }
  template <bool GLOBAL>
  static __device__ __forceinline__ float2 pair_at(const float2* from) { return GLOBAL ? __ldcg(from) : *from; }
  // Keys and then values of a stretch from token `at` on lie in the ring, `num` eights of each; `refill(num)` is called as each have
  // been read.
  template <class R, class Refill>
  __device__ __forceinline__ void take(const Queries& fresh, R& ring, int num, int at, int end, int len, bool has_new, int lane, Refill refill) {
    const int g = lane >> 2, t = lane & 3, pos = len - 1 - at;
    const bool is_last = pos < TOKENS;      // the stretch holds the token that this step adds
    ring.wait();
    if (is_last) {
      if (has_new) sts128(ring.eight(pos / 8) + kv_piece(pos % 8, lane), fresh.key);
      __syncwarp();
    }
    float s[EIGHTS][2] = {};      // tokens 2t and 2t + 1 of each eight; of those that are not there whatever the last has
    u32 of[EIGHTS];
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n) of[n] = ring.eight(min(n, num - 1));
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int n = 0; n < EIGHTS; ++n) {
        const uint4 k = lds128(of[n] + kv_piece(g, u / 2 * 8 + t * 2 + u % 2));
        mma(s[n], fresh.q[u][0], fresh.q[u][1], k.x, k.y);
        mma(s[n], fresh.q[u][2], fresh.q[u][3], k.z, k.w);
      }
    if (is_last) async_fence();
    __syncwarp();
    refill(num);
    ring.next_out(num);
    constexpr float scale = 1.4426950408889634f / (HEAD_DIM == 64 ? 8.f : 11.313708498984761f);  // log2(e) / sqrt(HEAD_DIM)
    float top = m;
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[n][j] = at + n * 8 + 2 * t + j < end ? s[n][j] * scale : -INFINITY_F;
        top = fmaxf(top, s[n][j]);
      }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));     // finite: the first token of a stretch is one of the context
    const float r = exp2f(m - top);
    m = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < EIGHTS; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[n][j] = exp2f(s[n][j] - m);
        sum += s[n][j];
      }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    l = l * r + sum;
#pragma unroll
    for (int d = 0; d < TILES; ++d) { o[d][0] *= r; o[d][1] *= r; }
    ring.wait();
    if (is_last) {          // zeros after the last token: whatever lies there must not become a NaN
      constexpr int PIECES = HEAD_DIM / 8;
      if (has_new) sts128(ring.eight(pos / 8) + kv_piece(pos % 8, lane), fresh.value);
      for (int j = pos + 1 + lane / PIECES; j < num * 8; j += 32 / PIECES)
        sts128(ring.eight(j / 8) + kv_piece(j % 8, lane % PIECES), make_uint4(0, 0, 0, 0));
      __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < EIGHTS; n += 2) {
      const u32 a0 = pack2(s[n][0], s[n][1]), a1 = pack2(s[n + 1][0], s[n + 1][1]), from = ring.eight(min(n + (lane >> 3 & 1), num - 1));
#pragma unroll
      for (int d = 0; d < TILES; d += 2) {
        u32 b[4];           // the eight tokens and the next eight, of eight dimensions and of the next eight
        ldmatrix_t(b, from + kv_piece(lane & 7, d + (lane >> 4)));
        mma(o[d], a0, a1, b[0], b[1]);
        mma(o[d + 1], a0, a1, b[2], b[3]);
      }
    }
    if (is_last) async_fence();
    __syncwarp();
    refill(num);
    ring.next_out(num);
  }
  // What was found of some tokens, at `piece` [group (HEAD_DIM / 2 + 1)]: by a warp, of `group` queries. GLOBAL: for other CTAs.
  template <bool GLOBAL>
  __device__ __forceinline__ void put(float2* piece, int group, int lane) const {
    const int g = lane >> 2, t = lane & 3;
    if (g >= group) return;
#pragma unroll
    for (int d = 0; d < TILES; ++d) put_pair<GLOBAL>(piece + (d * group + g) * 4 + t, make_float2(o[d][0], o[d][1]));
    if (t == 0) put_pair<GLOBAL>(piece + TILES * group * 4 + g, make_float2(m, l));
  }
  // And of others.
  template <bool GLOBAL>
  __device__ __forceinline__ void add(const float2* piece, int group, int lane) {
    const int g = lane >> 2, t = lane & 3;
    if (g >= group) return;
    const float2 of_all = pair_at<GLOBAL>(piece + TILES * group * 4 + g);
    const float top = fmaxf(m, of_all.x), mine = exp2f(m - top), other = exp2f(of_all.x - top);
    m = top;
    l = l * mine + of_all.y * other;
#pragma unroll
    for (int d = 0; d < TILES; ++d) {
      const float2 v = pair_at<GLOBAL>(piece + (d * group + g) * 4 + t);
      o[d][0] = o[d][0] * mine + v.x * other;
      o[d][1] = o[d][1] * mine + v.y * other;
    }
  }
};
