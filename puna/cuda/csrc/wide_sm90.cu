// The products of a LLaMA layer for up to TOKENS (64) tokens, each of a sequence of its own, on Hopper (sm_90a), with what follows each:
// rotation and append to the cache, residual, SiLU. Four launches a layer; attention (attend_sm90.cu) is the fifth, resident beside qkv
// and out, which leave room for it.
//
// A CTA has a run of rows of the matrix, the same number as any other or a unit less, and streams them in chunks of 64 columns, the
// tokens' beside them (a box for a unit, one for the tokens), so that its sums are whole and nobody else's. Where rows are few (out,
// down) two CTAs, a cluster, have half of the columns each of twice as many rows, and of the sums each finishes half: the other one's
// come through distributed shared memory. The tokens are the rows of wgmma's first operand, the weights' rows the columns of its
// result: those come in eights, so that all CTAs have about as many, which tiles of 64 or 128 rows would not let them.
//
// One warpgroup multiplies. One warp copies: weights before the kernels in front have ended, as many stages as there is room for but
// one. Three more work out the norm's factors meanwhile.
//
// Norms: who finishes the residual h writes round(h gamma SCALE) beside it, the next product's input, and each CTA its sums of the
// squares of h. A norm's factor is the same for all columns, so the next kernel multiplies its sums by it. `enter` does so for
// a residual that no kernel of these has written, with the factor.
//
// Defined by who compiles it: BF16, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, KV_BLOCK, EPS, TOKENS, ATTENTION_BIAS, MLP_BIAS; of
// each kernel SHARED_<kernel>: bytes of dynamic shared memory, UNIT_<kernel>: rows of a box, MOST_<kernel>: units of a tile,
// CLUSTER_<kernel>: CTAs that share columns, REGISTERS_<kernel>: most of a thread.
#include "best.cuh"
#include "cluster.cuh"
#include "enter.cuh"
#include "layer.cuh"
#include "wgmma.cuh"

constexpr int COLUMNS = 64, ROW_BYTES = COLUMNS * 2;
constexpr int COMPUTE = 4, HELPERS = 3, NT = 32 * (COMPUTE + 1 + HELPERS);    // warps
constexpr int MAX_STAGES = 32;
constexpr int MAX_CTAS = 256;                       // puna.cuda_memory.MAX_MULTIPROCESSORS
constexpr int OPERAND = 64 * ROW_BYTES;             // what wgmma reads of the tokens, however many there are
static_assert(TOKENS == 64 && ROWS == TOKENS, "rows of a product of wgmma");

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
  static constexpr bool JOINED = HALVES == 2 && UNIT % 8 == 0;       // both halves are one box
  static constexpr int N = MOST * HALVES * SLOT;    // rows of a tile
  static constexpr int GROUPS = MOST * SLOT / 8;    // eights of either half of them
  static constexpr int MINE = (GROUPS + CLUSTER - 1) / CLUSTER;       // of these, that a CTA finishes
  static constexpr int CHUNKS = K / COLUMNS;
  static constexpr int RECEIVED = CLUSTER == 2 ? MINE * HALVES * COMPUTE * 32 * 16 : 0;
  static constexpr int BARRIERS = 2 * MAX_STAGES + 3;
  static constexpr int RING = (OF_MODE(SHARED) - RECEIVED - BARRIERS * 8 - TOKENS * 4) / 1024 * 1024;
  static_assert(K % COLUMNS == 0 && UNIT % 2 == 0 && N <= 256, "whole chunks, pairs of rows, and what wgmma takes");
  static_assert(MODE != QKV || HEAD_DIM / 2 % SLOT == 0, "a unit lies in a head");
  // A lane's sums of a group, of either half: four.
  static __device__ constexpr int at(int group, int half) {
    return 4 * ((group / (SLOT / 8) * HALVES + half) * (SLOT / 8) + group % (SLOT / 8));
  }
};

// A place in the ring.
struct Turn {
  int at = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int num_stages) {
    if (++at == num_stages) { at = 0; parity ^= 1; }
  }
};

