// The products of a LLaMA layer for several tokens, of a sequence each or of a prompt, on Hopper (sm_90a), with what follows each:
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
#include "best.cuh"
#include "enter.cuh"
#include "wide.cuh"

// What the sums become. Lane (g, t) has of each block, turned, rows 4t to 4t + 3 of its warp's sixteen, and of each eight tokens the g-th.
template <int MODE, int K>
struct Finish {
  using C = Cut<MODE, K>;
  static constexpr int MINE = C::MINE;
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
    const int slot = block * BLOCK + warp * 16 + t * 4, unit = slot / C::SLOT, in_unit = slot % C::SLOT;
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
      if constexpr (ADDS) gamma[b] = p.gamma && rows.num > 0 ? ldg_f4(p.gamma + rows.row) : none;
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
          v[j] += __ldg(p.bias + head * HEAD_DIM + d + j);
          w[j] += __ldg(p.bias + head * HEAD_DIM + d + HEAD_DIM / 2 + j);
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
        if (MODE == OUT ? ATTENTION_BIAS : MLP_BIAS) v[j] += __ldg(p.bias + rows.row + j);
        v[j] += before[j];
        squares[e] += v[j] * v[j];
        w[j] = clipped(v[j] * by[j] * SCALE);
      }
      const size_t at = (size_t)token(e) * HIDDEN + rows.row;
      __stcg(reinterpret_cast<float4*>(p.h + at), make_float4(v[0], v[1], v[2], v[3]));
      if (p.gamma) store_four(p.next + at, w);
    } else if constexpr (MODE == GATE_UP) {
      u32* to = reinterpret_cast<u32*>(p.y + (size_t)token(e) * FFN + rows.row);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (MLP_BIAS && j < rows.num) v[j] += __ldg(p.bias + rows.row + j), w[j] += __ldg(p.bias + FFN + rows.row + j);
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
        p.new_sums[token * gridDim.x + blockIdx.x] = sum;
      }
    }
  }
};

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

template <int MODE, int K>
__device__ __forceinline__ void run(const Args& p, const TensorMap& weights, const TensorMap& input) {
  using C = Cut<MODE, K>;
  constexpr bool SCALED = MODE == QKV || MODE == GATE_UP;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const Place<C> here(shared_memory());
  float* turned = here.behind;                         // [COMPUTE][TURNED]
  float* words = turned + COMPUTE * TURNED;            // [COMPUTE][TOKENS] pairs
  float* scales = words + COMPUTE * 2 * TOKENS;
  here.start();
  if (warp >= COMPUTE) return here.template assist<K, SCALED>(p, weights, input, scales);

  Finish<MODE, K> finish(p, turned, warp, lane, here.rank);
  finish.load_tokens();
  grid_wait();
  const bool finishes = C::CLUSTER == 1 || C::MINE < EIGHTS || warp / 2 == here.rank, sends = C::CLUSTER == 2 && (C::MINE < EIGHTS || warp / 2 != here.rank);
  Turn<C::STAGES> turn;
  u32 parity = 0;
  if (C::CLUSTER == 2) cluster_wait();      // the other CTA's barriers are there
  for (int unit = here.first_unit; unit < here.last_unit; unit += C::MOST) {
    if (finishes) finish.begin(unit, min(unit + C::MOST, here.last_unit));
    float d[C::HALVES][C::BLOCKS][TOKENS / 2];
    here.multiply(turn, lane, [&](u32 stage, int chunk) {
      const u64 x = matrix(stage), w = matrix(stage + C::INPUT, C::ALTERNATES ? 2048 : 1024);
#pragma unroll
      for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
          for (int b = 0; b < C::BLOCKS; ++b)
            wgmma<TOKENS>(d[half][b], w + (half * C::OTHER + b * BLOCK * (C::ALTERNATES ? 2 : 1) * ROW_BYTES) / 16 + 2 * k, x + 2 * k, k ? 1 : chunk);
    });
    if (SCALED) mbar_wait(here.scaled, 0);
    if constexpr (C::CLUSTER == 2) {
      const u32 place = here.sums + (tid % C::SENDERS) * 16;
      auto give = [&](float* v, u32 to) { send(remote(to, here.peer), make_float4(v[0], v[1], v[2], v[3]), remote(here.received, here.peer)); };
      auto take = [&](float* v, u32 from) {
        const uint4 other = lds128(from);
        v[0] += __uint_as_float(other.x);
        v[1] += __uint_as_float(other.y);
        v[2] += __uint_as_float(other.z);
        v[3] += __uint_as_float(other.w);
      };
      if (sends) {
        if (unit > here.first_unit) mbar_wait(here.taken, parity ^ 1);
        if (C::MINE == EIGHTS || here.rank) exchange<C, 0>(d, place, give);
        else exchange<C, EIGHTS - C::MINE>(d, place, give);
      }
      if (finishes) {
        mbar_wait(here.received, parity);
        if (C::MINE == EIGHTS || !here.rank) exchange<C, 0>(d, place, take);
        else exchange<C, EIGHTS - C::MINE>(d, place, take);
        if (unit + C::MOST < here.last_unit) {   // what was received has been read
          named_barrier(2, C::SENDERS);
          if (tid % C::SENDERS == 0) {
            mbar_expect(here.received, C::RECEIVED);     // before the other CTA is told that it may send the next
            arrive_remotely(remote(here.taken, here.peer));
          }
        }
      }
      parity ^= 1;
    }
    auto store = [&](int first) {
#pragma unroll
      for (int b = 0; b < C::BLOCKS; ++b)
#pragma unroll
        for (int e = 0; e < C::MINE; ++e) finish.store(d[0][b] + 4 * (first + e), d[C::HALVES - 1][b] + 4 * (first + e), b, e, scales);
    };
    if (C::MINE < EIGHTS && here.rank) store(EIGHTS - C::MINE);
    else if (finishes) store(0);
  }
  finish.finish(words, here.rank);
  if (MODE == HEAD && blockIdx.x == 0 && tid == 0) ++*p.epoch;      // all kernels that read it in this step have ended
  // No CTA ends before the other has sent what it sends: whoever finishes a tile has received it.
}

#define KERNEL(name, registers) extern "C" __global__ __cluster_dims__(CLUSTER_##name, 1, 1) __maxnreg__(registers) void name

KERNEL(qkv, REGISTERS_BESIDE)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums, int is_finished,
            const float* cos, const float* sin, const int* positions, const int* slots, u16* q, u16* keys, u16* values, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.is_finished = is_finished; p.sums = sums; p.cos = cos; p.sin = sin; p.positions = positions;
  p.slots = slots; p.q = q; p.keys = keys; p.values = values;
  run<QKV, HIDDEN>(p, w, x);
}

KERNEL(out, REGISTERS_BESIDE)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h, const float* gamma,
            u16* next, float* new_sums, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums;
  run<OUT, Q_SIZE>(p, w, x);
}

KERNEL(gate_up, 255)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums,
                int is_finished, u16* y, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.is_finished = is_finished; p.sums = sums; p.y = y;
  run<GATE_UP, HIDDEN>(p, w, x);
}

KERNEL(down, 255)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h, const float* gamma,
             u16* next, float* new_sums, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums;
  run<DOWN, FFN>(p, w, x);
}

KERNEL(head, 255)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, float* logits, float2* best, int* epoch, int num_tokens) {
  Args p{};
  p.num_tokens = num_tokens; p.logits = logits; p.best = best; p.epoch = epoch;
  run<HEAD, HIDDEN>(p, w, x);
}
