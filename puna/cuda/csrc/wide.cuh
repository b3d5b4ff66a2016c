// How the products of several tokens are cut among CTAs, and what a CTA of them has in shared memory. Defined by who includes it: TOKENS,
// COMPUTE: warps that multiply, HELPERS: warps that work out the norm's factors, and what wide_sm90.cu says.
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

enum Mode { OUT, GATE_UP, DOWN, QKV, HEAD };        // in the order in which a launch has them
#define OF_MODE(name) (MODE == QKV ? name##_qkv : MODE == OUT ? name##_out : MODE == GATE_UP ? name##_gate_up : MODE == DOWN ? name##_down : name##_head)

struct Args {
  int parts;                // the products of the launch: 1 << mode, each
  int num_tokens;
  int is_finished;          // the norm's factor is in the input of the first of them
  const float* bias[HEAD];  // [N], of each that has one
  const float* gamma[DOWN + 1];     // [HIDDEN]: of the norm behind OUT, and behind DOWN, or null
  float* h;                 // the residual [num_tokens, HIDDEN]
  u16* next;                // [num_tokens, HIDDEN]: the input of GATE_UP and QKV
  float* sums;              // [TOKENS, gridDim.x]: of the squares of h
  u16* y;                   // [num_tokens, FFN]: of GATE_UP
  const float *cos, *sin;   // [max_seq_len, HEAD_DIM / 2]
  const int *positions, *slots;     // [num_tokens]
  u16* q;                   // [num_tokens, Q_SIZE]
  u16 *keys, *values;       // of QKV's layer: [N, KV_HEADS, KV_BLOCK, HEAD_DIM]
  u64* meetings;            // counts CTAs that have finished a product which is not the last of its launch
  int* error;
  float* logits;            // HEAD: [num_tokens, VOCAB]
  float2* best;             // HEAD: [gridDim.x, TOKENS] (value, token)
  int* epoch;               // HEAD: counts steps
};

// A unit is a box of UNIT rows, or two, of halves that belong together: of a head, or gate and up. A tile is as many units as a CTA
// multiplies at a time, MOST. CLUSTER CTAs share the columns of a tile.
template <int MODE_, int K_>
struct Cut {
  static constexpr int MODE = MODE_, K = K_;
  static constexpr bool IS_SCALED = MODE == QKV || MODE == GATE_UP;   // by the norm's factors
  static constexpr int HALVES = MODE == QKV || MODE == GATE_UP ? 2 : 1;
  static constexpr int UNIT = OF_MODE(UNIT), PITCH = (UNIT + 7) / 8 * 8, MOST = OF_MODE(MOST), CLUSTER = OF_MODE(CLUSTER);
  static constexpr int ROWS_OF_HALF = MODE == QKV ? ALL_HEADS * HEAD_DIM / 2 : MODE == GATE_UP ? FFN : MODE == HEAD ? VOCAB : HIDDEN;
  static constexpr int UNITS = (ROWS_OF_HALF + UNIT - 1) / UNIT;
  static constexpr int HALF = MOST * PITCH;         // rows of a half of a tile, in shared memory
  static constexpr int BLOCKS = (HALF + BLOCK - 1) / BLOCK;           // of either half
  // In shared memory the halves of a head alternate, eight rows each, as its one box has them; gate and up follow each other.
  static constexpr bool ALTERNATES = MODE == QKV;
  static constexpr int OTHER = (ALTERNATES ? 8 : HALF) * ROW_BYTES;   // from a half to the other
  static constexpr int CHUNKS = K / COLUMNS;
  static constexpr int INPUT = TOKENS * ROW_BYTES, STAGE = INPUT + HALVES * HALF * ROW_BYTES;
  static constexpr int BEYOND = (ALTERNATES ? 2 : 1) * (BLOCKS * BLOCK - HALF) * ROW_BYTES;   // that a block's rows reach behind a stage
  // Of a cluster each CTA finishes half of the tokens; where those are eight, half of the warps' rows.
  static constexpr int MINE = CLUSTER == 2 && EIGHTS > 1 ? EIGHTS / 2 : EIGHTS;
  static constexpr int SENDERS = (CLUSTER == 2 && EIGHTS > 1 ? COMPUTE : COMPUTE / 2) * 32;
  static constexpr int RECEIVED = CLUSTER == 2 ? HALVES * BLOCKS * MINE * SENDERS * 16 : 0;
  static_assert(K % COLUMNS == 0 && UNIT % (MODE == GATE_UP ? 2 : 4) == 0, "whole chunks, and rows that are stored together");
  static_assert(MODE != QKV || HEAD_DIM / 2 % PITCH == 0, "a unit lies in a head");
  // The CTA's units, or those of its cluster, and of the columns its chunks.
  int first_unit, last_unit, first_chunk, num_chunks;
  __device__ __forceinline__ explicit Cut(int rank) {
    const int party = blockIdx.x / CLUSTER, num_parties = gridDim.x / CLUSTER, part = CLUSTER == 2 ? rank : 0;
    first_unit = (int)((long long)UNITS * party / num_parties);
    last_unit = (int)((long long)UNITS * (party + 1) / num_parties);
    first_chunk = CHUNKS * part / CLUSTER;
    num_chunks = CHUNKS * (part + 1) / CLUSTER - first_chunk;
  }
};

