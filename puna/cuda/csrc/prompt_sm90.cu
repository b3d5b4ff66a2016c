// The products of a LLaMA layer for 65 to 128 tokens, of a prompt or of several, on Hopper (sm_90a), with what follows each: as
// wide_sm90.cu has them for fewer, but with the tokens as the first operand of wgmma, of two warpgroups with 64 each, and the weights'
// rows as the second, so that no rows are nobody's and what is read from shared memory stays below what it gives.
//
// A CTA has whole rows of the matrix, or half of the columns of twice as many, of which it then finishes the tokens of one warpgroup.
//
// Defined by who compiles it: what wide_sm90.cu says.
constexpr int HELPERS = 3;                          // warps
#include "enter.cuh"
#include "wide.cuh"

constexpr int GROUPS = 2, GROUP_TOKENS = 64, GROUP_THREADS = 128;
constexpr int COMPUTE = GROUPS * 4;                 // warps; one copies, HELPERS more
static_assert(TOKENS == GROUPS * GROUP_TOKENS, "a warpgroup has the rows of a wgmma");

// Of a CTA's tile, what is peculiar to tokens as the first operand.
template <int MODE, int K>
struct Cut : Units<MODE, K> {
  using U = Units<MODE, K>;
  static constexpr int N = U::HALF;                 // columns of a product, of either half
  static constexpr int FOURS = U::HALVES * N / 8;   // of a lane's sums
  static constexpr int RECEIVED = U::CLUSTER == 2 ? FOURS * 16 * GROUP_THREADS : 0;
  static constexpr int RING = (OF_MODE(SHARED) - RECEIVED - (2 * MAX_STAGES + 4) * 8 - TOKENS * 4) / 1024 * 1024;
  static_assert(U::STAGES * U::STAGE <= RING, "shared memory as planned");
};

// What the sums become. Lane (g, t) has of its warp's sixteen tokens the g-th and the (g + 8)-th, and of each eight rows 2t and 2t + 1.
template <int MODE, int K>
struct Finish {
  using C = Cut<MODE, K>;
  static constexpr bool ADDS = MODE == OUT || MODE == DOWN;
  const Args& p;
  const int t, first_token;           // the g-th
  int first, end;           // units of the tile
  int positions[2], slots[2];
  float squares[2] = {};
  __device__ __forceinline__ Finish(const Args& args, int warp, int lane) : p(args), t(lane % 4), first_token(warp * 16 + lane / 4) {}
  __device__ __forceinline__ int token(int r) const { return first_token + r * 8; }
  __device__ __forceinline__ bool has_token(int r) const { return token(r) < p.num_tokens; }
  // Of tokens, which do not change while a step runs.
  __device__ __forceinline__ void load_tokens() {
    if constexpr (MODE == QKV)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        positions[r] = has_token(r) ? __ldg(p.positions + token(r)) : 0;
        slots[r] = has_token(r) ? __ldg(p.slots + token(r)) : 0;
      }
  }
  __device__ __forceinline__ void begin(int first_unit, int last_unit) {
    first = first_unit;
    end = last_unit;
  }
  // Of the n-th eight rows of a half and the r-th token: the lane's sums of two rows of the first half, and of the other.
  __device__ __forceinline__ void store(int n, int r, const float* sums, const float* of_other, const float* scales) {
    const int slot = n * 8 + t * 2, unit = slot / C::SLOT, in_unit = slot % C::SLOT, row = (first + unit) * C::UNIT + in_unit;
    if (first + unit >= end || in_unit >= C::UNIT || row >= C::ROWS_OF_HALF || !has_token(r)) return;
    float v[2] = {sums[0], sums[1]}, w[2] = {of_other[0], of_other[1]};
    if (MODE == QKV || MODE == GATE_UP)
#pragma unroll
      for (int j = 0; j < 2; ++j) v[j] *= scales[token(r)], w[j] *= scales[token(r)];
    if constexpr (MODE == QKV) {
      const int head = row / (HEAD_DIM / 2), d = row % (HEAD_DIM / 2);
      const bool is_value = head >= HEADS + KV_HEADS;
      const size_t at = (size_t)positions[r] * (HEAD_DIM / 2) + d;
      const float2 cos = is_value ? make_float2(1, 1) : ldg_f2(p.cos + at), sin = is_value ? make_float2(0, 0) : ldg_f2(p.sin + at);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (ATTENTION_BIAS) {
          v[j] += __ldg(p.bias + head * HEAD_DIM + d + j);
          w[j] += __ldg(p.bias + head * HEAD_DIM + d + HEAD_DIM / 2 + j);
        }
        const float2 turned = rotated(v[j], w[j], make_float2(j ? cos.y : cos.x, j ? sin.y : sin.x));
        v[j] = head < HEADS ? turned.x : clipped(turned.x);
        w[j] = head < HEADS ? turned.y : clipped(turned.y);
      }
      u16* to = (head < HEADS ? p.q + (size_t)token(r) * Q_SIZE + head * HEAD_DIM : cache_place(p.keys, p.values, head, slots[r])) + d;
      *reinterpret_cast<u32*>(to) = pack2(v[0], v[1]);
      *reinterpret_cast<u32*>(to + HEAD_DIM / 2) = pack2(w[0], w[1]);
    } else if constexpr (ADDS) {
      const size_t at = (size_t)token(r) * HIDDEN + row;
      const float2 before = ldcg_f2(p.h + at), gamma = p.gamma ? ldg_f2(p.gamma + row) : make_float2(0, 0);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (MODE == OUT ? ATTENTION_BIAS : MLP_BIAS) v[j] += __ldg(p.bias + row + j);
        v[j] += j ? before.y : before.x;
        squares[r] += v[j] * v[j];
        w[j] = clipped(v[j] * (j ? gamma.y : gamma.x) * SCALE);
      }
      __stcg(reinterpret_cast<float2*>(p.h + at), make_float2(v[0], v[1]));
      if (p.gamma) *reinterpret_cast<u32*>(p.next + at) = pack2(w[0], w[1]);
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (MLP_BIAS) v[j] += __ldg(p.bias + row + j), w[j] += __ldg(p.bias + FFN + row + j);
        v[j] = fast_silu(v[j]) * w[j];
      }
      *reinterpret_cast<u32*>(p.y + (size_t)token(r) * FFN + row) = pack2(v[0], v[1]);
    }
  }
  // The squares that the CTA has of each token: zeros of those that its partner finishes.
  __device__ __forceinline__ void finish() {
    if constexpr (ADDS)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float v = squares[r];
        v += __shfl_xor_sync(~0u, v, 1);
        v += __shfl_xor_sync(~0u, v, 2);
        if (t == 0) p.new_sums[token(r) * gridDim.x + blockIdx.x] = v;
      }
  }
};

