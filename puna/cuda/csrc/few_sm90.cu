// The products of a LLaMA layer for 2 to ROWS (8, 16) tokens, each of a sequence of its own, on Hopper (sm_90a): as decode_sm90.cu,
// with these differences.
//
// Attention is a kernel of its own (attend_sm90.cu), which is resident beside qkv and out: those leave room for it.
//
// Two CTAs, a cluster, share the columns of their tiles, so that what a warp needs of the input is little enough to come fast and
// to stay in registers (what does not fit is in shared memory). Tokens are the columns of mma.m16n8k16, eight at a time. The CTAs
// finish the tiles in turn; the other one's sums come through distributed shared memory. A warp that awaits them goes on with the
// next tiles meanwhile.
//
// Norms: who finishes the residual h writes round(h gamma SCALE) beside it, the next product's input, and each CTA its sums of the
// squares of h. A norm's factor is the same for all columns, so the next kernel multiplies its products by it. `enter` does so for
// a residual that no kernel of these has written, with the factor.
//
// Defined by who compiles it: as for decode_sm90.cu, with ROWS (8, 16), UNITS_<kernel>: of the input, that a warp keeps in
// registers, REGISTERS_<kernel>: most registers of a thread, MOST_TILES: whose sums `down` keeps.
#include "best.cuh"
#include "cluster.cuh"
#include "stream.cuh"

constexpr int BLOCKS = ROWS / 8;                    // of eight tokens
constexpr int NBUF = 32 / ROWS;                     // tiles whose parts may be under way
constexpr int MAX_CTAS = 256;                       // puna.cuda_memory.MAX_MULTIPROCESSORS
constexpr int LAG = 2;                              // tiles that a warp goes on for before it awaits the other CTA's sums
constexpr int SUMS = BLOCKS * 512;                  // bytes of a tile's sums: [BLOCKS][32 lanes] float4
// Of float16's range up to 65,504, so that residuals of a million may still be told.
constexpr float SCALE = BF16 ? 1.f : 1 / 16.f;

// The input of `down` is too much to keep: it is read chunk by chunk, each for MOST_TILES tiles, whose sums are kept instead.
template <int MODE>
__device__ constexpr bool BY_CHUNK = MODE == DOWN;
__device__ constexpr int units_in_registers(int mode) {
  return mode == QKV ? UNITS_qkv : mode == OUT ? UNITS_out : mode == GATE_UP ? UNITS_gate_up : mode == DOWN ? UNITS_down : UNITS_head;
}

// Shared memory of a kernel: rings, input, parts of tiles, sums from the other CTA, barriers, words.
template <int MODE, int K>
struct Shared {
  static constexpr int STAGES = num_stages(MODE), RINGS = NW * STAGES * STAGE;
  static constexpr int UNITS = (BY_CHUNK<MODE> ? 1 : Slice<K>::MOST) * CHUNK / UNIT, IN_REGISTERS = units_in_registers(MODE);
  static constexpr int INPUT = NW * (UNITS - IN_REGISTERS) * SUMS, PARTS = NBUF * NW * SUMS;
  static constexpr int WORK = INPUT + PARTS;
  static constexpr int BARRIERS = NW * STAGES + 2 * NBUF + 2 * NW;
  static constexpr int TOTAL = RINGS + WORK + NW * SUMS + BARRIERS * 8 + (NW * ROWS * 2 + ROWS) * 4;
  static_assert(IN_REGISTERS <= UNITS, "no more than there is");
};