#ifdef STAMPS
__device__ __forceinline__ void stamp(const Args& p, int slot) {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  p.meetings[16 + slot * gridDim.x + blockIdx.x] = now;
}
#define STAMP(slot) if (MODE_IS_LAYER) stamp(p, slot)
#else
#define STAMP(slot)
#endif
#define MODE_IS_LAYER (C::MODE != HEAD && (p.parts >> 3))
// A place in the ring.
template <int STAGES>
struct Turn {
  int at = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == STAGES) { at = 0; parity ^= 1; }
  }
};

// A CTA's shared memory, for products of which each stage is at most SLOT_BYTES, ...: ring | sums of the other CTA of a cluster |
// barriers | numbers of warps and tokens.
template <int NUM_STAGES, int SLOT_BYTES, int BEYOND, int RECEIVED, int BYTES, int CLUSTER_CTAS>
struct Room {
  static constexpr int STAGES = NUM_STAGES, SLOT = SLOT_BYTES, CLUSTER = CLUSTER_CTAS;
  static constexpr int BARRIERS = 2 * MAX_STAGES + 8, NUMBERS = COMPUTE * TURNED + (COMPUTE * 2 + 1) * TOKENS;
  static constexpr int RING = (BYTES - RECEIVED - BARRIERS * 8 - NUMBERS * 4) / 1024 * 1024;
  static_assert(STAGES >= 3 && STAGES <= MAX_STAGES && STAGES * SLOT + BEYOND <= RING, "shared memory as planned");
  const int rank, peer;
  const u32 data, sums;
  const u32 full, empty;              // [STAGES]
  const u32 begun;                    // the input of a product is there
  const u32 ready, scaled;            // that of one with a norm is; the norm's factors are
  const u32 met;                      // this CTA has finished a product, and `target` is what the meetings will be when all have
  const u32 received, invited;        // the other CTA's sums are there; this one may send
  u64* const target;
  float* const turned;                // [COMPUTE][TURNED]
  float* const words;                 // [COMPUTE][TOKENS] pairs
  float* const scales;                // [TOKENS]
  __device__ __forceinline__ explicit Room(unsigned char* shared)
      : rank(CLUSTER == 2 ? cluster_rank() : 0), peer(rank ^ 1), data(smem32(shared)), sums(data + RING), full(sums + RECEIVED),
        empty(full + MAX_STAGES * 8), begun(empty + MAX_STAGES * 8), ready(begun + 8), scaled(ready + 8), met(scaled + 8), received(met + 8),
        invited(received + 8), target(reinterpret_cast<u64*>(shared + RING + RECEIVED) + BARRIERS - 1),
        turned(reinterpret_cast<float*>(target + 1)), words(turned + COMPUTE * TURNED), scales(words + COMPUTE * 2 * TOKENS) {}
  __device__ __forceinline__ void start() const {
    const int tid = threadIdx.x;
    if (tid < STAGES) {
      mbar_init(full + tid * 8, 1);
      mbar_init(empty + tid * 8, COMPUTE);
    }
    if (tid == 0) {
      mbar_init(begun, 1);
      mbar_init(ready, 1);
      mbar_init(scaled, HELPERS * 32);
      mbar_init(met, 1);
      mbar_init(received, 1);
      mbar_init(invited, 1);
    }
    mbar_init_fence();
    launch_dependents();
    __syncthreads();
    if (CLUSTER == 2) cluster_arrive();
  }
  // The other CTA's barriers are there.
  __device__ __forceinline__ void join() const {
    if (CLUSTER == 2) cluster_wait();
  }
};

// By one thread: the chunks of a CTA's products through the ring, weights and tokens beside each other. The first weights of a product are
// requested before its input is there, as many stages as there are but the last two, which are requested behind the input: that waits behind
// all copies that are under way.
template <class Room>
struct Copies {
  const Room& room;
  const Args& p;
  const u64 policy = evict_first();   // without which a step is 3 to 7 % slower (H200, 2026-11-27)
  Turn<Room::STAGES> turn{0, 1};      // waits are over at once where nothing was before
  int num_products = 0;
  __device__ __forceinline__ Copies(const Room& room_, const Args& args) : room(room_), p(args) {}