// What the sums become. A lane has of each group two neighbouring columns of two tokens, eight apart: of the first token 0 and 1.
template <int MODE, int K>
struct Finish {
  using C = Cut<MODE, K>;
  const Args& p;
  const int token, lane;    // the lane's first token
  // Loaded before the sums are there, where registers allow.
  static constexpr bool ROTATES = MODE == QKV, ADDS = MODE == OUT || MODE == DOWN, LOADS_ROTATIONS = ROTATES && C::MINE <= 6;
  int positions[2], slots[2];
  float2 cos[LOADS_ROTATIONS ? C::MINE : 1][2], sin[LOADS_ROTATIONS ? C::MINE : 1][2];
  float2 gamma[ADDS ? C::MINE : 1], residual[ADDS ? C::MINE : 1][2];
  float squares[2] = {};
  float2 best[2] = {{-INFINITY_F, 0}, {-INFINITY_F, 0}};
  __device__ __forceinline__ Finish(const Args& args, int warp, int lane_) : p(args), token(warp * 16 + lane_ / 4), lane(lane_) {}
  __device__ __forceinline__ bool has(int i) const { return token + 8 * i < p.num_tokens; }
  // The lane's first column of a group of a tile that begins with unit `first`: its row in the half; and whether it is there.
  __device__ __forceinline__ int row_of(int first, int group) const {
    return (first + group / (C::SLOT / 8)) * C::UNIT + group % (C::SLOT / 8) * 8 + lane % 4 * 2;
  }
  __device__ __forceinline__ bool is_there(int first, int end, int group) const {
    const int in_unit = group % (C::SLOT / 8) * 8 + lane % 4 * 2;
    return first + group / (C::SLOT / 8) < end && (C::UNIT % 8 == 0 || in_unit < C::UNIT) &&
           (C::ROWS_OF_HALF % C::UNIT == 0 || row_of(first, group) < C::ROWS_OF_HALF);
  }
  // Of tokens, which do not change while a step runs.
  __device__ __forceinline__ void load_tokens() {
    if (MODE != QKV) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      positions[i] = has(i) ? __ldg(p.positions + token + 8 * i) : 0;
      slots[i] = has(i) ? __ldg(p.slots + token + 8 * i) : 0;
    }
  }
  __device__ __forceinline__ void load_rotation(int row, int i, float2& c, float2& s) const {
    const bool is_value = row / (HEAD_DIM / 2) >= HEADS + KV_HEADS;
    const size_t at = (size_t)positions[i] * (HEAD_DIM / 2) + row % (HEAD_DIM / 2);
    c = is_value ? make_float2(1, 1) : ldg_f2(p.cos + at);
    s = is_value ? make_float2(0, 0) : ldg_f2(p.sin + at);
  }
  // Some time before the sums of a tile are there. `from`: the CTA's first group.
  __device__ __forceinline__ void load(int first, int end, int from) {
#pragma unroll
    for (int m = 0; m < C::MINE; ++m) {
      const bool there = from + m < C::GROUPS && is_there(first, end, from + m);
      const int row = there ? row_of(first, from + m) : 0;
      if constexpr (ADDS) gamma[m] = p.gamma ? ldg_f2(p.gamma + row) : make_float2(0, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (ADDS) residual[m][i] = there && has(i) ? ldcg_f2(p.h + (size_t)(token + 8 * i) * HIDDEN + row) : make_float2(0, 0);
        if constexpr (LOADS_ROTATIONS) load_rotation(row, i, cos[m][i], sin[m][i]);
      }
    }
  }
  // `a`, `b`: a group's sums of either half; m: which of the CTA's it is.
  __device__ __forceinline__ void store(int first, int group, int m, const float (&a)[4], const float (&b)[4], const float (&scales)[2]) {
    const int row = row_of(first, group);
    if (MODE == QKV) {
      const int head = row / (HEAD_DIM / 2), d = row % (HEAD_DIM / 2);
      const float* bias = p.bias + head * HEAD_DIM + d;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has(i)) continue;
        float2 c, s, v[2];
        if constexpr (LOADS_ROTATIONS) c = cos[m][i], s = sin[m][i];
        else load_rotation(row, i, c, s);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = a[2 * i + j] * scales[i] + (ATTENTION_BIAS ? __ldg(bias + j) : 0);
          const float y = b[2 * i + j] * scales[i] + (ATTENTION_BIAS ? __ldg(bias + HEAD_DIM / 2 + j) : 0);
          v[j] = rotated(x, y, j ? make_float2(c.y, s.y) : make_float2(c.x, s.x));
          if (head >= HEADS) v[j] = make_float2(clipped(v[j].x), clipped(v[j].y));
        }
        u16* to = (head < HEADS ? p.q + (size_t)(token + 8 * i) * Q_SIZE + head * HEAD_DIM : cache_place(p.keys, p.values, head, slots[i])) + d;
        *reinterpret_cast<u32*>(to) = pack2(v[0].x, v[1].x);
        *reinterpret_cast<u32*>(to + HEAD_DIM / 2) = pack2(v[0].y, v[1].y);
      }
    } else if (MODE == OUT || MODE == DOWN) {
      const bool has_bias = MODE == OUT ? ATTENTION_BIAS : MLP_BIAS;
      const float2 bias = has_bias ? make_float2(__ldg(p.bias + row), __ldg(p.bias + row + 1)) : make_float2(0, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has(i)) continue;
        const float2 v = make_float2(a[2 * i] + bias.x + residual[m][i].x, a[2 * i + 1] + bias.y + residual[m][i].y);
        squares[i] += v.x * v.x + v.y * v.y;
        const size_t at = (size_t)(token + 8 * i) * HIDDEN + row;
        __stcg(reinterpret_cast<float2*>(p.h + at), v);
        if (p.gamma) *reinterpret_cast<u32*>(p.next + at) = pack2(clipped(v.x * gamma[m].x * SCALE), clipped(v.y * gamma[m].y * SCALE));
      }
    } else if (MODE == GATE_UP) {
      const float* bias = p.bias + row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has(i)) continue;
        float made[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float gate = a[2 * i + j] * scales[i] + (MLP_BIAS ? __ldg(bias + j) : 0);
          const float up = b[2 * i + j] * scales[i] + (MLP_BIAS ? __ldg(bias + FFN + j) : 0);
          made[j] = fast_silu(gate) * up;
        }
        *reinterpret_cast<u32*>(p.y + (size_t)(token + 8 * i) * FFN + row) = pack2(made[0], made[1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has(i)) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (row + j >= VOCAB) continue;
          const float v = a[2 * i + j];
          p.logits[(size_t)(token + 8 * i) * VOCAB + row + j] = v;
          if (v > best[i].x) best[i] = make_float2(v, __int_as_float(row + j));
        }
      }
    }
  }
  // What the CTA has of each token over all its rows.
  __device__ __forceinline__ void end() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = token + 8 * i;
      if (MODE == HEAD) {
        const float2 v = better_of_lanes(best[i], 1, 4);
        if (lane % 4 == 0) p.best[blockIdx.x * TOKENS + at] = v;
      } else if (MODE == OUT || MODE == DOWN) {
        float v = squares[i];
        v += __shfl_xor_sync(~0u, v, 1);
        v += __shfl_xor_sync(~0u, v, 2);
        if (lane % 4 == 0) p.new_sums[at * gridDim.x + blockIdx.x] = v;
      }
    }
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

