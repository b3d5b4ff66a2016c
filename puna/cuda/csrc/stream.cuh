// Streaming weights: what a tile is, which part of it a warp has, and the ring through which it comes.
#pragma once
#include "layer.cuh"
#include "ring.cuh"

constexpr int NW = 8, NT = 32 * NW, TILE = 16, CHUNK = 256, UNIT = 32;
constexpr int ROW_BYTES = CHUNK * 2, STAGE = TILE * ROW_BYTES;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int TILES_A_HEAD = HEAD_DIM / TILE;
constexpr int PARTIES = 8;                          // that share a task of attention
static_assert(HIDDEN % 256 == 0 && Q_SIZE % 256 == 0 && FFN % 256 == 0, "eight warps share the columns in units of 32");

enum Mode { QKV, OUT, GATE_UP, DOWN, HEAD };

struct Args {
  const float* bias;        // [N], where the kernel has one
  const u16* x;             // OUT, DOWN: [K]
  float* h;                 // the residual [HIDDEN]
  const float* gamma;       // [HIDDEN], of a kernel that has a norm
  u16* y;                   // GATE_UP: [FFN]
  float* logits;            // HEAD: [VOCAB]
  float2* best;             // HEAD: [gridDim.x] (value, token)
  int* epoch;               // counts steps; HEAD adds 1
  const int* rows;          // HEAD: [1] row of h
  // QKV; what attention needs:
  u16 *keys, *values;       // of this layer: [N, KV_HEADS, KV_BLOCK, HEAD_DIM]
  const TensorMap *key_map, *value_map;     // of the same: see `CacheMaps`; in boxes of TOKENS
  const float *cos, *sin;   // [max_seq_len, HEAD_DIM / 2]
  const int *positions, *slots;     // [1]
  const int* seq_lens;      // [1]; 0: no sequence
  const int* block_table;   // of it
  u16* attended;            // [Q_SIZE]
  float* part;              // [KV_HEADS, MAX_SPLITS, GROUP, HEAD_DIM + 2]
  uint2* fresh;             // [ALL_HEADS, HEAD_DIM / 2]: a number of either half of a head, and a tag
  int* split_count;         // [KV_HEADS]; 0 between launches
  int* error;
  int layer;
};

// A tile is pairs of rows of weights that one lane finishes; the first row of pair i, and its partner.
template <int MODE>
__device__ __forceinline__ int first_of(int tile, int i) {
  if (MODE == QKV) return tile / TILES_A_HEAD * HEAD_DIM + tile % TILES_A_HEAD * (TILE / 2) + i;
  if (MODE == GATE_UP) return tile * (TILE / 2) + i;
  return tile * TILE + i;
}
template <int MODE>
__device__ constexpr int PARTNER = MODE == QKV ? HEAD_DIM / 2 : MODE == GATE_UP ? FFN : TILE / 2;
// The same tile as a box of the matrix, whose map has these dimensions from the innermost on, in boxes of (CHUNK, TILE / 2, 2) or
// (CHUNK, TILE, 1): QKV (K, HEAD_DIM / 2, 2 ALL_HEADS), GATE_UP (K, FFN, 2), others (K, Np, 1). A box's rows follow each other.
template <int MODE>
__device__ __forceinline__ void load_tile(u32 dst, const TensorMap& map, int tile, int column, u32 bar, u64 policy) {
  const int y = MODE == QKV ? tile % TILES_A_HEAD * (TILE / 2) : MODE == GATE_UP ? tile * (TILE / 2) : tile * TILE;
  box_load(dst, map, column, y, MODE == QKV ? tile / TILES_A_HEAD * 2 : 0, bar, policy);
}
__device__ constexpr int num_rows_of(int mode) {
  return mode == QKV ? ALL_HEADS * HEAD_DIM : mode == GATE_UP ? 2 * FFN : mode == HEAD ? (VOCAB + TILE - 1) / TILE * TILE : HIDDEN;
}

// To the cache; what is appended. `head`: behind those of queries, of keys, then of values.
__device__ __forceinline__ float2 append(const Args& p, float2 v, int head, int d, int slot) {
  u16* to = cache_place(p.keys, p.values, head, slot) + d;
  v = make_float2(clipped(v.x), clipped(v.y));
  to[0] = pack1(v.x);
  to[HEAD_DIM / 2] = pack1(v.y);
  return v;
}

// A warp's chunks of a row: every eighth, so that what the warps request at about the same time lies side by side.
template <int K>
struct Slice {
  static constexpr int ALL = K / CHUNK, MOST = (ALL + NW - 1) / NW;
  static constexpr bool IS_EVEN = ALL % NW == 0;
  static __device__ __forceinline__ int count(int warp) { return (ALL + NW - 1 - warp) / NW; }
  static __device__ __forceinline__ int column(int warp, int c) { return (warp + c * NW) * CHUNK; }
};

// What a warp requests of the weights: its chunks of each of the CTA's tiles.
template <int MODE, int K>
struct Weights {
  int column, num_chunks, left, tile, chunk = 0;
  __device__ __forceinline__ void start(int first_tile, int last_tile, int warp) {
    column = Slice<K>::column(warp, 0);
    num_chunks = Slice<K>::count(warp);
    tile = first_tile;
    left = (last_tile - first_tile) * num_chunks;
  }
  template <class R>
  __device__ __forceinline__ void request(const TensorMap& map, R& ring, int lane, u64 policy) {
    if (lane == 0) {
      const u32 bar = ring.full + ring.in * 8;
      mbar_expect(bar, STAGE);
      load_tile<MODE>(ring.data + ring.in * STAGE, map, tile, column + chunk * (NW * CHUNK), bar, policy);
    }
    ring.next_in();
    --left;
    if (++chunk < num_chunks) return;
    chunk = 0;
    ++tile;
  }
};

__device__ constexpr int num_stages(int mode) {     // of a warp's ring
  return mode == QKV ? STAGES_qkv : mode == OUT ? STAGES_out : mode == GATE_UP ? STAGES_gate_up : mode == DOWN ? STAGES_down : STAGES_head;
}
