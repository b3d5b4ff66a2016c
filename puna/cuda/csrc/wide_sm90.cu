// The products of a LLaMA layer for several tokens, each of a sequence of its own, on Hopper (sm_90a), with what follows each:
// rotation and append to the cache, residual, SiLU. Four launches a layer; attention (attend_sm90.cu) is the fifth, resident beside qkv
// and out, which leave room for it.
//
// A CTA has a run of rows of the matrix, the same number as any other or a unit less, and streams them in chunks of 64 columns, the
// tokens' beside them, so that its sums are whole and nobody else's. Where rows are few (out, down) two CTAs, a cluster, have half of
// the columns each of twice as many rows, and each finishes half of the tokens: the other one's sums of those come through distributed
// shared memory.
//
// One warpgroup multiplies: the weights are the first operand of wgmma, in blocks of 64 rows of which some may be nobody's, whatever
// lies behind the tile's; the tokens are the columns. One warp copies: weights before the kernels in front have ended, as many
// stages as there is room for but two. Three more work out the norm's factors meanwhile.
//
// Norms: who finishes the residual h writes round(h gamma SCALE) beside it, the next product's input, and each CTA its sums of the
// squares of h. A norm's factor is the same for all columns, so the next kernel multiplies its sums by it. `enter` does so for
// a residual that no kernel of these has written, with the factor.
//
// Defined by who compiles it: BF16, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, KV_BLOCK, EPS, TOKENS: most there may be (ROWS: the
// same), ATTENTION_BIAS, MLP_BIAS; of each kernel SHARED_<kernel>: bytes of dynamic shared memory, UNIT_<kernel>: rows of a box,
// MOST_<kernel>: units of a tile, CLUSTER_<kernel>: CTAs that share columns, STAGES_<kernel>: of the ring; REGISTERS_BESIDE: most of a
// thread of those beside attention.
constexpr int COMPUTE = 4, HELPERS = 3;             // warps; one more copies
#include "enter.cuh"
#include "wide_finish.cuh"

// A lane's sums of half of the tokens, from eight FIRST on, and where the cluster exchanges them: call(four sums, address).
template <class C, int FIRST, class Call>
__device__ __forceinline__ void exchange(float (&d)[C::HALVES][C::BLOCKS][TOKENS / 2], u32 place, Call call) {
#pragma unroll
  for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
    for (int b = 0; b < C::BLOCKS; ++b)
#pragma unroll
      for (int e = 0; e < C::MINE; ++e) call(d[half][b] + 4 * (FIRST + e), place + ((half * C::BLOCKS + b) * C::MINE + e) * (C::SENDERS * 16));
}

// By COMPUTE warps, of a warpgroup: the products of chunks as they come through the ring, and what follows them.
template <class Room>
struct Products {
  const Room& room;
  const Args& p;
  const int tid, warp, lane;
  Turn<Room::STAGES> turn;
  u32 num_exchanged = 0, num_scaled = 0;      // tiles, norms
  u64 before = 0;           // of the first thread: signals in its first product, of which a part of the first meeting's
  u32 num_met = 0;
  __device__ __forceinline__ Products(const Room& room_, const Args& args)
      : room(room_), p(args), tid(threadIdx.x), warp(tid / 32), lane(tid % 32) {
    room.join();
  }