template <int MODE, int K>
__device__ __forceinline__ void run(const Args& p, const TensorMap& weights, const TensorMap& input) {
  using C = Cut<MODE, K>;
  constexpr bool SCALED = MODE == QKV || MODE == GATE_UP;
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, rank = C::CLUSTER == 2 ? cluster_rank() : 0, peer = rank ^ 1;
  const int input_bytes = (p.num_tokens + 7) / 8 * 8 * ROW_BYTES, stage_bytes = input_bytes + C::N * ROW_BYTES;
  const int num_stages = min((C::RING - max(stage_bytes, OPERAND)) / stage_bytes + 1, MAX_STAGES);
  const u32 data = smem32(shared), sums = data + C::RING, full = sums + C::RECEIVED, empty = full + MAX_STAGES * 8;
  const u32 scaled = empty + MAX_STAGES * 8, received = scaled + 8, taken = received + 8;
  float* scales = reinterpret_cast<float*>(shared + C::RING + C::RECEIVED + C::BARRIERS * 8);
  // Units and chunks of a CTA, or of a cluster and of a CTA.
  const int party = blockIdx.x / C::CLUSTER, num_parties = gridDim.x / C::CLUSTER;
  const int first_unit = (int)((long long)C::UNITS * party / num_parties), last_unit = (int)((long long)C::UNITS * (party + 1) / num_parties);
  const int first_chunk = C::CHUNKS * rank / C::CLUSTER, last_chunk = C::CHUNKS * (rank + 1) / C::CLUSTER;

  if (tid < num_stages) {
    mbar_init(full + tid * 8, 1);
    mbar_init(empty + tid * 8, COMPUTE);
  }
  if (tid == 0) {
    mbar_init(scaled, HELPERS * 32);
    mbar_init(received, 1);
    mbar_init(taken, COMPUTE);
  }
  mbar_init_fence();
  launch_dependents();
  __syncthreads();
  if (C::CLUSTER == 2) {
    if (tid == 0) mbar_expect(received, (rank ? C::GROUPS - C::MINE : C::MINE) * C::HALVES * COMPUTE * 32 * 16);
    cluster_arrive();
  }

  if (warp == COMPUTE) {
    if (lane == 0) {
      const u64 policy = evict_first();
      // Chunks of all tiles in order; the copies of weights and of the input go through them apart.
      struct At {
        int unit, chunk;
      };
      auto next = [&](At& at) {
        if (++at.chunk == last_chunk) {
          at.chunk = first_chunk;
          at.unit += C::MOST;
        }
      };
      auto load_weights = [&](const At& at, int stage) {
        const int num = min(C::MOST, last_unit - at.unit);
        const u32 bar = full + stage * 8, to = data + stage * stage_bytes + input_bytes;
        mbar_expect(bar, input_bytes + num * C::HALVES * C::UNIT * ROW_BYTES);
#pragma unroll
        for (int u = 0; u < C::MOST; ++u) {
          if (u == num) break;
          const int row = (at.unit + u) * C::UNIT;
#pragma unroll
          for (int half = 0; half < C::HALVES; half += C::JOINED ? 2 : 1) {
            const int y = MODE == QKV ? row % (HEAD_DIM / 2) : row, z = MODE == QKV ? row / (HEAD_DIM / 2) * 2 + half : half;
            box_load(to + (u * C::HALVES + half) * C::SLOT * ROW_BYTES, weights, at.chunk * COLUMNS, y, z, bar, policy);
          }
        }
      };
      auto load_input = [&](const At& at, int stage) {
        box_load_kept(data + stage * stage_bytes, input, at.chunk * COLUMNS, 0, 0, full + stage * 8);
      };
      At at{first_unit, first_chunk}, early = at;
      int num_early = 0;
      // The last stage is requested behind the input, which waits behind all copies that are under way.
      for (; num_early < num_stages - 1 && early.unit < last_unit; ++num_early, next(early)) load_weights(early, num_early);
      grid_wait();
      global_async_fence();
      for (int i = 0; i < num_early; ++i, next(at)) load_input(at, i);
      Turn turn{num_early, 1};
      for (; at.unit < last_unit; next(at), turn.next(num_stages)) {
        mbar_wait(empty + turn.at * 8, turn.parity);        // at once, of what was never used
        load_weights(at, turn.at);
        load_input(at, turn.at);
      }
    }
    __syncwarp();
    if (C::CLUSTER == 2) cluster_wait();
  } else if (warp > COMPUTE) {
    grid_wait();
    if (SCALED) work_out_scales<K>(p, scales, scaled, warp - COMPUTE - 1, lane);
    if (C::CLUSTER == 2) cluster_wait();
  } else {
    Finish<MODE, K> finish(p, warp, lane);
    finish.load_tokens();
    grid_wait();
    float factors[2] = {1, 1};
    bool is_scaled = !SCALED;
    Turn turn;
    u32 parity = 0;
    const int from = rank * C::MINE;
    if (C::CLUSTER == 2) cluster_wait();      // the other CTA's barriers are there
    for (int unit = first_unit; unit < last_unit; unit += C::MOST) {
      const int end = min(unit + C::MOST, last_unit);
      finish.load(unit, end, from);
      float d[C::N / 2];
      int before = 0;
      auto release = [&]() {
        if (lane == 0) mbar_arrive(empty + before * 8);
      };
      for (int chunk = first_chunk; chunk < last_chunk; ++chunk, turn.next(num_stages)) {
        mbar_wait(full + turn.at * 8, turn.parity);
        const u32 stage = data + turn.at * stage_bytes;
        const u64 x = matrix(stage), w = matrix(stage + input_bytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) wgmmas<C::N>(d, x + 2 * k, w + 2 * k, k ? 1 : chunk - first_chunk);
        wgmma_commit();
        if (chunk > first_chunk) {  // the products before have ended
          wgmma_wait<1>();
          release();
        }
        before = turn.at;
      }
      wgmma_wait<0>();
      release();
      if (!is_scaled) {
        mbar_wait(scaled, 0);
        for (int i = 0; i < 2; ++i) factors[i] = finish.has(i) ? scales[finish.token + 8 * i] : 1;
        is_scaled = true;
      }
      auto sums_of = [&](float (&to)[4], int group, int half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) to[j] = d[C::at(group, half) + j];
      };
      if constexpr (C::CLUSTER == 2) {
        // Half of the groups are the other CTA's to finish.
        if (unit > first_unit) mbar_wait(taken, parity ^ 1);
        auto give = [&](int first, int last) {
#pragma unroll
          for (int group = 0; group < C::GROUPS; ++group)
#pragma unroll
            for (int half = 0; half < C::HALVES; ++half) {
              if (group < first || group >= last) continue;
              float v[4];
              sums_of(v, group, half);
              const u32 to = sums + (((group - first) * C::HALVES + half) * COMPUTE * 32 + tid) * 16;
              send(remote(to, peer), make_float4(v[0], v[1], v[2], v[3]), remote(received, peer));
            }
        };
        if (rank == 0) give(C::MINE, C::GROUPS);
        else give(0, C::MINE);
        mbar_wait(received, parity);
        parity ^= 1;
        auto take = [&](int first, int last) {
#pragma unroll
          for (int group = 0; group < C::GROUPS; ++group) {
            if (group < first || group >= last) continue;
            float v[2][4] = {};
#pragma unroll
            for (int half = 0; half < C::HALVES; ++half) {
              sums_of(v[half], group, half);
              const uint4 other = lds128(sums + (((group - first) * C::HALVES + half) * COMPUTE * 32 + tid) * 16);
              v[half][0] += __uint_as_float(other.x);
              v[half][1] += __uint_as_float(other.y);
              v[half][2] += __uint_as_float(other.z);
              v[half][3] += __uint_as_float(other.w);
            }
            if (finish.is_there(unit, end, group)) finish.store(unit, group, group - first, v[0], v[1], factors);
          }
        };
        if (rank == 0) take(0, C::MINE);
        else take(C::MINE, C::GROUPS);
        if (end < last_unit) {      // there is another tile: what was received has been read
          named_barrier(1, COMPUTE * 32);
          if (tid == 0) mbar_expect(received, (rank ? C::GROUPS - C::MINE : C::MINE) * C::HALVES * COMPUTE * 32 * 16);
          named_barrier(1, COMPUTE * 32);
          if (lane == 0) arrive_remotely(remote(taken, peer));
        }
      } else {
#pragma unroll
        for (int group = 0; group < C::GROUPS; ++group) {
          float v[2][4] = {};
#pragma unroll
          for (int half = 0; half < C::HALVES; ++half) sums_of(v[half], group, half);
          if (finish.is_there(unit, end, group)) finish.store(unit, group, group, v[0], v[1], factors);
        }
      }
    }
    finish.end();
    if (MODE == HEAD && blockIdx.x == 0 && tid == 0) ++*p.epoch;      // all kernels that read it in this step have ended
  }
  // No CTA ends before the other has sent what it sends: whoever finishes a tile has received it.
}

