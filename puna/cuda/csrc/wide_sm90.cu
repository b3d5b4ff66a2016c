// A decode step of a LLaMA layer on Hopper (sm_90a) for 8 to 64 tokens, in five launches: qkv (projection, RoPE, KV append),
// attention, out (+ residual), gate_up (SiLU), down (+ residual); then head and pick. As in decode_sm90.cu a kernel requests its
// weights before it waits for those before it, and takes more than half of an SM's shared memory.
//
// A product is y[token, row] = x W^T with wgmma: up to 64 rows of weights are the rows, the tokens the columns. Two CTAs, a
// cluster, share the columns of their rows, and in each CTA two warpgroups take turns at the chunks of 64 columns; so the input of
// up to 32 tokens fits into shared memory and is read once. (Of clusters of four only 30 find room on an H200, 2026-11-26.) Other
// warps: a warpgroup finishes and requests the input; four warps request weights, since one alone cannot keep up with the memory. Rows come in strips of sixteen, so that all clusters have about the same number; a tile
// is up to four strips, one for each warp of a computing warpgroup. A warp sends its sums to the CTA of the cluster that finishes
// the strip: there the four parts are added in order. So a sum's order depends on nothing but the sizes.
//
// Of the 16 rows of a strip a lane has rows lane / 4 and lane / 4 + 8: a strip has rows that belong together (dimensions d and
// d + HEAD_DIM / 2 of a head; gate and up) in such places.
//
// Norms: who finishes the residual h writes round(h gamma SCALE) beside it, the next product's input, and each CTA its sum of the
// squares of h. A norm's factor is the same for all columns, so the next kernel multiplies its products by it. `enter` does so for
// a residual that no kernel of these has written (with the factor: the next kernel is told that its input is finished).
//
// Defined by who compiles it: as for decode_sm90.cu, ROWS (8, 16, 32, 64); SHARED_<kernel>: bytes of dynamic shared memory, which
// puna.cuda.wide_plan works out.
#include "attention.cuh"
#include "best.cuh"
#include "wide.cuh"

// Of float16's range up to 65,504, that residuals of a million may still be told.
constexpr float SCALE = BF16 ? 1.f : 1 / 16.f;

struct Product {
  const float* bias;
  const float* sums;        // QKV, GATE_UP: [gridDim.x, ROWS]
  int is_finished;          // the input has its norm's factor
  float *h, *new_sums;      // OUT, DOWN
  const float* gamma;       // OUT, DOWN: of the next norm; null: there is none
  u16* next;                // OUT, DOWN: the input of the next product
  u16* y;                   // GATE_UP
  float* logits;            // HEAD
  float2* best;             // HEAD: [gridDim.x, ROWS]
  const float *cos, *sin;   // QKV, and all that follow
  const int *positions, *slots;
  u16 *keys, *values;
  uint2* fresh;
  int num_rows;
};

constexpr int STRIPS_A_HEAD = HEAD_DIM / STRIP;
__device__ constexpr int num_strips(int mode) {
  return (mode == QKV ? ALL_HEADS * HEAD_DIM : mode == GATE_UP ? 2 * FFN : mode == HEAD ? VOCAB + STRIP - 1 : HIDDEN) / STRIP;
}
// A strip is a box of the matrix, whose map has these dimensions from the innermost on, in boxes of (COLUMNS, 8, 2) or
// (COLUMNS, 16, 1): QKV (K, HEAD_DIM / 2, 2 ALL_HEADS), GATE_UP (K, FFN, 2), others (K, N, 1).

// What the epilogue's warps do with the sums of two rows, a and b, and two tokens. A warp has blocks e, e + 4, ... of those of the
// CTA's first strip of a tile, then the second. (Strip s of a tile is finished by CTA s % 2.)
template <int MODE>
struct Epilogue {
  static constexpr int TURNS = (2 * BLOCKS + 3) / 4;
  const Product& p;
  const int lane, warp, rank;
  float scale[TURNS][2], residual[TURNS][4], gamma[TURNS][2], squares[TURNS][2] = {};
  float2 best[TURNS][2], rotation[TURNS][2];
  int row[TURNS], position[TURNS][2], slot[TURNS][2];

