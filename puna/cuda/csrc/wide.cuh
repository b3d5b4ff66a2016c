// The products of a LLaMA layer for several tokens: arguments, how a matrix is cut among CTAs, and how it gets there. What becomes of it is in
// wide_sm90.cu, which defines TOKENS, COMPUTE: warps that multiply, HELPERS: warps that work out the norm's factors, and the others.
#pragma once
#include "cluster.cuh"
#include "layer.cuh"
#include "wgmma.cuh"

constexpr int COLUMNS = 64, ROW_BYTES = COLUMNS * 2;
constexpr int BLOCK = 64;                           // rows of a wgmma
constexpr int EIGHTS = TOKENS / 8;                  // of tokens
constexpr int MAX_STAGES = 32, BEHIND = 2;          // BEHIND: stages that are requested behind the input
constexpr int MAX_CTAS = 256;                       // puna.cuda_memory.MAX_MULTIPROCESSORS
constexpr int TURNED = 8 * 20;                      // numbers, of a warp: eight tokens of sixteen rows each, and four more: no conflicts of banks

enum Mode { QKV, OUT, GATE_UP, DOWN, HEAD };
#define OF_MODE(name) (MODE == QKV ? name##_qkv : MODE == OUT ? name##_out : MODE == GATE_UP ? name##_gate_up : MODE == DOWN ? name##_down : name##_head)

struct Args {
  const float* bias;        // [N], where the kernel has one
  int num_tokens;
  // Of QKV and GATE_UP: the norm's factor is in the input, or to be had from the sums of squares of h, [TOKENS, gridDim.x].
  int is_finished;
  const float* sums;
  // QKV
  const float *cos, *sin;   // [max_seq_len, HEAD_DIM / 2]
  const int *positions, *slots;     // [num_tokens]
  u16* q;                   // [num_tokens, Q_SIZE]
  u16 *keys, *values;       // of this layer: [N, KV_HEADS, KV_BLOCK, HEAD_DIM]
  // OUT, DOWN
  float* h;                 // the residual [num_tokens, HIDDEN]
  const float* gamma;       // [HIDDEN]: of the next norm, or null
  u16* next;                // [num_tokens, HIDDEN], and the sums that go with it
  float* new_sums;
  u16* y;                   // GATE_UP: [num_tokens, FFN]
  float* logits;            // HEAD: [num_tokens, VOCAB]
  float2* best;             // HEAD: [gridDim.x, TOKENS] (value, token)
  int* epoch;               // HEAD: counts steps
};

// How a product is cut. A unit is a box of UNIT rows, or two, of halves that belong together: of a head, or gate and up. A tile is as
// many units as a CTA multiplies at a time.
template <int MODE, int K>
struct Cut {
  static constexpr int HALVES = MODE == QKV || MODE == GATE_UP ? 2 : 1;
  static constexpr int UNIT = OF_MODE(UNIT), SLOT = (UNIT + 7) / 8 * 8, MOST = OF_MODE(MOST), CLUSTER = OF_MODE(CLUSTER);
  static constexpr int ROWS_OF_HALF = MODE == QKV ? ALL_HEADS * HEAD_DIM / 2 : MODE == GATE_UP ? FFN : MODE == HEAD ? VOCAB : HIDDEN;
  static constexpr int UNITS = (ROWS_OF_HALF + UNIT - 1) / UNIT;
  static constexpr int HALF = MOST * SLOT;          // rows of a half of a tile, in shared memory
  // In shared memory the halves of a head alternate, eight rows each, as its one box has them; gate and up follow each other.
  static constexpr bool ALTERNATES = MODE == QKV;
  static constexpr int OTHER = (ALTERNATES ? 8 : HALF) * ROW_BYTES;   // from a half to the other
  static constexpr int CHUNKS = K / COLUMNS;
  static constexpr int INPUT = TOKENS * ROW_BYTES, STAGE = INPUT + HALVES * HALF * ROW_BYTES;
  static constexpr int STAGES = OF_MODE(STAGES);
  static constexpr int BLOCKS = (HALF + BLOCK - 1) / BLOCK;           // of either half
  // Of a cluster each CTA finishes half of the tokens; where those are eight, half of the warps' rows.
  static constexpr int MINE = CLUSTER == 2 && EIGHTS > 1 ? EIGHTS / 2 : EIGHTS;
  static constexpr int SENDERS = (CLUSTER == 2 && EIGHTS > 1 ? COMPUTE : COMPUTE / 2) * 32;
  static constexpr int RECEIVED = CLUSTER == 2 ? HALVES * BLOCKS * MINE * SENDERS * 16 : 0;
  static constexpr int BARRIERS = 2 * MAX_STAGES + 4;
  static constexpr int RING = (OF_MODE(SHARED) - RECEIVED - BARRIERS * 8 - (COMPUTE * TURNED + (COMPUTE * 2 + 1) * TOKENS) * 4) / 1024 * 1024;
  static constexpr int BEYOND = (ALTERNATES ? 2 : 1) * (BLOCKS * BLOCK - HALF) * ROW_BYTES;    // that a block's rows reach behind a stage
  static_assert(K % COLUMNS == 0 && UNIT % (MODE == GATE_UP ? 2 : 4) == 0, "whole chunks, and rows that are stored together");
  static_assert(STAGES >= 3 && STAGES <= MAX_STAGES, "a ring, and its barriers");
  static_assert(STAGES * STAGE + BEYOND <= RING, "shared memory as planned");
  static_assert(MODE != QKV || HEAD_DIM / 2 % SLOT == 0, "a unit lies in a head");
};