// The input of a product as fragments: lane (g, t) has columns 8t to 8t + 7 of each unit of 32, of token g of each block.
template <int MODE, int K>
struct Fragments {
  static constexpr int UNITS = Shared<MODE, K>::UNITS, IN_REGISTERS = Shared<MODE, K>::IN_REGISTERS;
  u32 f[IN_REGISTERS][BLOCKS][4];
  u32 rest;                 // of the lane, in shared memory
  // From a warp's chunk `from` on.
  __device__ __forceinline__ void load(const Args& p, unsigned char* input, int from, int warp, int lane, int rank) {
    const int g = lane >> 2, t = lane & 3, num_chunks = Slice<K>::count(warp, rank) - from;
    const u16* x = p.x + Slice<K>::column(warp, rank, from) + t * 8;
    rest = smem32(input) + (warp * (UNITS - IN_REGISTERS) * BLOCKS * 32 + lane) * 16;
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) {
        const int c = u / (CHUNK / UNIT), token = n * 8 + g;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < p.num_rows && c < num_chunks) v = ldcg128(x + (size_t)token * K + c * (NW * CHUNK) + u % (CHUNK / UNIT) * UNIT);
        if (u < IN_REGISTERS) {
          f[u][n][0] = v.x;
          f[u][n][1] = v.y;
          f[u][n][2] = v.z;
          f[u][n][3] = v.w;
        } else {
          sts128(rest + ((u - IN_REGISTERS) * BLOCKS + n) * 512, v);
        }
      }
  }
  __device__ __forceinline__ uint4 get(int u, int n) const {
    if (u < IN_REGISTERS) return make_uint4(f[u][n][0], f[u][n][1], f[u][n][2], f[u][n][3]);
    return lds128(rest + ((u - IN_REGISTERS) * BLOCKS + n) * 512);
  }
};

// The norm's factor of each token, from the sums of squares of all CTAs, in a fixed order. Loads are all under way before any is
// needed: input and factors were there 4.5 us after the wait, and 6.1 with one load after the other (8 tokens, H200, 2026-11-26).
template <int K>
struct Scales {
  static constexpr int EACH = (MAX_CTAS + 31) / 32;
  float squares[BLOCKS][EACH];
  __device__ __forceinline__ void load(const Args& p, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int cta = i * 32 + lane;
        squares[n][i] = !p.is_finished && cta < gridDim.x ? __ldcg(p.sums + (n * NW + warp) * gridDim.x + cta) : 0;
      }
  }
  // Ends before a barrier.
  __device__ __forceinline__ void store(const Args& p, float* scales, int warp, int lane) const {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < EACH; ++i) sum += squares[n][i];
      sum = warp_sum(sum);
      if (lane == 0) scales[n * NW + warp] = p.is_finished ? 1 : rsqrtf(sum / K + EPS) / SCALE;
    }
  }
};