  Args args{};
  __device__ __forceinline__ Epilogue(const Product& p, int lane, int warp, int rank) : p(p), lane(lane), warp(warp), rank(rank) {
    args.keys = p.keys;
    args.values = p.values;
    args.fresh = p.fresh;
  }
  __device__ __forceinline__ int block(int i) const { return warp + 4 * i; }
  __device__ __forceinline__ int token(int i, int j) const { return block(i) % BLOCKS * 8 + lane % 4 * 2 + j; }
  __device__ __forceinline__ int row_b(int row) const {
    return MODE == QKV ? row + HEAD_DIM / 2 : MODE == GATE_UP ? row + FFN : row + 8;
  }
  __device__ __forceinline__ void start(const float* scales) {
#pragma unroll
    for (int i = 0; i < TURNS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = token(i, j);
        best[i][j] = make_float2(-INFINITY_F, 0);
        scale[i][j] = MODE == QKV || MODE == GATE_UP ? scales[t] : 1;
        if (MODE == QKV) {
          position[i][j] = t < p.num_rows ? __ldg(p.positions + t) : 0;
          slot[i][j] = t < p.num_rows ? __ldg(p.slots + t) : 0;
        }
      }
  }
  __device__ __forceinline__ int strip(int i) const { return block(i) / BLOCKS * CLUSTER + rank; }    // of the tile
  // Ahead of the sums of a tile: where they go, and what else they need.
  __device__ __forceinline__ void load(int first_strip, int num_strips) {
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      const int n = first_strip + strip(i), r = lane / 4;
      row[i] = MODE == QKV       ? n / STRIPS_A_HEAD * HEAD_DIM + n % STRIPS_A_HEAD * 8 + r
               : MODE == GATE_UP ? n * 8 + r
                                 : n * STRIP + r;
      if (strip(i) >= num_strips) continue;
      if (MODE == OUT || MODE == DOWN) {
        gamma[i][0] = p.gamma ? __ldg(p.gamma + row[i]) * SCALE : 0;
        gamma[i][1] = p.gamma ? __ldg(p.gamma + row[i] + 8) * SCALE : 0;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = token(i, j);
        if (t >= p.num_rows) continue;
        if (MODE == OUT || MODE == DOWN) {
          residual[i][j] = __ldcg(p.h + (size_t)t * HIDDEN + row[i]);
          residual[i][2 + j] = __ldcg(p.h + (size_t)t * HIDDEN + row[i] + 8);
        }
        if (MODE == QKV) {
          rotation[i][j] = make_float2(1, 0);
          const int at = position[i][j] * (HEAD_DIM / 2) + row[i] % HEAD_DIM;
          if (row[i] < (HEADS + KV_HEADS) * HEAD_DIM) rotation[i][j] = make_float2(__ldg(p.cos + at), __ldg(p.sin + at));
        }
      }
    }
  }
  __device__ __forceinline__ void store(int i, const float (&v)[4]) {
    const bool has_bias = MODE == QKV || MODE == OUT ? ATTENTION_BIAS : MODE != HEAD && MLP_BIAS;
    const int r = row[i];
    const float bias_a = has_bias ? __ldg(p.bias + r) : 0, bias_b = has_bias ? __ldg(p.bias + row_b(r)) : 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = token(i, j);
      if (t >= p.num_rows) continue;
      float a = v[j] * scale[i][j] + bias_a, b = v[2 + j] * scale[i][j] + bias_b;
      if (MODE == QKV) {
        // Attention begins when this kernel has ended: the tag is always the same.
        rotate_and_append(args, a, b, rotation[i][j], r / HEAD_DIM, r % HEAD_DIM, slot[i][j], t, 0);
      } else if (MODE == OUT || MODE == DOWN) {
        const size_t at = (size_t)t * HIDDEN + r;
        a += residual[i][j];
        b += residual[i][2 + j];
        __stcg(p.h + at, a);
        __stcg(p.h + at + 8, b);
        squares[i][j] += a * a + b * b;
        if (p.gamma) {
          p.next[at] = pack1(clipped(a * gamma[i][0]));
          p.next[at + 8] = pack1(clipped(b * gamma[i][1]));
        }
      } else if (MODE == GATE_UP) {
        p.y[(size_t)t * FFN + r] = pack1(silu(a) * b);
      } else {
        float* to = p.logits + (size_t)t * VOCAB;
        if (r < VOCAB) to[r] = a;
        if (r + 8 < VOCAB) to[r + 8] = b;
        if (r < VOCAB && is_better(make_float2(a, __int_as_float(r)), best[i][j])) best[i][j] = make_float2(a, __int_as_float(r));
        if (r + 8 < VOCAB && is_better(make_float2(b, __int_as_float(r + 8)), best[i][j])) best[i][j] = make_float2(b, __int_as_float(r + 8));
      }
    }
  }
  // What the CTA has of each token over all its rows, in a fixed order. `words`: [2 BLOCKS][8] of float or float2.
  __device__ __forceinline__ void finish(float* words, int tid) {
    if (MODE != OUT && MODE != DOWN && MODE != HEAD) return;
    float2* pairs = reinterpret_cast<float2*>(words);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = block(i) * 8 + lane % 4 * 2 + j;
        if (MODE == HEAD) {
          const float2 v = better_of_lanes(best[i][j], 4, 32);
          if (lane < 4 && block(i) < 2 * BLOCKS) pairs[at] = v;
        } else {
          float v = squares[i][j];
#pragma unroll
          for (int o = 4; o < 32; o <<= 1) v += __shfl_xor_sync(~0u, v, o);
          if (lane < 4 && block(i) < 2 * BLOCKS) words[at] = v;
        }
      }
    }
    named_barrier(1, 128);
    if (tid >= ROWS) return;
    if (MODE == HEAD) {
      const float2 a = pairs[tid], b = pairs[ROWS + tid];
      p.best[blockIdx.x * ROWS + tid] = is_better(b, a) ? b : a;
    } else {
      p.new_sums[blockIdx.x * ROWS + tid] = words[tid] + words[ROWS + tid];
    }
  }
};

