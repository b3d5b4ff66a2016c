// Streaming weights: what a tile is, which part of it a warp has, and the ring through which it comes. Shared memory of a kernel.
#pragma once
#include "sm90.cuh"

// Of one token a product has 16 rows of weights, with the token as one of eight columns; of more it has 8, with the tokens as rows.
constexpr int TILE = ROWS == 1 ? 16 : 8;
constexpr int NW = 8, NT = 32 * NW, CHUNK = 256, UNIT = 32;
constexpr int ROW_BYTES = CHUNK * 2, STAGE = TILE * ROW_BYTES;
constexpr int NBUF = 2 * NW;                        // tiles whose parts may be under way
constexpr int REGISTER_UNITS = 32;                  // of the input's fragments that a warp keeps in registers; more in shared memory
constexpr int GROUP = HEADS / KV_HEADS, Q_SIZE = HEADS * HEAD_DIM, ALL_HEADS = HEADS + 2 * KV_HEADS;
constexpr int TILES_A_HEAD = HEAD_DIM / TILE;
constexpr int PARTIES = 8;                          // that share a task of attention
static_assert(HIDDEN % 256 == 0 && Q_SIZE % 256 == 0 && FFN % 256 == 0, "eight warps share the columns in units of 32");
static_assert(ROWS == 1 || HIDDEN <= 8192, "a norm's weights fit where the parts of tiles will be");
static_assert(GROUP <= 8, "the queries of a KV head are the rows of one product");

enum Mode { QKV, OUT, GATE_UP, DOWN, HEAD };

struct Args {
  const float* bias;        // [N], where the kernel has one
  const u16* x;             // OUT, DOWN: [ROWS, K]
  float* h;                 // the residual [ROWS, HIDDEN]
  const float* gamma;       // QKV, GATE_UP, HEAD: [HIDDEN]
  u16* y;                   // GATE_UP: [ROWS, FFN]
  float* logits;            // HEAD: [ROWS, VOCAB]
  float2* best;             // HEAD: [gridDim.x, ROWS] (value, token)
  int* epoch;               // counts steps; HEAD adds 1
  int num_rows;
  const int* rows;          // HEAD: [ROWS] rows of h
  // QKV only
  u16 *keys, *values;       // of this layer: [N, KV_HEADS, KV_BLOCK, HEAD_DIM]
  const TensorMap *key_map, *value_map;     // of the same as (HEAD_DIM, KV_BLOCK, N KV_HEADS), in boxes of (64, TOKENS, 1), swizzled
  const float *cos, *sin;   // [max_seq_len, HEAD_DIM / 2]
  const int *positions, *slots;     // [ROWS]
  const int* seq_lens;      // [ROWS]; 0: no sequence
  const int* block_table;   // [ROWS, table_stride]
  u16* attended;            // [ROWS, Q_SIZE]
  float* part;              // [ROWS, KV_HEADS, MAX_SPLITS, GROUP, HEAD_DIM + 1]
  uint2* fresh;             // [ROWS, ALL_HEADS, HEAD_DIM / 2]: a number of either half of a head, and a tag
  int* split_count;         // [ROWS, KV_HEADS]; 0 between launches
  int* error;
  int table_stride, layer;
};

// A tile is pairs of rows of weights that one lane finishes; the first row of pair i, and its partner.
template <int MODE>
__device__ __forceinline__ int first_of(int tile, int i) {
  if (MODE == QKV) return tile / TILES_A_HEAD * HEAD_DIM + tile % TILES_A_HEAD * (TILE / 2) + i;
  if (MODE == GATE_UP) return tile * (TILE / 2) + i;
  return tile * TILE + (ROWS == 1 ? i : 2 * i);
}
template <int MODE>
__device__ constexpr int PARTNER = MODE == QKV ? HEAD_DIM / 2 : MODE == GATE_UP ? FFN : ROWS == 1 ? TILE / 2 : 1;
// The same tile as a box of the matrix, whose map has these dimensions from the innermost on, in boxes of (CHUNK, TILE / 2, 2) or
// (CHUNK, TILE, 1): QKV (K, HEAD_DIM / 2, 2 ALL_HEADS), GATE_UP (K, FFN, 2), others (K, Np, 1). A box's rows follow each other.
template <int MODE>
__device__ __forceinline__ void load_tile(u32 dst, const TensorMap& map, int tile, int column, u32 bar, u64 policy) {
  const int y = MODE == QKV ? tile % TILES_A_HEAD * (TILE / 2) : MODE == GATE_UP ? tile * (TILE / 2) : tile * TILE;
  box_load(dst, map, column, y, MODE == QKV ? tile / TILES_A_HEAD * 2 : 0, bar, policy);
}
// With eight rows, where row 2i and row 2i + 1 of the product are pair i: row r of the product in the box.
template <int MODE>
__device__ __forceinline__ int box_row(int r) {
  return MODE == QKV || MODE == GATE_UP ? (r >> 1) + (r & 1) * 4 : r;
}
__device__ constexpr int num_rows_of(int mode) {
  return mode == QKV ? ALL_HEADS * HEAD_DIM : mode == GATE_UP ? 2 * FFN : mode == HEAD ? (VOCAB + TILE - 1) / TILE * TILE : HIDDEN;
}