  // Chunks of all tiles in order; the copies of weights and of the input go through them apart.
  struct At {
    int unit, chunk;
  };
  template <class C>
  __device__ __forceinline__ static void next(const C& cut, At& at) {
    if (++at.chunk < cut.num_chunks) return;
    at.chunk = 0;
    at.unit += C::MOST;
  }
  template <class C>
  __device__ __forceinline__ void load_weights(const C& cut, const TensorMap& weights, const At& at, int stage) const {
    const int num = min(C::MOST, cut.last_unit - at.unit), x = (cut.first_chunk + at.chunk) * COLUMNS;
    const u32 bar = room.full + stage * 8, to = room.data + stage * Room::SLOT + C::INPUT;
    mbar_expect(bar, (p.num_tokens + 7) / 8 * 8 * ROW_BYTES + num * C::HALVES * C::UNIT * ROW_BYTES);
#pragma unroll
    for (int u = 0; u < C::MOST; ++u) {
      if (u == num) break;
      const int row = (at.unit + u) * C::UNIT;
      if constexpr (C::ALTERNATES) {
        const u32 there = to + u * C::PITCH * 2 * ROW_BYTES;
        box_load_eights(there, weights, x, row % (HEAD_DIM / 2) / 8, row / (HEAD_DIM / 2), bar, policy);
      } else {
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half) box_load(to + half * C::OTHER + u * C::PITCH * ROW_BYTES, weights, x, row, half, bar, policy);
      }
    }
  }
  template <class C>
  __device__ __forceinline__ void load_input(const C& cut, const TensorMap& input, const At& at, int stage) const {
    box_load_kept(room.data + stage * Room::SLOT, input, (cut.first_chunk + at.chunk) * COLUMNS, 0, 0, room.full + stage * 8);
  }
  // Until all CTAs have finished the product before. (A bound: a signal that does not come is an error, and does not hang.)
  __device__ __forceinline__ void wait_for_all() const {
    constexpr int SPIN = 1 << 22;
    mbar_wait(room.met, num_products - 1 & 1);
    const u64 target = *const_cast<volatile u64*>(room.target);
    for (int polls = 0; signals(p.meetings) < target; ++polls) {
      if (polls == SPIN) atomicOr(p.error, 1);
      if (polls % 1024 == 1023 && __ldcg(p.error)) break;
    }
  }
  template <class C>
  __device__ __forceinline__ void of(const TensorMap& weights, const TensorMap& input) {
    const C cut(room.rank);
    At at{cut.first_unit, 0}, early = at;
    Turn<Room::STAGES> behind = turn;
    int num_early = 0;
    for (; num_early < Room::STAGES - BEHIND && early.unit < cut.last_unit; ++num_early, next(cut, early), turn.next()) {
      mbar_wait(room.empty + turn.at * 8, turn.parity);
      load_weights(cut, weights, early, turn.at);
    }
    STAMP(C::MODE * 8 + 0);
    if (num_products) wait_for_all();
    else grid_wait();
    ++num_products;
    global_async_fence();
    STAMP(C::MODE * 8 + 1);
    mbar_arrive(room.begun);
    if (C::IS_SCALED) mbar_arrive(room.ready);
    for (; num_early; --num_early, next(cut, at), behind.next()) load_input(cut, input, at, behind.at);
    for (; at.unit < cut.last_unit; next(cut, at), turn.next()) {
      mbar_wait(room.empty + turn.at * 8, turn.parity);
      load_weights(cut, weights, at, turn.at);
      load_input(cut, input, at, turn.at);
    }
  }
};

// By HELPERS warps: the norm's factor of each token, from the sums of squares of all CTAs, in a fixed order.
template <class Room>
struct Scales {
  const Room& room;
  const Args& p;
  u32 num = 0;              // norms of this launch
  __device__ __forceinline__ Scales(const Room& room_, const Args& args) : room(room_), p(args) {}

  template <class C>
  __device__ __forceinline__ void of(int helper, int lane) {
    constexpr int EACH = (MAX_CTAS + 31) / 32, AT_ONCE = 4;      // 8 or 16 at once: a step 0.3 to 1.8 % slower (H200, 2026-11-27)
    const bool is_finished = p.is_finished && !(p.parts & (1 << C::MODE) - 1);
    mbar_wait(room.ready, num++ & 1);
    for (int first = helper * AT_ONCE; first < p.num_tokens; first += HELPERS * AT_ONCE) {
      float squares[AT_ONCE][EACH];
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          const int cta = i * 32 + lane;
          squares[t][i] = !is_finished && cta < gridDim.x ? __ldcg(p.sums + (first + t) * gridDim.x + cta) : 0;
        }
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) sum += squares[t][i];
        sum = warp_sum(sum);
        if (lane == 0) room.scales[first + t] = is_finished ? 1 : rsqrtf(sum / C::K + EPS) / SCALE;
      }
    }
    mbar_arrive(room.scaled);
  }
};