// The norm's factors, from the sums of squares of all CTAs, in a fixed order. By the epilogue's threads.
template <int K>
__device__ __forceinline__ void load_scales(const Product& p, float* scales, float* words, int tid) {
  constexpr int SHARES = 128 / ROWS;
  float sum = 0;
  if (!p.is_finished) {
#pragma unroll 32
    for (int j = 0; j < MAX_CTAS / SHARES; ++j)
      if (j * SHARES + tid / ROWS < gridDim.x) sum += __ldcg(p.sums + (j * SHARES + tid / ROWS) * ROWS + tid % ROWS);
  }
  words[tid] = sum;
  named_barrier(1, 128);
  if (tid < ROWS) {
    sum = 0;
    for (int j = 0; j < SHARES; ++j) sum += words[j * ROWS + tid];
    scales[tid] = p.is_finished ? 1 : rsqrtf(sum / K + EPS) / SCALE;
  }
  named_barrier(1, 128);
}

// A computing warp: its warpgroup takes every other chunk.
template <int K>
struct Compute {
  using L = Wide<K>;
  u32 bars, w_data, x_data, to, to_bar;     // to: where the owner of the warp's strip has its sums
  Turn<L::STAGES> w;
  Turn<L::X_STAGES> x;
  bool has_sent = false;
  u32 parity = 0;           // of the next time that the owner has room again
  __device__ __forceinline__ Compute(u32 bars, u32 w_data, u32 x_data) : bars(bars), w_data(w_data), x_data(x_data) {}
  __device__ __forceinline__ u32 bar(int i) const { return bars + i * 8; }
  __device__ __forceinline__ void skip(int num_tiles) {
    w.next(num_tiles);
    x.next();
  }
  // T tiles.
  template <int T>
  __device__ __forceinline__ void pass(const Parts& tiles, int num_chunks, int warp, int lane) {
    const int group = warp / 4;
    float d[T][ROWS / 2];
    u32 w_before[T], x_before = 0;
    auto release = [&]() {
      if (lane) return;
#pragma unroll
      for (int t = 0; t < T; ++t) mbar_arrive(w_before[t]);
      if (!L::IS_RESIDENT) mbar_arrive(x_before);
    };
    if (L::IS_RESIDENT) x = {};
    if (group) skip(T);
    for (int c = group; c < num_chunks; c += 2) {
      Turn<L::STAGES> at = w;
      mbar_wait(bar(L::X_FULL + x.at), x.parity);
#pragma unroll
      for (int t = 0; t < T; ++t, at.next()) mbar_wait(bar(L::W_FULL + at.at), at.parity);
      at = w;
      const u64 b = matrix(x_data + x.at * X_STAGE);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < T; ++t, at.next()) {
        const u64 a = matrix(w_data + at.at * W_STAGE);
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) wgmma(d[t], a + 2 * k, b + 2 * k, c - group + k);
      }
      wgmma_commit();
      if (c != group) {     // the products before have ended
        wgmma_wait<1>();
        release();
      }
      at = w;
#pragma unroll
      for (int t = 0; t < T; ++t, at.next()) w_before[t] = bar(L::W_EMPTY + at.at);
      x_before = bar(L::X_EMPTY + x.at);
      skip(T);
      if (c + 1 < num_chunks) skip(T);
    }
    wgmma_wait<0>();
    release();
