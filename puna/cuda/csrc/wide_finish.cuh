// What the sums of several tokens' products become: rotation and append to the cache, residual and the next product's input, SiLU, logits.
// Defined by who includes it: what wide_sm90.cu says.
#pragma once
#include "best.cuh"
#include "wide.cuh"

// What the sums become. Lane (g, t) has of each block, turned, rows 4t to 4t + 3 of its warp's sixteen, and of each eight tokens the g-th.
template <class C>
struct Finish {
  static constexpr int MODE = C::MODE, MINE = C::MINE;
  static constexpr bool ADDS = MODE == OUT || MODE == DOWN;
  // Loaded before the sums are there, where registers allow.
  static constexpr bool LOADS_ROTATIONS = MODE == QKV && C::BLOCKS * MINE <= 4;
  const Args& p;
  const int warp, g, t, from;         // from: its first eight of the tokens
  float* const turned;                // [8][20], of the warp
  int first, end;           // units of the tile
  int positions[MODE == QKV ? MINE : 1], slots[MODE == QKV ? MINE : 1];
  float4 cos[LOADS_ROTATIONS ? C::BLOCKS : 1][LOADS_ROTATIONS ? MINE : 1], sin[LOADS_ROTATIONS ? C::BLOCKS : 1][LOADS_ROTATIONS ? MINE : 1];
  float4 gamma[ADDS ? C::BLOCKS : 1], residual[ADDS ? C::BLOCKS : 1][ADDS ? MINE : 1];
  float squares[ADDS ? MINE : 1] = {};
  float2 best[MODE == HEAD ? MINE : 1];
  __device__ __forceinline__ Finish(const Args& args, float* turned_, int warp_, int lane, int rank)
      : p(args), warp(warp_), g(lane / 4), t(lane % 4), from(MINE < EIGHTS ? rank * MINE : 0), turned(turned_ + warp_ * TURNED) {
    if (MODE == HEAD)
#pragma unroll
      for (int e = 0; e < MINE; ++e) best[e] = make_float2(-INFINITY_F, 0);
  }
  __device__ __forceinline__ int token(int e) const { return (from + e) * 8 + g; }
  __device__ __forceinline__ bool has_token(int e) const { return token(e) < p.num_tokens; }
  // Of the lane's rows in a block: the first one's in its half, and how many of the four there are.
  struct Four {
    int row, num;
  };
  __device__ __forceinline__ Four four(int block) const {
    const int place = block * BLOCK + warp * 16 + t * 4, unit = place / C::PITCH, in_unit = place % C::PITCH;
    const int row = (first + unit) * C::UNIT + in_unit;
    const bool there = unit < C::MOST && first + unit < end;
    return {row, there ? min(C::UNIT - in_unit, C::ROWS_OF_HALF - row) : 0};
  }
  // Of tokens, which do not change while a step runs.
  __device__ __forceinline__ void load_tokens() {
    if constexpr (MODE == QKV)
#pragma unroll
      for (int e = 0; e < MINE; ++e) {
        positions[e] = has_token(e) ? __ldg(p.positions + token(e)) : 0;
        slots[e] = has_token(e) ? __ldg(p.slots + token(e)) : 0;
      }
  }
  __device__ __forceinline__ void load_rotation(const Four& rows, int e, float4& c, float4& s) const {
    const bool is_value = rows.num <= 0 || rows.row / (HEAD_DIM / 2) >= HEADS + KV_HEADS;
    const size_t at = (size_t)positions[e] * (HEAD_DIM / 2) + rows.row % (HEAD_DIM / 2);
    c = is_value ? make_float4(1, 1, 1, 1) : ldg_f4(p.cos + at);
    s = is_value ? make_float4(0, 0, 0, 0) : ldg_f4(p.sin + at);
  }
  // Some time before the sums of a tile are there.
  __device__ __forceinline__ void begin(int first_unit, int last_unit) {
    first = first_unit;
    end = last_unit;
#pragma unroll
    for (int b = 0; b < C::BLOCKS; ++b) {
      const Four rows = four(b);
      const float4 none = make_float4(0, 0, 0, 0);
      if constexpr (ADDS) gamma[b] = p.gamma[MODE] && rows.num > 0 ? ldg_f4(p.gamma[MODE] + rows.row) : none;
#pragma unroll
      for (int e = 0; e < MINE; ++e) {
        if constexpr (ADDS) residual[b][e] = has_token(e) && rows.num > 0 ? ldcg_f4(p.h + (size_t)token(e) * HIDDEN + rows.row) : none;
        if constexpr (LOADS_ROTATIONS) load_rotation(rows, e, cos[b][e], sin[b][e]);
      }
    }
  }
  // From a lane's sums of wgmma, those of rows g and g + 8 for tokens 2t and 2t + 1 of eight, to rows 4t to 4t + 3 for token g.
  __device__ __forceinline__ void turn(const float* from_wgmma, float (&v)[4]) const {
    __syncwarp();           // what was there before has been read
#pragma unroll
    for (int j = 0; j < 4; ++j) turned[(t * 2 + j % 2) * 20 + g + j / 2 * 8] = from_wgmma[j];
    __syncwarp();
    const float4 r = *reinterpret_cast<const float4*>(turned + g * 20 + t * 4);
    v[0] = r.x, v[1] = r.y, v[2] = r.z, v[3] = r.w;
  }
  __device__ __forceinline__ static void store_four(u16* to, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2(v[0], v[1]), pack2(v[2], v[3]));
  }
  // Of a block and the e-th eight of the tokens: `a`, `c`: the lane's sums of the first half and of the other.
  __device__ __forceinline__ void store(const float* a, const float* c, int b, int e, const float* scales) {
    const Four rows = four(b);
    float v[4], w[4] = {};
    turn(a, v);
    if (C::HALVES == 2) turn(c, w);
    if (rows.num <= 0 || !has_token(e)) return;
    if (MODE == QKV || MODE == GATE_UP)
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] *= scales[token(e)], w[j] *= scales[token(e)];
    if constexpr (MODE == QKV) {
      const int head = rows.row / (HEAD_DIM / 2), d = rows.row % (HEAD_DIM / 2);
      if (ATTENTION_BIAS)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] += __ldg(p.bias[MODE] + head * HEAD_DIM + d + j);
          w[j] += __ldg(p.bias[MODE] + head * HEAD_DIM + d + HEAD_DIM / 2 + j);
        }
      float4 c4, s4;
      if constexpr (LOADS_ROTATIONS) c4 = cos[b][e], s4 = sin[b][e];
      else load_rotation(rows, e, c4, s4);
      const float cosines[4] = {c4.x, c4.y, c4.z, c4.w}, sines[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 r = rotated(v[j], w[j], make_float2(cosines[j], sines[j]));
        v[j] = head < HEADS ? r.x : clipped(r.x);
        w[j] = head < HEADS ? r.y : clipped(r.y);
      }
      u16* to = (head < HEADS ? p.q + (size_t)token(e) * Q_SIZE + head * HEAD_DIM : cache_place(p.keys, p.values, head, slots[e])) + d;
      store_four(to, v);
      store_four(to + HEAD_DIM / 2, w);
    } else if constexpr (ADDS) {
      const float before[4] = {residual[b][e].x, residual[b][e].y, residual[b][e].z, residual[b][e].w};
      const float by[4] = {gamma[b].x, gamma[b].y, gamma[b].z, gamma[b].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (MODE == OUT ? ATTENTION_BIAS : MLP_BIAS) v[j] += __ldg(p.bias[MODE] + rows.row + j);
        v[j] += before[j];
        squares[e] += v[j] * v[j];
        w[j] = clipped(v[j] * by[j] * SCALE);
      }
      const size_t at = (size_t)token(e) * HIDDEN + rows.row;
      __stcg(reinterpret_cast<float4*>(p.h + at), make_float4(v[0], v[1], v[2], v[3]));
      if (p.gamma[MODE]) store_four(p.next + at, w);
    } else if constexpr (MODE == GATE_UP) {
      u32* to = reinterpret_cast<u32*>(p.y + (size_t)token(e) * FFN + rows.row);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (MLP_BIAS && j < rows.num) v[j] += __ldg(p.bias[MODE] + rows.row + j), w[j] += __ldg(p.bias[MODE] + FFN + rows.row + j);
        v[j] = fast_silu(v[j]) * w[j];
      }
      to[0] = pack2(v[0], v[1]);
      if (rows.num > 2) to[1] = pack2(v[2], v[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= rows.num) break;
        p.logits[(size_t)token(e) * VOCAB + rows.row + j] = v[j];
        if (v[j] > best[e].x) best[e] = make_float2(v[j], __int_as_float(rows.row + j));
      }
    }
  }
  // What the CTA has of each token over all its rows, in a fixed order. `words`: [COMPUTE][TOKENS] of float2 or float.
  __device__ __forceinline__ void finish(float* words, int rank) {
    if constexpr (ADDS || MODE == HEAD) {
      float2* pairs = reinterpret_cast<float2*>(words);
#pragma unroll
      for (int e = 0; e < MINE; ++e) {
        const int at = warp * TOKENS + token(e);
        if constexpr (MODE == HEAD) {
          const float2 v = better_of_lanes(best[e], 1, 4);
          if (t == 0) pairs[at] = v;
        } else {
          float v = squares[e];
          v += __shfl_xor_sync(~0u, v, 1);
          v += __shfl_xor_sync(~0u, v, 2);
          if (t == 0) words[at] = v;
        }
      }
      named_barrier(1, COMPUTE * 32);
      const int token = threadIdx.x;
      if (token >= TOKENS) return;
      const bool is_mine = MINE == EIGHTS || token / 8 / MINE == rank;
      if constexpr (MODE == HEAD) {
        float2 mine = pairs[token];
        for (int w = 1; w < COMPUTE; ++w)
          if (is_better(pairs[w * TOKENS + token], mine)) mine = pairs[w * TOKENS + token];
        p.best[blockIdx.x * TOKENS + token] = mine;
      } else {
        float sum = 0;
        for (int w = 0; is_mine && w < COMPUTE; ++w) sum += words[w * TOKENS + token];
        p.sums[token * gridDim.x + blockIdx.x] = sum;
      }
    }
  }
};