template <int MODE, int K>
__device__ __forceinline__ void run(const Args& p, const TensorMap& weights, const TensorMap& input) {
  using C = Cut<MODE, K>;
  constexpr bool SCALED = MODE == QKV || MODE == GATE_UP;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, group = warp / 4;
  const Place<C, COMPUTE> here(shared_memory());
  float* scales = here.behind;                         // [TOKENS]
  here.start();
  if (warp >= COMPUTE) return here.template assist<K, SCALED>(p, weights, input, scales);

  Finish<MODE, K> finish(p, warp, lane);
  finish.load_tokens();
  grid_wait();
  const bool finishes = C::CLUSTER == 1 || group == here.rank;
  Turn<C::STAGES> turn;
  u32 parity = 0;
  if (C::CLUSTER == 2) cluster_wait();      // the other CTA's barriers are there
  for (int unit = here.first_unit; unit < here.last_unit; unit += C::MOST) {
    finish.begin(unit, min(unit + C::MOST, here.last_unit));
    float d[C::HALVES][C::N / 2];
    here.multiply(turn, lane, [&](u32 stage, int chunk) {
      const u64 x = matrix(stage + group * (GROUP_TOKENS * ROW_BYTES)), w = matrix(stage + C::INPUT, C::ALTERNATES ? 2048 : 1024);
#pragma unroll
      for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half) wgmma<C::N>(d[half], x + 2 * k, w + half * C::OTHER / 16 + 2 * k, k ? 1 : chunk);
    });
    if (SCALED) mbar_wait(here.scaled, 0);
    if constexpr (C::CLUSTER == 2) {
      const u32 place = here.sums + tid % GROUP_THREADS * 16;
      if (!finishes) {
        if (unit > here.first_unit) mbar_wait(here.taken, parity ^ 1);
#pragma unroll
        for (int i = 0; i < C::FOURS; ++i) {
          const float* v = d[i / (C::N / 8)] + i % (C::N / 8) * 4;
          send(remote(place + i * (GROUP_THREADS * 16), here.peer), make_float4(v[0], v[1], v[2], v[3]), remote(here.received, here.peer));
        }
      } else {
        mbar_wait(here.received, parity);
#pragma unroll
        for (int i = 0; i < C::FOURS; ++i) {
          float* v = d[i / (C::N / 8)] + i % (C::N / 8) * 4;
          const uint4 other = lds128(place + i * (GROUP_THREADS * 16));
          v[0] += __uint_as_float(other.x);
          v[1] += __uint_as_float(other.y);
          v[2] += __uint_as_float(other.z);
          v[3] += __uint_as_float(other.w);
        }
        if (unit + C::MOST < here.last_unit) {   // what was received has been read
          named_barrier(1, GROUP_THREADS);
          if (tid % GROUP_THREADS == 0) {
            mbar_expect(here.received, C::RECEIVED);     // before the other CTA is told that it may send the next
            arrive_remotely(remote(here.taken, here.peer));
          }
        }
      }
      parity ^= 1;
    }
    if (finishes)
#pragma unroll
      for (int n = 0; n < C::N / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) finish.store(n, r, d[0] + 4 * n + 2 * r, d[C::HALVES - 1] + 4 * n + 2 * r, scales);
  }
  finish.finish();
  // No CTA ends before the other has sent what it sends: whoever finishes a tile has received it.
}

constexpr int MOST_REGISTERS = REGISTERS_BESIDE;    // nothing is beside these kernels
#include "wide_kernels.cuh"