// What a tile becomes. Lane (g, t) has the sums of pair g's rows for tokens 2t and 2t + 1 of each block: of the first row x and y,
// of the other z and w. `load` is called some time before they are all there.
template <int MODE>
struct Finish {
  float2 rotation[BLOCKS][2], gamma;
  float4 residual[BLOCKS];
  float squares[BLOCKS][2] = {};
  float2 best[BLOCKS][2];
  int row;
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) best[n][0] = best[n][1] = make_float2(-INFINITY_F, 0);
  }
  __device__ __forceinline__ void load(const Args& p, int tile, int g, int t) {
    row = first_of<MODE>(tile, g);
    const int head = tile / TILES_A_HEAD;
    if (MODE == OUT || MODE == DOWN) gamma = p.gamma ? make_float2(__ldg(p.gamma + row) * SCALE, __ldg(p.gamma + row + PARTNER<MODE>) * SCALE) : make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = n * 8 + t * 2 + j;
        if (token >= p.num_rows) continue;
        if (MODE == OUT || MODE == DOWN) {
          const float* h = p.h + (size_t)token * HIDDEN + row;
          const float a = __ldcg(h), b = __ldcg(h + PARTNER<MODE>);
          if (j == 0) residual[n].x = a, residual[n].z = b;
          else residual[n].y = a, residual[n].w = b;
        }
        if (MODE == QKV) {
          rotation[n][j] = make_float2(1, 0);
          if (head < HEADS + KV_HEADS) {
            const int at = __ldg(p.positions + token) * (HEAD_DIM / 2) + row % HEAD_DIM;
            rotation[n][j] = make_float2(__ldg(p.cos + at), __ldg(p.sin + at));
          }
        }
      }
  }
  __device__ __forceinline__ void store(const Args& p, const float4 (&sums)[BLOCKS], const float* scales, int tile, int t, u32 tag) {
    const int other = row + PARTNER<MODE>;
    const bool has_bias = MODE == QKV || MODE == OUT ? ATTENTION_BIAS : MODE != HEAD && MLP_BIAS;
    const float2 bias = has_bias ? make_float2(__ldg(p.bias + row), __ldg(p.bias + other)) : make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = n * 8 + t * 2 + j;
        if (token >= p.num_rows) continue;
        float a = j ? sums[n].y : sums[n].x, b = j ? sums[n].w : sums[n].z;
        if (MODE == QKV || MODE == GATE_UP) {
          a *= scales[token];
          b *= scales[token];
        }
        a += bias.x;
        b += bias.y;
        if (MODE == QKV) {
          const int head = tile / TILES_A_HEAD, d = row % HEAD_DIM;
          float2 v = rotated(a, b, rotation[n][j]);
          if (head >= HEADS) v = append(p, v, head, d, __ldg(p.slots + token));
          st_tagged(p.fresh + ((size_t)token * ALL_HEADS + head) * (HEAD_DIM / 2) + d, pack2(v.x, v.y), tag);
        } else if (MODE == OUT || MODE == DOWN) {
          a += j ? residual[n].y : residual[n].x;
          b += j ? residual[n].w : residual[n].z;
          squares[n][j] += a * a + b * b;
          const size_t at = (size_t)token * HIDDEN + row;
          __stcg(p.h + at, a);
          __stcg(p.h + at + PARTNER<MODE>, b);
          if (p.gamma) {
            p.next[at] = pack1(clipped(a * gamma.x));
            p.next[at + PARTNER<MODE>] = pack1(clipped(b * gamma.y));
          }
        } else if (MODE == GATE_UP) {
          p.y[(size_t)token * FFN + row] = pack1(silu(a) * b);
        } else {
          float* to = p.logits + (size_t)token * VOCAB;
          float2& mine = best[n][j];
          if (row < VOCAB) to[row] = a;
          if (other < VOCAB) to[other] = b;
          if (row < VOCAB && a > mine.x) mine = make_float2(a, __int_as_float(row));
          if (other < VOCAB && b > mine.x) mine = make_float2(b, __int_as_float(other));
        }
      }
  }
  // What the CTA has of each token over all its rows, in a fixed order. `words`: [NW][ROWS] of float or float2.
  __device__ __forceinline__ void end(const Args& p, float* words, int warp, int lane) {
    const int tid = warp * 32 + lane;
    float2* pairs = reinterpret_cast<float2*>(words);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = warp * ROWS + n * 8 + lane % 4 * 2 + j;
        if (MODE == HEAD) {
          const float2 v = better_of_lanes(best[n][j], 4, 32);
          if (lane < 4) pairs[at] = v;
        } else {
          float v = squares[n][j];
#pragma unroll
          for (int o = 4; o < 32; o <<= 1) v += __shfl_xor_sync(~0u, v, o);
          if (lane < 4) words[at] = v;
        }
      }
    __syncthreads();
    if (tid >= ROWS) return;
    if (MODE == HEAD) {
      float2 mine = pairs[tid];
      for (int w = 1; w < NW; ++w)
        if (is_better(pairs[w * ROWS + tid], mine)) mine = pairs[w * ROWS + tid];
      p.best[blockIdx.x * ROWS + tid] = mine;
    } else {
      float sum = 0;
      for (int w = 0; w < NW; ++w) sum += words[w * ROWS + tid];
      p.new_sums[tid * gridDim.x + blockIdx.x] = sum;
    }
  }
};