#pragma unroll
    for (int t = 0; t < T; ++t) {
      if (warp % 4 >= tiles.begin(t + 1) - tiles.begin(t)) continue;
      if (has_sent) {
        mbar_wait_cluster(bar(L::SUMS_EMPTY + warp), parity);
        parity ^= 1;
      }
      has_sent = true;
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) send(to + n * 512, make_float4(d[t][4 * n], d[t][4 * n + 1], d[t][4 * n + 2], d[t][4 * n + 3]), to_bar);
    }
  }
};

template <int MODE, int K>
__device__ __forceinline__ void run(const Product& p, const TensorMap& weights, const TensorMap& input) {
  using L = Wide<K>;
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, rank = cluster_rank();
  const u32 w_data = smem32(shared), x_data = w_data + L::STAGES * W_STAGE, sums = x_data + L::X_STAGES * X_STAGE;
  float* words = reinterpret_cast<float*>(shared + L::STAGES * W_STAGE + L::X_STAGES * X_STAGE + RECEIVED);
  float* scales = words + 256;
  const u32 bars = smem32(scales + ROWS);
  auto bar = [&](int i) { return bars + i * 8; };

  constexpr int ALL_STRIPS = num_strips(MODE);
  const int cluster = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER, first = ALL_STRIPS * cluster / num_clusters;
  const Parts passes(ALL_STRIPS * (cluster + 1) / num_clusters - first, STRIPS * L::TILES);
  const int first_chunk = L::ALL * rank / CLUSTER, num_chunks = L::ALL * (rank + 1) / CLUSTER - first_chunk;

  if (warp == WEIGHTS) {
    for (int i = lane; i < L::NUM_BARRIERS; i += 32)
      mbar_init(bar(i), i < L::X_FULL       ? 4
                        : i < L::X_EMPTY    ? 1
                        : i < L::SUMS_FULL  ? 4
                        : i < L::SUMS_EMPTY ? 1
                                            : (BLOCKS < 4 ? BLOCKS : 4));
    mbar_init_fence();
    __syncwarp();
    if (lane < 2) mbar_expect(bar(L::SUMS_FULL + lane), RECEIVED / 2);
  }
  launch_dependents();
  __syncthreads();
  cluster_arrive();

  if (warp >= WEIGHTS) {
    // A strip of every tile.
    if (lane == 0) {
      const int strip = warp - WEIGHTS;
      const u64 policy = evict_first();
      Turn<L::STAGES> stage;
      bool is_used = false;
      for (int i = 0; i < passes.num; ++i) {
        const int begin = first + passes.begin(i);
        const Parts tiles(first + passes.begin(i + 1) - begin, STRIPS);
        int y[L::TILES], z[L::TILES];
        bool is_there[L::TILES];
#pragma unroll
        for (int t = 0; t < L::TILES; ++t) {
          const int n = begin + tiles.begin(t) + strip;
          is_there[t] = strip < tiles.begin(t + 1) - tiles.begin(t);
          y[t] = MODE == QKV ? n % STRIPS_A_HEAD * 8 : MODE == GATE_UP ? n * 8 : n * STRIP;
          z[t] = MODE == QKV ? n / STRIPS_A_HEAD * 2 : 0;
        }
        for (int c = 0; c < num_chunks; ++c) {
#pragma unroll
          for (int t = 0; t < L::TILES; ++t) {
            if (t >= tiles.num) continue;
            const u32 full = bar(L::W_FULL + stage.at);
            if (is_used) mbar_wait(bar(L::W_EMPTY + stage.at), stage.parity ^ 1);
            if (is_there[t]) {
              mbar_expect(full, STRIP_BYTES);
              box_load(w_data + stage.at * W_STAGE + strip * STRIP_BYTES, weights, (first_chunk + c) * COLUMNS, y[t], z[t], full, policy);
            } else {
              mbar_arrive(full);
            }
            stage.next();
            is_used |= stage.at == 0;
          }
        }
      }
    }
    __syncwarp();
    cluster_wait();
  } else if (warp < EPILOGUE) {
    cluster_wait();
    const int group = warp / 4, strip = warp % 4, source = group * CLUSTER + rank, owner = strip % CLUSTER, place = strip / CLUSTER;
    Compute<K> compute{bars, w_data, x_data};
    compute.to = remote(sums + ((place * SOURCES + source) * BLOCKS * 32 + lane) * 16, owner);
    compute.to_bar = remote(bar(L::SUMS_FULL + place), owner);
    for (int i = 0; i < passes.num; ++i) {
      const Parts tiles(passes.begin(i + 1) - passes.begin(i), STRIPS);
      if (L::TILES == 1 || tiles.num == 1) compute.template pass<1>(tiles, num_chunks, warp, lane);
      else compute.template pass<L::TILES>(tiles, num_chunks, warp, lane);
    }
  } else {
    cluster_wait();
    grid_wait();
    // These warps request the input as well: of a pass, before they finish it.
    Turn<L::X_STAGES> stage;
    bool is_used = false;
    auto request_input = [&]() {
      for (int c = 0; c < num_chunks && lane == 0; ++c) {
        if (c % 4 == warp - EPILOGUE) {
          const u32 full = bar(L::X_FULL + stage.at);
          if (is_used) mbar_wait(bar(L::X_EMPTY + stage.at), stage.parity ^ 1);
          mbar_expect(full, X_STAGE);
          input_load(x_data + stage.at * X_STAGE, input, (first_chunk + c) * COLUMNS, full);
        }
        stage.next();
        is_used |= stage.at == 0;
      }
      __syncwarp();
    };
    global_async_fence();
    if (L::IS_RESIDENT && passes.num) request_input();
    Epilogue<MODE> epilogue(p, lane, warp - EPILOGUE, rank);
    if (MODE == QKV || MODE == GATE_UP) load_scales<K>(p, scales, words, tid - EPILOGUE * 32);
    epilogue.start(scales);
    u32 parity = 0;         // bit j: of the CTA's strip j of a tile
    for (int i = 0; i < passes.num; ++i) {
      const int begin = first + passes.begin(i);
      const Parts tiles(first + passes.begin(i + 1) - begin, STRIPS);
      if (!L::IS_RESIDENT) request_input();
      for (int t = 0; t < tiles.num; ++t) {
        const int from = tiles.begin(t), count = tiles.begin(t + 1) - from;
        epilogue.load(begin + from, count);
#pragma unroll
        for (int j = 0; j < Epilogue<MODE>::TURNS; ++j) {
          const int place = epilogue.block(j) / BLOCKS, n = epilogue.block(j) % BLOCKS, strip = epilogue.strip(j);
          if (strip >= count) continue;
          mbar_wait_cluster(bar(L::SUMS_FULL + place), parity >> place & 1);
          // Before any CTA is told that there is room, the next sums are awaited.
          if (n == 0 && lane == 0) mbar_expect(bar(L::SUMS_FULL + place), RECEIVED / 2);
          float v[4] = {};
#pragma unroll
          for (int r = 0; r < SOURCES; ++r) {
            const uint4 part = lds128(sums + (((place * SOURCES + r) * BLOCKS + n) * 32 + lane) * 16);
            v[0] += __uint_as_float(part.x);
            v[1] += __uint_as_float(part.y);
            v[2] += __uint_as_float(part.z);
            v[3] += __uint_as_float(part.w);
          }
          __syncwarp();
          if (n + 4 >= BLOCKS && lane < SOURCES) arrive_remotely(remote(bar(L::SUMS_EMPTY + lane / CLUSTER * 4 + strip), lane % CLUSTER));
          epilogue.store(j, v);
        }
        for (int j = 0; j < 2; ++j)
          if (j * CLUSTER + rank < count) parity ^= 1 << j;
      }
    }
    epilogue.finish(words, tid - EPILOGUE * 32);
  }
  // No CTA ends while another may write into it.
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}