  template <class C>
  __device__ __forceinline__ void of() {
    const C cut(room.rank);
    const bool is_last = !(p.parts >> C::MODE + 1);
    const bool finishes = C::CLUSTER == 1 || C::MINE < EIGHTS || warp / 2 == room.rank;
    const bool sends = C::CLUSTER == 2 && (C::MINE < EIGHTS || warp / 2 != room.rank);
    Finish<C> finish(p, room.turned, warp, lane, room.rank);
    finish.load_tokens();
    grid_wait();
    if (tid == 0 && !is_last && !num_met) before = signals_before(p.meetings);
    // What the other CTA sent before has been read.
    auto invite = [&]() {
      if (C::CLUSTER == 1 || !finishes || tid % C::SENDERS) return;
      mbar_expect(room.received, C::RECEIVED);
      arrive_remotely(remote(room.invited, room.peer));
    };
    if (cut.first_unit < cut.last_unit) invite();
    for (int unit = cut.first_unit; unit < cut.last_unit; unit += C::MOST) {
      if (finishes) finish.begin(unit, min(unit + C::MOST, cut.last_unit));
      float d[C::HALVES][C::BLOCKS][TOKENS / 2];
      multiply<C>(cut.num_chunks, d);
      if (C::IS_SCALED && unit == cut.first_unit) mbar_wait(room.scaled, num_scaled & 1);
      if constexpr (C::CLUSTER == 2) {
        add_up<C>(d, finishes, sends);
        if (finishes && unit + C::MOST < cut.last_unit) {
          named_barrier(2, C::SENDERS);
          invite();
        }
      }
      auto store = [&](int first) {
#pragma unroll
        for (int b = 0; b < C::BLOCKS; ++b)
#pragma unroll
          for (int e = 0; e < C::MINE; ++e) finish.store(d[0][b] + 4 * (first + e), d[C::HALVES - 1][b] + 4 * (first + e), b, e, room.scales);
      };
      if (C::MINE < EIGHTS && room.rank) store(EIGHTS - C::MINE);
      else if (finishes) store(0);
    }
    // A CTA without a tile signals no sooner than others can.
    if (cut.first_unit == cut.last_unit) mbar_wait(C::IS_SCALED ? room.scaled : room.begun, (C::IS_SCALED ? num_scaled : num_met) & 1);
    num_scaled += C::IS_SCALED;
    finish.finish(room.words, room.rank);
    if (tid == 0) STAMP(C::MODE * 8 + 4);
    if (!is_last) meet();
    if (tid == 0) STAMP(C::MODE * 8 + 5);
  }

  // A tile's sums.
  template <class C>
  __device__ __forceinline__ void multiply(int num_chunks, float (&d)[C::HALVES][C::BLOCKS][TOKENS / 2]) {
    int before = 0;
    auto release = [&]() {
      if (lane == 0) mbar_arrive(room.empty + before * 8);
    };
    for (int chunk = 0; chunk < num_chunks; ++chunk, turn.next()) {
      mbar_wait(room.full + turn.at * 8, turn.parity);
      if (tid == 0 && chunk == 0) STAMP(C::MODE * 8 + 2);
      wgmma_fence();
      const u32 stage = room.data + turn.at * Room::SLOT;
      const u64 x = matrix(stage), w = matrix(stage + C::INPUT, C::ALTERNATES ? 2048 : 1024);
#pragma unroll
      for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
          for (int b = 0; b < C::BLOCKS; ++b)
            wgmma<TOKENS>(d[half][b], w + (half * C::OTHER + b * BLOCK * (C::ALTERNATES ? 2 : 1) * ROW_BYTES) / 16 + 2 * k, x + 2 * k, k ? 1 : chunk);
      wgmma_commit();
      if (chunk) {          // the products before have ended
        wgmma_wait<1>();
        release();
      }
      before = turn.at;
    }
    wgmma_wait<0>();
    release();
    if (tid == 0) STAMP(C::MODE * 8 + 3);
  }
  // The sums of what this CTA finishes, of all columns.
  template <class C>
  __device__ __forceinline__ void add_up(float (&d)[C::HALVES][C::BLOCKS][TOKENS / 2], bool finishes, bool sends) {
    const u32 place = room.sums + (tid % C::SENDERS) * 16, parity = num_exchanged++ & 1;
    auto give = [&](float* v, u32 to) { send(remote(to, room.peer), make_float4(v[0], v[1], v[2], v[3]), remote(room.received, room.peer)); };
    auto take = [&](float* v, u32 from) {
      const uint4 other = lds128(from);
      v[0] += __uint_as_float(other.x);
      v[1] += __uint_as_float(other.y);
      v[2] += __uint_as_float(other.z);
      v[3] += __uint_as_float(other.w);
    };
    if (sends) {
      mbar_wait(room.invited, parity);
      if (C::MINE == EIGHTS || room.rank) exchange<C, 0>(d, place, give);
      else exchange<C, EIGHTS - C::MINE>(d, place, give);
    }
    if (finishes) {
      mbar_wait(room.received, parity);
      if (C::MINE == EIGHTS || !room.rank) exchange<C, 0>(d, place, take);
      else exchange<C, EIGHTS - C::MINE>(d, place, take);
    }
  }
  // This CTA's results are there: so it tells all others, and whoever copies here.
  __device__ __forceinline__ void meet() {
    named_barrier(1, COMPUTE * 32);
    ++num_met;
    if (tid) return;
    signal(p.meetings);
    *room.target = (before / gridDim.x + num_met) * gridDim.x;
    mbar_arrive(room.met);
  }
};

#define KERNEL(name, registers) extern "C" __global__ __cluster_dims__(CLUSTER_##name, 1, 1) __maxnreg__(registers) void name