template <int MODE, int K>
__device__ __forceinline__ void run(const Args& p, const TensorMap& map) {
  using Layout = Shared<MODE, K>;
  constexpr int STAGES = Layout::STAGES;
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3, rank = cluster_rank(), peer = rank ^ 1;
  unsigned char* input = shared + Layout::RINGS;
  float4* parts = reinterpret_cast<float4*>(input + Layout::INPUT);     // [NBUF][NW][BLOCKS][32]
  const u32 sums = smem32(input + Layout::WORK) + warp * SUMS;          // of the other CTA, for this warp
  u64* bars = reinterpret_cast<u64*>(input + Layout::WORK + NW * SUMS);
  float* words = reinterpret_cast<float*>(bars + Layout::BARRIERS);     // [NW][ROWS] pairs
  float* scales = words + NW * ROWS * 2;
  Ring<STAGES, STAGE> ring{smem32(shared + warp * STAGES * STAGE), smem32(bars + warp * STAGES)};
  const u32 done = smem32(bars + NW * STAGES), emptied = done + NBUF * 8;       // of the buffers of parts
  const u32 received = emptied + (NBUF + warp) * 8, taken = received + NW * 8;  // of sums: by this warp; by the other CTA

  // Consecutive tiles, as many as any other cluster has, or one less.
  constexpr int TILES = num_rows_of(MODE) / TILE;
  const int cluster = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER;
  const int first = (int)((long long)TILES * cluster / num_clusters), last = (int)((long long)TILES * (cluster + 1) / num_clusters);
  const u64 policy = evict_first();
  Weights<MODE, K> weights;
  weights.start(first, last, warp, rank, BY_CHUNK<MODE> ? MOST_TILES : 1);

  if (lane < STAGES) mbar_init(ring.full + lane * 8, 1);
  if (tid < NBUF) {
    mbar_init(done + tid * 8, NT);
    mbar_init(emptied + tid * 8, 32);
  }
  if (lane == 0) {
    mbar_init(received, 1);
    mbar_init(taken, 1);
  }
  mbar_init_fence();
  launch_dependents();
  __syncthreads();
  if (lane == 0) mbar_expect(received, SUMS);
  cluster_arrive();
  // The last stage is requested when the input has come: that waits behind all copies that are under way. (Several tokens: 1 to 2 % of
  // a step faster than to fill the ring at once; H200, 2026-11-26.)
  int num_asked = 0;
  auto ask = [&](int most) {
    for (; num_asked < most && weights.left; ++num_asked) weights.request(map, ring, lane, policy);
  };
  ask(STAGES - 1);
  grid_wait();
  constexpr bool SCALED = MODE == QKV || MODE == GATE_UP;
  Scales<K> norm;
  if (SCALED) norm.load(p, warp, lane);
  Fragments<MODE, K> fragments[BY_CHUNK<MODE> ? 2 : 1];
  fragments[0].load(p, input, 0, warp, lane, rank);     // a warp's fragments are its own
  if (SCALED) norm.store(p, scales, warp, lane);
  ask(STAGES);
  cluster_wait();           // also a barrier of the CTA's threads
  if (SCALED) __syncthreads();

  const u32 tag = MODE == QKV ? ((u32)__ldg(p.epoch) + 1) * 1024 + p.layer : 0;
  Finish<MODE> finish;
  finish.start();
  float4 mine[BLOCKS];      // sums of the tile that this warp is to finish
  int awaited = -1;         // that tile, counted from the first
  bool has_sent = false;
  u32 received_parity = 0, taken_parity = 0;
  auto complete = [&]() {
    mbar_wait(received, received_parity);
    received_parity ^= 1;
    if (lane == 0) mbar_expect(received, SUMS);   // before the other CTA is told that it may send the next
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
      const uint4 v = lds128(sums + (n * 32 + lane) * 16);
      mine[n].x += __uint_as_float(v.x);
      mine[n].y += __uint_as_float(v.y);
      mine[n].z += __uint_as_float(v.z);
      mine[n].w += __uint_as_float(v.w);
    }
    __syncwarp();
    if (lane == 0) arrive_remotely(remote(taken, peer));
    finish.store(p, mine, scales, first + awaited, t, tag);
    awaited = -1;
  };
  // Parts of tile i lie in buffer i % NBUF; warp i / 2 % NW of either CTA adds them up: one CTA's sends them, the other's finishes.
  auto hand_over = [&](int i, const float (&sum)[BLOCKS][4]) {
    if (awaited >= 0 && i >= awaited + LAG) complete();
    const int buffer = i % NBUF;
    float4* part = parts + buffer * (NW * BLOCKS * 32) + lane;
    if (i >= NBUF) mbar_wait(emptied + buffer * 8, (i / NBUF - 1) & 1);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) part[(warp * BLOCKS + n) * 32] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
    mbar_arrive(done + buffer * 8);     // each lane for itself, as in decode_sm90.cu
    if (i / 2 % NW != warp) return;
    const bool is_mine = i % 2 == rank;
    if (is_mine) finish.load(p, first + i, g, t);
    mbar_wait(done + buffer * 8, i / NBUF & 1);
    float4 v[BLOCKS];
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
      v[n] = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < NW; ++j) {
        const float4 a = part[(j * BLOCKS + n) * 32];
        v[n].x += a.x;
        v[n].y += a.y;
        v[n].z += a.z;
        v[n].w += a.w;
      }
    }
    mbar_arrive(emptied + buffer * 8);
    if (is_mine) {
      awaited = i;
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) mine[n] = v[n];
    } else {
      if (has_sent) {
        mbar_wait(taken, taken_parity);
        taken_parity ^= 1;
      }
      has_sent = true;
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) send(remote(sums + (n * 32 + lane) * 16, peer), v[n], remote(received, peer));
    }
  };
  // A chunk of a tile: the products of the odd and of the even columns are summed apart.
  auto multiply = [&](const Fragments<MODE, K>& x, int c, float (&c0)[BLOCKS][4], float (&c1)[BLOCKS][4]) {
    const u32 stage = ring.wait() + g * ROW_BYTES + t * 16;
#pragma unroll
    for (int u = 0; u < CHUNK / UNIT; ++u) {
      const uint4 w = lds128(stage + u * UNIT * 2), v = lds128(stage + 8 * ROW_BYTES + u * UNIT * 2);
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) {
        const uint4 b = x.get(c * (CHUNK / UNIT) + u, n);
        mma16(c0[n], w.x, v.x, w.y, v.y, b.x, b.y);
        mma16(c1[n], w.z, v.z, w.w, v.w, b.z, b.w);
      }
    }
    __syncwarp();
    if (weights.left) weights.request(map, ring, lane, policy);
    ring.next_out();
  };
  auto add = [](float (&to)[BLOCKS][4], const float (&from)[BLOCKS][4]) {
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) to[n][j] += from[n][j];
  };
  if constexpr (BY_CHUNK<MODE>) {
    for (int begin = first; begin < last; begin += MOST_TILES) {
      if (begin > first) fragments[0].load(p, input, 0, warp, lane, rank);
      float held[MOST_TILES][BLOCKS][4] = {};
#pragma unroll 1            // less to fetch of instructions, which are new to the multiprocessor
      for (int c = 0; c < weights.num_chunks; ++c) {
        if (c) fragments[0] = fragments[1];
        fragments[1].load(p, input, c + 1, warp, lane, rank);
#pragma unroll
        for (int i = 0; i < MOST_TILES; ++i) {
          if (begin + i >= last) break;
          multiply(fragments[0], 0, held[i], held[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < MOST_TILES; ++i) {
        if (begin + i >= last) break;
        hand_over(begin - first + i, held[i]);
      }
    }
  } else {
    for (int i = 0; first + i < last; ++i) {
      float c0[BLOCKS][4] = {}, c1[BLOCKS][4] = {};
#pragma unroll
      for (int c = 0; c < Slice<K>::MOST; ++c) {
        if (!Slice<K>::IS_EVEN && c == weights.num_chunks) break;
        multiply(fragments[0], c, c0, c1);
      }
      add(c0, c1);
      hand_over(i, c0);
    }
  }
  if (awaited >= 0) complete();
  if (MODE == OUT || MODE == DOWN || MODE == HEAD) finish.end(p, words, warp, lane);
  if (MODE == HEAD && blockIdx.x == 0 && tid == 0) ++*p.epoch;      // all kernels that read it in this step have ended
  if (has_sent) mbar_wait(taken, taken_parity);     // no CTA ends while the other may tell it that it took its sums
}

#define KERNEL(name, mode, k)                                                                  \
  static_assert(Shared<mode, k>::TOTAL == SHARED_##name, "shared memory as planned");          \
  extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __maxnreg__(REGISTERS_##name) void name

KERNEL(qkv, QKV, HIDDEN)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, const float* sums, int is_finished, const float* cos,
                         const float* sin, const int* positions, const int* slots, u16* keys, u16* values, uint2* fresh, const int* epoch,
                         int num_rows, int layer) {
  Args p{};
  p.bias = bias; p.x = x; p.sums = sums; p.is_finished = is_finished; p.cos = cos; p.sin = sin; p.positions = positions; p.slots = slots;
  p.keys = keys; p.values = values; p.fresh = fresh; p.epoch = const_cast<int*>(epoch); p.num_rows = num_rows; p.layer = layer;
  run<QKV, HIDDEN>(p, w);
}

KERNEL(out, OUT, Q_SIZE)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, float* h, const float* gamma, u16* next,
                         float* new_sums, int num_rows) {
  Args p{};
  p.bias = bias; p.x = x; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums; p.num_rows = num_rows;
  run<OUT, Q_SIZE>(p, w);
}

KERNEL(gate_up, GATE_UP, HIDDEN)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, const float* sums, int is_finished, u16* y,
                                 int num_rows) {
  Args p{};
  p.bias = bias; p.x = x; p.sums = sums; p.is_finished = is_finished; p.y = y; p.num_rows = num_rows;
  run<GATE_UP, HIDDEN>(p, w);
}

KERNEL(down, DOWN, FFN)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, float* h, const float* gamma, u16* next,
                        float* new_sums, int num_rows) {
  Args p{};
  p.bias = bias; p.x = x; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums; p.num_rows = num_rows;
  run<DOWN, FFN>(p, w);
}