#define KERNEL(name, mode, k)                                                      \
  static_assert(Wide<k>::TOTAL == SHARED_##name, "shared memory as planned");      \
  extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WIDE_THREADS, 1) void name

KERNEL(qkv, QKV, HIDDEN)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, const float* sums,
                         const float* cos, const float* sin, const int* positions, const int* slots, u16* keys, u16* values, uint2* fresh,
                         int is_finished, int num_rows) {
  Product p{};
  p.bias = bias; p.sums = sums; p.is_finished = is_finished; p.cos = cos; p.sin = sin; p.positions = positions; p.slots = slots;
  p.keys = keys; p.values = values; p.fresh = fresh; p.num_rows = num_rows;
  run<QKV, HIDDEN>(p, w, x);
}

KERNEL(out, OUT, Q_SIZE)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h,
                         const float* gamma, u16* next, float* new_sums, int num_rows) {
  Product p{};
  p.bias = bias; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums; p.num_rows = num_rows;
  run<OUT, Q_SIZE>(p, w, x);
}

KERNEL(gate_up, GATE_UP, HIDDEN)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias,
                                 const float* sums, u16* y, int is_finished, int num_rows) {
  Product p{};
  p.bias = bias; p.sums = sums; p.is_finished = is_finished; p.y = y; p.num_rows = num_rows;
  run<GATE_UP, HIDDEN>(p, w, x);
}