using OutCut = Cut<OUT, Q_SIZE>;
using GateUpCut = Cut<GATE_UP, HIDDEN>;
using DownCut = Cut<DOWN, FFN>;
using QkvCut = Cut<QKV, HIDDEN>;
using HeadCut = Cut<HEAD, HIDDEN>;
static_assert(OutCut::UNIT == DownCut::UNIT && OutCut::MOST == DownCut::MOST && OutCut::CLUSTER == DownCut::CLUSTER,
              "what a thread has added to the residual behind attention it reads again");

__device__ constexpr int largest(int a, int b) { return a > b ? a : b; }
#define LARGEST(name) largest(largest(OutCut::name, GateUpCut::name), largest(DownCut::name, QkvCut::name))
using LayerRoom = Room<STAGES_layer, LARGEST(STAGE), LARGEST(BEYOND), LARGEST(RECEIVED), SHARED_layer, CLUSTER_layer>;
using HeadRoom = Room<STAGES_head, HeadCut::STAGE, HeadCut::BEYOND, 0, SHARED_head, CLUSTER_head>;

// Products in a row: of OUT, GATE_UP, DOWN and the next layer's QKV any that follow each other.
KERNEL(layer, REGISTERS_BESIDE)(
    const __grid_constant__ TensorMap out_weights, const __grid_constant__ TensorMap gate_up_weights, const __grid_constant__ TensorMap down_weights,
    const __grid_constant__ TensorMap qkv_weights, const __grid_constant__ TensorMap attended, const __grid_constant__ TensorMap next_input,
    const __grid_constant__ TensorMap act, const float* out_bias, const float* gate_up_bias, const float* down_bias, const float* qkv_bias,
    const float* out_gamma, const float* down_gamma, float* h, u16* next, float* sums, u16* y, const float* cos, const float* sin,
    const int* positions, const int* slots, u16* q, u16* keys, u16* values, u64* meetings, int* error, int parts, int is_finished, int num_tokens) {
  Args p{};
  p.parts = parts; p.num_tokens = num_tokens; p.is_finished = is_finished;
  p.bias[OUT] = out_bias; p.bias[GATE_UP] = gate_up_bias; p.bias[DOWN] = down_bias; p.bias[QKV] = qkv_bias;
  p.gamma[OUT] = out_gamma; p.gamma[DOWN] = down_gamma;
  p.h = h; p.next = next; p.sums = sums; p.y = y; p.cos = cos; p.sin = sin; p.positions = positions; p.slots = slots; p.q = q;
  p.keys = keys; p.values = values; p.meetings = meetings; p.error = error;
  const LayerRoom room(shared_memory());
  room.start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < COMPUTE) {
    Products<LayerRoom> products(room, p);
    if (parts & 1 << OUT) products.of<OutCut>();
    if (parts & 1 << GATE_UP) products.of<GateUpCut>();
    if (parts & 1 << DOWN) products.of<DownCut>();
    if (parts & 1 << QKV) products.of<QkvCut>();
    return;                 // no CTA ends before the other has sent what it sends: whoever finishes a tile has received it
  }
  if (warp > COMPUTE) {
    Scales<LayerRoom> scales(room, p);
    if (parts & 1 << GATE_UP) scales.of<GateUpCut>(warp - COMPUTE - 1, lane);
    if (parts & 1 << QKV) scales.of<QkvCut>(warp - COMPUTE - 1, lane);
  } else if (lane == 0) {
    Copies<LayerRoom> copies(room, p);
    if (parts & 1 << OUT) copies.of<OutCut>(out_weights, attended);
    if (parts & 1 << GATE_UP) copies.of<GateUpCut>(gate_up_weights, next_input);
    if (parts & 1 << DOWN) copies.of<DownCut>(down_weights, act);
    if (parts & 1 << QKV) copies.of<QkvCut>(qkv_weights, next_input);
  }
  __syncwarp();
  room.join();
}

KERNEL(head, 255)(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap input, float* logits, float2* best, int* epoch, int num_tokens) {
  Args p{};
  p.parts = 1 << HEAD; p.num_tokens = num_tokens; p.logits = logits; p.best = best; p.epoch = epoch;
  const HeadRoom room(shared_memory());
  room.start();
  if (threadIdx.x < COMPUTE * 32) {
    Products<HeadRoom>(room, p).of<HeadCut>();
    if (blockIdx.x == 0 && threadIdx.x == 0) ++*epoch;      // all kernels that read it in this step have ended
  } else if (threadIdx.x == COMPUTE * 32) {
    Copies<HeadRoom>(room, p).of<HeadCut>(weights, input);
  }
}