// A place in the ring.
template <int STAGES>
struct Turn {
  int at = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == STAGES) { at = 0; parity ^= 1; }
  }
};

// The norm's factor of each token, from the sums of squares of all CTAs, in a fixed order, by HELPERS warps. `done`: a barrier.
template <int K>
__device__ __forceinline__ void work_out_scales(const Args& p, float* scales, u32 done, int helper, int lane) {
  constexpr int EACH = (MAX_CTAS + 31) / 32, AT_ONCE = 4;
  for (int first = helper * AT_ONCE; first < p.num_tokens; first += HELPERS * AT_ONCE) {
    float squares[AT_ONCE][EACH];
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t)
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int cta = i * 32 + lane;
        squares[t][i] = !p.is_finished && cta < gridDim.x ? __ldcg(p.sums + (first + t) * gridDim.x + cta) : 0;
      }
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) sum += squares[t][i];
      sum = warp_sum(sum);
      if (lane == 0) scales[first + t] = p.is_finished ? 1 : rsqrtf(sum / K + EPS) / SCALE;
    }
  }
  mbar_arrive(done);
}

// By one thread: the chunks of a CTA's units through a ring, weights and tokens beside each other. Weights are requested before the kernels
// in front have ended, as many stages as there are but the last two, which are requested behind the input: that waits behind all copies
// that are under way. `first_chunk`, `num_chunks`: of the columns.
template <class C>
__device__ __forceinline__ void copy_chunks(int num_tokens, const TensorMap& weights, const TensorMap& input, u32 data, u32 full, u32 empty,
                                            int first_unit, int last_unit, int first_chunk, int num_chunks) {
  const u64 policy = evict_first();      // without which a step is 3 to 7 % slower (H200, 2026-11-27)
  const int input_bytes = (num_tokens + 7) / 8 * 8 * ROW_BYTES;
  // Chunks of all tiles in order; the copies of weights and of the input go through them apart.
  struct At {
    int unit, chunk;
  };
  auto next = [&](At& at) {
    if (++at.chunk < num_chunks) return;
    at.chunk = 0;
    at.unit += C::MOST;
  };
  auto load_weights = [&](const At& at, int stage) {
    const int num = min(C::MOST, last_unit - at.unit), x = (first_chunk + at.chunk) * COLUMNS;
    const u32 bar = full + stage * 8, to = data + stage * C::STAGE + C::INPUT;
    mbar_expect(bar, input_bytes + num * C::HALVES * C::UNIT * ROW_BYTES);
#pragma unroll
    for (int u = 0; u < C::MOST; ++u) {
      if (u == num) break;
      const int row = (at.unit + u) * C::UNIT;
      if constexpr (C::ALTERNATES) {
        const u32 there = to + u * C::SLOT * 2 * ROW_BYTES;
        box_load_eights(there, weights, x, row % (HEAD_DIM / 2) / 8, row / (HEAD_DIM / 2), bar, policy);
      } else {
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half) box_load(to + half * C::OTHER + u * C::SLOT * ROW_BYTES, weights, x, row, half, bar, policy);
      }
    }
  };
  auto load_input = [&](const At& at, int stage) {
    box_load_kept(data + stage * C::STAGE, input, (first_chunk + at.chunk) * COLUMNS, 0, 0, full + stage * 8);
  };
  At at{first_unit, 0}, early = at;
  int num_early = 0;
  for (; num_early < C::STAGES - BEHIND && early.unit < last_unit; ++num_early, next(early)) load_weights(early, num_early);
  grid_wait();
  global_async_fence();
  for (int i = 0; i < num_early; ++i, next(at)) load_input(at, i);
  Turn<C::STAGES> turn{num_early, 1};
  for (; at.unit < last_unit; next(at), turn.next()) {
    mbar_wait(empty + turn.at * 8, turn.parity);        // at once, of what was never used
    load_weights(at, turn.at);
    load_input(at, turn.at);
  }
}