KERNEL(down, DOWN, FFN)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const float* bias, float* h,
                        const float* gamma, u16* next, float* new_sums, int num_rows) {
  Product p{};
  p.bias = bias; p.h = h; p.gamma = gamma; p.next = next; p.new_sums = new_sums; p.num_rows = num_rows;
  run<DOWN, FFN>(p, w, x);
}

KERNEL(head, HEAD, HIDDEN)(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, float* logits, float2* best,
                           int num_rows) {
  Product p{};
  p.logits = logits; p.best = best; p.num_rows = num_rows;
  run<HEAD, HIDDEN>(p, w, x);
}

// Rows of the residual (`rows`; null: all, in order), normalised: the input of a product.
extern "C" __global__ __launch_bounds__(256) void enter(const float* h, const float* gamma, const int* rows, u16* next) {
  constexpr int V = (HIDDEN / 4 + 255) / 256;
  float* words = reinterpret_cast<float*>(shared_memory());
  const int tid = threadIdx.x;
  launch_dependents();
  grid_wait();
  const float* from = h + (size_t)(rows ? rows[blockIdx.x] : blockIdx.x) * HIDDEN;
  float4 v[V];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i * 256 + tid < HIDDEN / 4) {
      v[i] = ldcg_f4(from + (i * 256 + tid) * 4);
      sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
  sum = warp_sum(sum);
  if (tid % 32 == 0) words[tid / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum += words[j];
  const float r = rsqrtf(sum / HIDDEN + EPS);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i * 256 + tid < HIDDEN / 4) {
      const float4 g = ldg_f4(gamma + (i * 256 + tid) * 4);
      reinterpret_cast<uint2*>(next)[blockIdx.x * (HIDDEN / 4) + i * 256 + tid] =
          make_uint2(pack2(v[i].x * r * g.x, v[i].y * r * g.y), pack2(v[i].z * r * g.z, v[i].w * r * g.w));
    }
}