KERNEL(head, HEAD, HIDDEN)(const __grid_constant__ TensorMap w, const u16* x, float* logits, float2* best, int* epoch, int num_rows) {
  Args p{};
  p.x = x; p.logits = logits; p.best = best; p.epoch = epoch; p.num_rows = num_rows;
  run<HEAD, HIDDEN>(p, w);
}

// Rows of the residual (`rows`; null: all, in order), normalised: the input of a product.
extern "C" __global__ __launch_bounds__(NT) void enter(const float* h, const float* gamma, const int* rows, u16* next) {
  constexpr int V = (HIDDEN / 4 + NT - 1) / NT;
  float* words = reinterpret_cast<float*>(shared_memory());      // [NW]
  const int tid = threadIdx.x;
  launch_dependents();
  grid_wait();
  const float* from = h + (size_t)(rows ? rows[blockIdx.x] : blockIdx.x) * HIDDEN;
  float4 v[V];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i * NT + tid >= HIDDEN / 4) continue;
    v[i] = ldcg_f4(from + (i * NT + tid) * 4);
    sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
  sum = warp_sum(sum);
  if (tid % 32 == 0) words[tid / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int j = 0; j < NW; ++j) sum += words[j];
  const float r = rsqrtf(sum / HIDDEN + EPS);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i * NT + tid >= HIDDEN / 4) continue;
    const float4 g = ldg_f4(gamma + (i * NT + tid) * 4);
    reinterpret_cast<uint2*>(next)[blockIdx.x * (HIDDEN / 4) + i * NT + tid] =
        make_uint2(pack2(v[i].x * r * g.x, v[i].y * r * g.y), pack2(v[i].z * r * g.z, v[i].w * r * g.w));
  }
}