#define KERNEL(name) extern "C" __global__ __cluster_dims__(CLUSTER_##name, 1, 1) __maxnreg__(REGISTERS_##name) void name

KERNEL(qkv)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums, int is_finished,
            const float* cos, const float* sin, const int* positions, const int* slots, u16* q, u16* keys, u16* values, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.is_finished = is_finished; p.sums = sums; p.cos = cos; p.sin = sin; p.positions = positions;
  p.slots = slots; p.q = q; p.keys = keys; p.values = values;
  run<QKV, HIDDEN>(p, w, x);
}

KERNEL(out)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h, const float* gamma,
            u16* next, float* new_sums, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums;
  run<OUT, Q_SIZE>(p, w, x);
}

KERNEL(gate_up)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums,
                int is_finished, u16* y, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.is_finished = is_finished; p.sums = sums; p.y = y;
  run<GATE_UP, HIDDEN>(p, w, x);
}

KERNEL(down)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h, const float* gamma,
             u16* next, float* new_sums, int num_tokens) {
  Args p{};
  p.bias = bias; p.num_tokens = num_tokens; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums;
  run<DOWN, FFN>(p, w, x);
}

KERNEL(head)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, float* logits, float2* best, int* epoch, int num_tokens) {
  Args p{};
  p.num_tokens = num_tokens; p.logits = logits; p.best = best; p.epoch = epoch;
  run<HEAD, HIDDEN>(p, w, x);
}