// A CTA's part of the matrix, and its shared memory: ring | sums of the other CTA of a cluster | barriers | what else the kernel has.
// COMPUTE warps multiply, one copies, HELPERS more work out the norm's factors.
template <class C>
struct Place {
  const int rank, peer;
  int first_unit, last_unit, first_chunk, num_chunks;     // of a CTA, or units of a cluster and chunks of a CTA
  const u32 data, sums, full, empty, scaled, received, taken;
  float* const behind;
  __device__ __forceinline__ explicit Place(unsigned char* shared)
      : rank(C::CLUSTER == 2 ? cluster_rank() : 0), peer(rank ^ 1), data(smem32(shared)), sums(data + C::RING), full(sums + C::RECEIVED),
        empty(full + MAX_STAGES * 8), scaled(empty + MAX_STAGES * 8), received(scaled + 8), taken(received + 8),
        behind(reinterpret_cast<float*>(shared + C::RING + C::RECEIVED + C::BARRIERS * 8)) {
    const int party = blockIdx.x / C::CLUSTER, num_parties = gridDim.x / C::CLUSTER;
    first_unit = (int)((long long)C::UNITS * party / num_parties);
    last_unit = (int)((long long)C::UNITS * (party + 1) / num_parties);
    first_chunk = C::CHUNKS * rank / C::CLUSTER;
    num_chunks = C::CHUNKS * (rank + 1) / C::CLUSTER - first_chunk;
  }
  __device__ __forceinline__ void start() const {
    const int tid = threadIdx.x;
    if (tid < C::STAGES) {
      mbar_init(full + tid * 8, 1);
      mbar_init(empty + tid * 8, COMPUTE);
    }
    if (tid == 0) {
      mbar_init(scaled, HELPERS * 32);
      mbar_init(received, 1);
      mbar_init(taken, 1);
    }
    mbar_init_fence();
    launch_dependents();
    __syncthreads();
    if (C::CLUSTER == 2) {
      if (tid == 0) mbar_expect(received, C::RECEIVED);
      cluster_arrive();
    }
  }
  // A tile's products: call(a stage, chunk) begins those of a chunk.
  template <class Call>
  __device__ __forceinline__ void multiply(Turn<C::STAGES>& turn, int lane, Call call) const {
    int before = 0;
    auto release = [&]() {
      if (lane == 0) mbar_arrive(empty + before * 8);
    };
    for (int chunk = 0; chunk < num_chunks; ++chunk, turn.next()) {
      mbar_wait(full + turn.at * 8, turn.parity);
      wgmma_fence();
      call(data + turn.at * C::STAGE, chunk);
      wgmma_commit();
      if (chunk) {        // the products before have ended
        wgmma_wait<1>();
        release();
      }
      before = turn.at;
    }
    wgmma_wait<0>();
    release();
  }
  // What a warp does that does not multiply. SCALED: sums are to be multiplied by the norm's factors.
  template <int K, bool SCALED>
  __device__ __forceinline__ void assist(const Args& p, const TensorMap& weights, const TensorMap& input, float* scales) const {
    const int warp = threadIdx.x / 32 - COMPUTE, lane = threadIdx.x % 32;
    if (warp == 0) {
      if (lane == 0) copy_chunks<C>(p.num_tokens, weights, input, data, full, empty, first_unit, last_unit, first_chunk, num_chunks);
      __syncwarp();
    } else {
      grid_wait();
      if (SCALED) work_out_scales<K>(p, scales, scaled, warp - 1, lane);
    }
    if (C::CLUSTER == 2) cluster_wait();
  }
};