// A warp's share of the columns: every eighth chunk, so that what the warps request at about the same time lies side by side.
template <int K>
struct Slice {
  static constexpr int ALL = K / CHUNK, MOST = (ALL + NW - 1) / NW;
  static constexpr bool IS_EVEN = ALL % NW == 0;
  static __device__ __forceinline__ int count(int warp) { return (ALL + NW - 1 - warp) / NW; }
  static __device__ __forceinline__ int column(int warp, int c) { return (warp + c * NW) * CHUNK; }
};

// A warp's ring: stages are filled and emptied in the same order.
template <int STAGES>
struct Ring {
  u32 data, full;           // of stage 0
  int in = 0, out = 0;
  u32 parity = 0;
  __device__ __forceinline__ u32 wait() {
    mbar_wait(full + out * 8, parity);
    return data + out * STAGE;
  }
  __device__ __forceinline__ void next_out() {
    if (++out == STAGES) { out = 0; parity ^= 1; }
  }
  __device__ __forceinline__ void next_in() {
    if (++in == STAGES) in = 0;
  }
};

// What a warp requests of the weights: its chunks of the CTA's tiles.
template <int MODE, int K>
struct Weights {
  int warp, num_chunks, left, tile, chunk = 0;
  __device__ __forceinline__ void start(int first_tile, int last_tile, int which) {
    warp = which;
    num_chunks = Slice<K>::count(warp);
    tile = first_tile;
    left = (last_tile - first_tile) * num_chunks;
  }
  template <class R>
  __device__ __forceinline__ void request(const TensorMap& map, R& ring, int lane, u64 policy) {
    if (lane == 0) {
      const u32 bar = ring.full + ring.in * 8;
      mbar_expect(bar, STAGE);
      load_tile<MODE>(ring.data + ring.in * STAGE, map, tile, Slice<K>::column(warp, chunk), bar, policy);
    }
    ring.next_in();
    --left;
    if (++chunk == num_chunks) {
      chunk = 0;
      ++tile;
    }
  }
};

__device__ constexpr int num_stages(int mode) {     // of a warp's ring
  return mode == QKV ? STAGES_qkv : mode == OUT ? STAGES_out : mode == GATE_UP ? STAGES_gate_up : mode == DOWN ? STAGES_down : STAGES_head;
}

// Shared memory of a kernel: rings, [input | parts of tiles] or [attention of the warps], barriers, a few words.
template <int MODE, int K>
struct Shared {
  static constexpr int STAGES = num_stages(MODE), UNITS = Slice<K>::MOST * CHUNK / UNIT;
  static constexpr int IN_SHARED = UNITS > REGISTER_UNITS ? UNITS - REGISTER_UNITS : 0;     // units, of each warp
  static constexpr int RINGS = NW * STAGES * STAGE;
  static constexpr int INPUT = ROWS == 1 ? K * 2 : NW * IN_SHARED * 512;
  static constexpr int PARTS = NBUF * NW * TILE * ROWS * 4;
  static constexpr int MERGE = MODE == QKV ? 2 * PARTIES * GROUP * (HEAD_DIM + 2) * 4 : 0;      // of two teams
  static constexpr int WORK = INPUT + PARTS > MERGE ? INPUT + PARTS : MERGE;
  static constexpr int TOTAL = RINGS + WORK + (NW * STAGES + NBUF) * 8 + (NW * ROWS + 8) * 4;
};