// Attention over the paged cache: each warp has a ring of its own, filled before the kernel waits.
constexpr int MERGE = 2 * PARTIES * GROUP * (HEAD_DIM + 2) * 4;
constexpr int KV_STAGES = (MAX_SHARED - MERGE - 1024) / (NW * STAGE);
static_assert(NW * KV_STAGES * (STAGE + 8) + MERGE + 16 == SHARED_attention, "shared memory as planned");

extern "C" __global__ __launch_bounds__(NT, 1) void attention(const int* seq_lens, const int* block_table,
                                                             const __grid_constant__ TensorMap key_map,
                                                             const __grid_constant__ TensorMap value_map, u16* attended, float* part,
                                                             uint2* fresh, int* split_count, int* error, int table_stride, int num_rows) {
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  float* merge = reinterpret_cast<float*>(shared + NW * KV_STAGES * STAGE);
  u64* bars = reinterpret_cast<u64*>(shared + NW * KV_STAGES * STAGE + MERGE);
  int* words = reinterpret_cast<int*>(bars + NW * KV_STAGES);
  Ring<KV_STAGES> ring{smem32(shared + warp * KV_STAGES * STAGE), smem32(bars + warp * KV_STAGES)};
  Args p{};
  p.seq_lens = seq_lens; p.block_table = block_table; p.key_map = &key_map; p.value_map = &value_map; p.attended = attended;
  p.part = part; p.fresh = fresh; p.split_count = split_count; p.error = error; p.table_stride = table_stride; p.num_rows = num_rows;

  if (lane < KV_STAGES) mbar_init(ring.full + lane * 8, 1);
  mbar_init_fence();
  launch_dependents();
  __syncthreads();
  const u64 policy = evict_first();
  CachedTokens cached;
  cached.start(p, warp, lane);
  auto refill = [&]() {
    if (cached.more) cached.request(p, ring, lane, policy);
  };
  for (int i = 0; i < KV_STAGES && cached.more; ++i) cached.request(p, ring, lane, policy);
  grid_wait();
  const Team& team = cached.team;
  attend(p, ring, team, merge + team.group * (PARTIES * GROUP * (HEAD_DIM + 2)), words + team.group, 0, refill);
}
