// A decode step of a LLaMA layer on Hopper (sm_90a) in four launches: qkv (norm, projection, RoPE, KV append, attention over
// the paged cache), out (+ residual), gate_up (norm, SiLU), down (+ residual); then head (norm, logits, each CTA's best tokens)
// and pick. For up to ROWS tokens, each of a sequence of its own.
//
// One scheme for all. A CTA an SM, eight warps. Weights are rows of a matrix [Np, K]; a CTA owns consecutive tiles of eight
// rows, and warp w about an eighth of their columns, in chunks of 256. It streams them through a ring of its own in shared memory
// (a chunk of all eight rows is one copy, one stage, one barrier), so that in the main loop no warp waits for another. Products are mma.m16n8k16, tokens
// the rows and the weights of a tile the columns. A warp's sums of a tile go to shared memory; the warps take turns to add up the
// eight parts, in order, and to finish the tile. So the order of a row's sum depends on nothing else.
//
// Which columns of a fragment are "k" is free as long as tokens and weights agree: a lane takes eight neighbouring columns
// with one 16-byte load and feeds two products with them.
//
// Programmatic dependent launch: weights do not depend on the kernels before, so rings are filled before grid_wait. Every
// kernel takes more than half of an SM's shared memory, so that one CTA fits on each SM wherever it is placed: two on one and
// none on another, to which smaller footprints led now and then, cost 5 to 30 %; two kernels resident together, one streaming
// while the next one's rings are full, were no faster (H100, 2026-11-25).
//
// Defined by who compiles it: BF16 (0, 1), HIDDEN, HEADS, KV_HEADS, HEAD_DIM (64, 128), FFN, VOCAB, KV_BLOCK, EPS, ROWS (1, 8),
// ATTENTION_BIAS, MLP_BIAS (0, 1), SHARED_<kernel>: bytes of dynamic shared memory, which puna.cuda.fused_plan works out.
#include "sm90.cuh"

constexpr int NW = 8, NT = 32 * NW, TILE = 8, CHUNK = 256, UNIT = 32;
constexpr int ROW_BYTES = CHUNK * 2, STAGE = TILE * ROW_BYTES;
constexpr int NBUF = 2 * NW;                        // tiles whose parts may be under way
constexpr int REGISTER_UNITS = 32;                  // of the input's fragments that a warp keeps in registers; more in shared memory
constexpr int GROUP = HEADS / KV_HEADS, Q_SIZE = HEADS * HEAD_DIM, ALL_HEADS = HEADS + 2 * KV_HEADS;
constexpr int TILES_A_HEAD = HEAD_DIM / TILE;
constexpr int TOKENS = 16;                          // of a stage of keys or values
// A stage of keys or values: the dimensions in stretches of 64, each [TOKENS][64]; the 16-byte pieces of a row are swizzled by
// the row, so that neither a row's nor a column's accesses meet in a bank.
constexpr int KV_STAGE = TOKENS * HEAD_DIM * 2;
__device__ __forceinline__ u32 kv_piece(int token, int piece) {       // piece: of eight dimensions
  return piece / 8 * (TOKENS * 128) + token * 128 + ((piece % 8) ^ (token & 7)) * 16;
}
constexpr int MAX_SPLITS = 16, MIN_SPLIT = 256;
constexpr int PARTIES = 8;                          // that share a task of attention
constexpr int SPIN = 1 << 22;                       // a bound on polls: a lost signal sets `error` and does not hang
static_assert(KV_STAGE <= STAGE, "a stage of keys fits");
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

// Row r (0 to 7) of a tile of weights. A lane finishes rows 2t and 2t + 1 of a tile: they are what belongs together.
template <int MODE>
__device__ __forceinline__ int weight_row(int tile, int r) {
  if (MODE == QKV)          // dimensions d and d + HEAD_DIM / 2 of a head
    return tile / TILES_A_HEAD * HEAD_DIM + tile % TILES_A_HEAD * (TILE / 2) + (r >> 1) + (r & 1) * (HEAD_DIM / 2);
  if (MODE == GATE_UP) return tile * (TILE / 2) + (r >> 1) + (r & 1) * FFN;
  return tile * TILE + r;
}
// The same tile as a box of the matrix, whose map has these dimensions from the innermost on, in boxes of (CHUNK, 4, 2) or
// (CHUNK, 8, 1): QKV (K, HEAD_DIM / 2, 2 ALL_HEADS), GATE_UP (K, FFN, 2), others (K, Np, 1). A box's rows follow each other.
template <int MODE>
__device__ __forceinline__ void load_tile(u32 dst, const TensorMap& map, int tile, int column, u32 bar, u64 policy) {
  const int y = MODE == QKV ? tile % TILES_A_HEAD * 4 : MODE == GATE_UP ? tile * 4 : tile * 8;
  box_load(dst, map, column, y, MODE == QKV ? tile / TILES_A_HEAD * 2 : 0, bar, policy);
}
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

// Stages of a warp's ring. Of one row 3 and 5 are up to 1 % slower than 4 (H100, 2026-11-25); `down` of more rows needs the room.
__device__ constexpr int num_stages(int mode) { return mode == DOWN && ROWS > 1 ? 3 : 4; }

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

// A task of attention: a KV head and a part of a sequence's context, whose length depends on the context alone. Its stretches
// of TOKENS tokens are dealt to eight parties, each of which sums up alone; what the parties have is then added in order. A task
// belongs to `width` warps, each of which plays one party or several, one after the other: as many warps as leave no CTA
// without a task, so the bits do not depend on it.
struct Task {
  int id, seq, kv, start, end, party, at, split, num_splits;    // at: the next token of the party's
  // `lens`: of sequence i in lane i. All lanes of a warp call this together.
  __device__ __forceinline__ bool find(int num_rows, int lens, int first_party) {
    int n = id;
    for (seq = 0; seq < num_rows; ++seq) {
      const int len = __shfl_sync(~0u, lens, seq), part = split_len(len);
      num_splits = (len + part - 1) / part;
      if (n < num_splits * KV_HEADS) {
        split = n / KV_HEADS;
        kv = n % KV_HEADS;
        start = split * part;
        end = min(len, start + part);
        begin(first_party);
        return true;
      }
      n -= num_splits * KV_HEADS;
    }
    return false;
  }
  __device__ __forceinline__ void begin(int which) {
    party = which;
    at = start + which * TOKENS;
  }
  static __device__ __forceinline__ int split_len(int len) {
    int part = MIN_SPLIT;
    while (part * MAX_SPLITS < len) part *= 2;
    return part;
  }
  static __device__ __forceinline__ int count(int num_rows, int lens) {
    int n = 0;
    for (int seq = 0; seq < num_rows; ++seq) {
      const int len = __shfl_sync(~0u, lens, seq), part = split_len(len);
      n += (len + part - 1) / part * KV_HEADS;
    }
    return n;
  }
};

// Who of a CTA's warps works on which task: groups of `width` warps.
struct Team {
  int width, group, index, first_id, stride, lens;
  __device__ __forceinline__ void form(const Args& p, int warp, int lane) {
    lens = lane < p.num_rows ? __ldg(p.seq_lens + lane) : 0;
    width = Task::count(p.num_rows, lens) > gridDim.x ? NW / 2 : NW;
    group = warp / width;
    index = warp % width;
    first_id = blockIdx.x + group * gridDim.x;
    stride = NW / width * gridDim.x;
  }
  __device__ __forceinline__ void sync() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(width * 32) : "memory");
  }
};

// What a warp requests of the cache: keys, then values, of each of its stretches, of all its tasks in order.
struct CachedTokens {
  Task task;
  Team team;
  bool more = false, is_value = false;
  int base = 0, blocks = 0;   // blocks: of the task's blocks from the base-th on, one a lane
  __device__ __forceinline__ void start(const Args& p, int warp, int lane) {
    team.form(p, warp, lane);
    task.id = team.first_id;
    find(p, lane);
  }
  __device__ __forceinline__ void find(const Args& p, int lane) {
    for (;; task.id += team.stride) {
      more = task.find(p.num_rows, team.lens, team.index);
      if (!more) return;
      if (task.at < task.end) return load_blocks(p, 0, lane);
    }
  }
  __device__ __forceinline__ void load_blocks(const Args& p, int first, int lane) {
    base = first;
    const int at = task.start + (base + lane) * KV_BLOCK;
    blocks = at < task.end ? __ldg(p.block_table + task.seq * p.table_stride + at / KV_BLOCK) : 0;
  }
  __device__ __forceinline__ size_t offset(int block, int at) const {
    return (((size_t)block * KV_HEADS + task.kv) * KV_BLOCK + at % KV_BLOCK) * HEAD_DIM;
  }
  // They are requested last and needed at once then: from the level-2 cache they come sooner.
  __device__ __forceinline__ void prefetch(const Args& p, int lane) {
    if (!more) return;
    const int at = task.start + lane * TOKENS, block = __shfl_sync(~0u, blocks, lane * TOKENS / KV_BLOCK);
    if (lane >= MIN_SPLIT / TOKENS || lane % team.width != team.index || at >= task.end) return;
    bulk_prefetch(p.keys + offset(block, at), TOKENS * HEAD_DIM * 2);
    bulk_prefetch(p.values + offset(block, at), TOKENS * HEAD_DIM * 2);
  }
  template <class R>
  __device__ __forceinline__ void request(const Args& p, R& ring, int lane, u64 policy) {
    const int nth = (task.at - task.start) / KV_BLOCK;
    if (nth < base || nth >= base + 32) load_blocks(p, nth / 32 * 32, lane);
    const int block = __shfl_sync(~0u, blocks, nth - base);
    if (lane == 0) {
      const u32 bar = ring.full + ring.in * 8, to = ring.data + ring.in * STAGE;
      mbar_expect(bar, KV_STAGE);
#pragma unroll
      for (int x = 0; x < HEAD_DIM; x += 64)
        box_load(to + x / 64 * (TOKENS * 128), is_value ? *p.value_map : *p.key_map, x, task.at % KV_BLOCK, block * KV_HEADS + task.kv,
                 bar, policy);
    }
    ring.next_in();
    is_value = !is_value;
    if (is_value) return;
    task.at += PARTIES * TOKENS;
    if (task.at < task.end) return;
    task.begin(task.party + team.width);
    if (task.party < PARTIES && task.at < task.end) return;
    task.id += team.stride;
    find(p, lane);
  }
};

// The input of one row, normalised where the kernel has a norm, into shared memory.
template <bool NORM, bool PICKS, int K>
__device__ __forceinline__ void load_row(const Args& p, unsigned char* input, float* words) {
  const int tid = threadIdx.x;
  if constexpr (!NORM) {
    grid_wait();
#pragma unroll
    for (int i = 0; i < (K / 8 + NT - 1) / NT; ++i)
      if (i * NT + tid < K / 8) reinterpret_cast<uint4*>(input)[i * NT + tid] = ldcg128(p.x + (i * NT + tid) * 8);
  } else {
    constexpr int V = (K / 4 + NT - 1) / NT;
    float4 gamma[V], v[V];
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4) gamma[i] = ldg_f4(p.gamma + (i * NT + tid) * 4);
    const float* h = PICKS ? p.h + (size_t)__ldg(p.rows) * K : p.h;
    grid_wait();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4) v[i] = ldcg_f4(h + (i * NT + tid) * 4);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4) sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    sum = warp_sum(sum);
    if (tid % 32 == 0) words[tid / 32] = sum;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int j = 0; j < NW; ++j) total += words[j];
    const float r = rsqrtf(total / K + EPS);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i * NT + tid < K / 4)
        reinterpret_cast<uint2*>(input)[i * NT + tid] = make_uint2(pack2(v[i].x * r * gamma[i].x, v[i].y * r * gamma[i].y),
                                                                   pack2(v[i].z * r * gamma[i].z, v[i].w * r * gamma[i].w));
  }
}

// The input of up to eight rows, as fragments: lane (g, t) has columns 8t to 8t + 7 of each unit of row g.
template <bool NORM, bool PICKS, int K>
struct Fragments {
  static constexpr int UNITS = Slice<K>::MOST * CHUNK / UNIT, IN_REGISTERS = UNITS < REGISTER_UNITS ? UNITS : REGISTER_UNITS;
  u32 f[IN_REGISTERS][4];
  u32 rest;                 // of the lane, in shared memory
  // `scratch`: K floats that are free until the next barrier.
  __device__ __forceinline__ void load(const Args& p, unsigned char* input, float* scratch, float* words, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3, num_units = Slice<K>::count(warp) * (CHUNK / UNIT);    // UNITS, or a chunk less
    const bool is_row = g < p.num_rows;
    auto is_mine = [&](int u) { return is_row && (Slice<K>::IS_EVEN || u < num_units); };
    auto column = [&](int u) { return Slice<K>::column(warp, u / (CHUNK / UNIT)) + u % (CHUNK / UNIT) * UNIT + t * 8; };
    rest = smem32(input) + (warp * (UNITS - IN_REGISTERS) * 32 + lane) * 16;
    if constexpr (!NORM) {
      grid_wait();
#pragma unroll
      for (int u = 0; u < UNITS; ++u) set(u, is_mine(u) ? ldcg128(p.x + (size_t)g * K + column(u)) : make_uint4(0, 0, 0, 0));
    } else {
      for (int i = threadIdx.x; i < K / 4; i += NT) reinterpret_cast<float4*>(scratch)[i] = ldg_f4(p.gamma + i * 4);
      const float* h = p.h + (size_t)(PICKS && is_row ? __ldg(p.rows + g) : g) * K;
      grid_wait();
      float4 a[UNITS], b[UNITS];
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        a[u] = is_mine(u) ? ldcg_f4(h + column(u)) : make_float4(0, 0, 0, 0);
        b[u] = is_mine(u) ? ldcg_f4(h + column(u) + 4) : make_float4(0, 0, 0, 0);
      }
      float sum = 0;
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        sum += a[u].x * a[u].x + a[u].y * a[u].y + a[u].z * a[u].z + a[u].w * a[u].w + b[u].x * b[u].x + b[u].y * b[u].y +
               b[u].z * b[u].z + b[u].w * b[u].w;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) words[warp * ROWS + g] = sum;
      __syncthreads();
      float total = 0;
#pragma unroll
      for (int j = 0; j < NW; ++j) total += words[j * ROWS + g];
      const float r = rsqrtf(total / K + EPS);
#pragma unroll
      for (int u = 0; u < UNITS; ++u) {
        const int from = Slice<K>::IS_EVEN || u < num_units ? column(u) : 0;
        const float4 c = *reinterpret_cast<float4*>(scratch + from), d = *reinterpret_cast<float4*>(scratch + from + 4);
        set(u, make_uint4(pack2(a[u].x * r * c.x, a[u].y * r * c.y), pack2(a[u].z * r * c.z, a[u].w * r * c.w),
                          pack2(b[u].x * r * d.x, b[u].y * r * d.y), pack2(b[u].z * r * d.z, b[u].w * r * d.w)));
      }
    }
  }
  __device__ __forceinline__ void set(int u, uint4 v) {
    if (u < IN_REGISTERS) {
      f[u][0] = v.x;
      f[u][1] = v.y;
      f[u][2] = v.z;
      f[u][3] = v.w;
    } else {
      sts128(rest + (u - IN_REGISTERS) * 512, v);
    }
  }
  __device__ __forceinline__ uint4 get(int u) const {
    if (u < IN_REGISTERS) return make_uint4(f[u][0], f[u][1], f[u][2], f[u][3]);
    return lds128(rest + (u - IN_REGISTERS) * 512);
  }
};

// The queries of a task's KV head, as fragments, and the key and value that this step adds, which the cache did not have yet
// when they were requested. All come from other CTAs of the launch. Lane (g, t) has dimensions 16t to 16t + 15 of each 64.
struct Fresh {
  u32 q[HEAD_DIM / UNIT][4];
  uint4 key, value;         // lane i: dimensions 8i to 8i + 7
  __device__ __forceinline__ void poll(const Args& p, const Task& task, bool has_new, u32 tag, int lane) {
    constexpr int HALF = HEAD_DIM / 2;
    const int g = lane >> 2, t = lane & 3;
    const uint2* from = p.fresh + (size_t)task.seq * ALL_HEADS * HALF;
    const uint2* queries = from + (task.kv * GROUP + g) * HALF + t * 16 % HALF;
    const uint2* new_key = from + (HEADS + task.kv) * HALF + lane % (HALF / 8) * 8;
    const uint2* new_value = new_key + KV_HEADS * HALF;
    const u32 half = lane < HALF / 8 ? 0x5410 : 0x7632;
    for (int polls = 0;; ++polls) {
      u32 wrong = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        u32 w[8] = {};
        if (g < GROUP) wrong |= ld_tagged(queries + u * 8, w, tag);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const u32 low = __byte_perm(w[2 * j], w[2 * j + 1], 0x5410), high = __byte_perm(w[2 * j], w[2 * j + 1], 0x7632);
          if constexpr (HEAD_DIM == 128) {
            q[u][j] = low;
            q[u + 2][j] = high;
          } else {
            q[u][j] = t < 2 ? low : high;
          }
        }
      }
      if (has_new) {
        u32 k[8], v[8];
        wrong |= ld_tagged(new_key, k, tag) | ld_tagged(new_value, v, tag);
        auto pair = [&](u32 (&w)[8], int j) { return __byte_perm(w[2 * j], w[2 * j + 1], half); };
        key = make_uint4(pair(k, 0), pair(k, 1), pair(k, 2), pair(k, 3));
        value = make_uint4(pair(v, 0), pair(v, 1), pair(v, 2), pair(v, 3));
      }
      if (!__any_sync(~0u, wrong != 0)) return;
      if (polls == SPIN) {
        if (lane == 0) atomicOr(p.error, 1);
        return;
      }
    }
  }
};

// A warp's softmax over its stretches of a task: for row g (a query head) the largest score, the sum, the weighted values.
struct Softmax {
  static constexpr int UNITS = HEAD_DIM / UNIT, TILES = HEAD_DIM / 8;
  float o[TILES][2] = {}, m = -INFINITY_F, l = 0;
  // `keys` and `values` lie in the ring; `refill` is called as each has been read.
  template <class R, class Refill>
  __device__ __forceinline__ void take(const Fresh& fresh, R& ring, int at, int end, int len, bool has_new, int lane, Refill refill) {
    const int g = lane >> 2, t = lane & 3, pos = len - 1 - at;
    const bool is_last = pos < TOKENS;      // the stretch holds the token that this step adds
    u32 stage = ring.wait();
    if (is_last) {
      if (has_new) sts128(stage + kv_piece(pos, lane), fresh.key);
      __syncwarp();
    }
    float s[2][2] = {};     // tokens 2t and 2t + 1, of either eight
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 k = lds128(stage + kv_piece(n * 8 + g, u / 2 * 8 + t * 2 + u % 2));
        mma(s[n], fresh.q[u][0], fresh.q[u][1], k.x, k.y);
        mma(s[n], fresh.q[u][2], fresh.q[u][3], k.z, k.w);
      }
    if (is_last) async_fence();
    __syncwarp();
    refill();
    ring.next_out();
    constexpr float scale = 1.4426950408889634f / (HEAD_DIM == 64 ? 8.f : 11.313708498984761f);  // log2(e) / sqrt(HEAD_DIM)
    float top = m;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[n][j] = at + n * 8 + 2 * t + j < end ? s[n][j] * scale : -INFINITY_F;
        top = fmaxf(top, s[n][j]);
      }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));     // finite: the first token of a stretch is one of the context
    const float r = exp2f(m - top);
    m = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        s[n][j] = exp2f(s[n][j] - m);
        sum += s[n][j];
      }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    l = l * r + sum;
#pragma unroll
    for (int d = 0; d < TILES; ++d) { o[d][0] *= r; o[d][1] *= r; }
    const u32 a0 = pack2(s[0][0], s[0][1]), a1 = pack2(s[1][0], s[1][1]);
    stage = ring.wait();
    if (is_last) {          // zeros after the last token: whatever lies there must not become a NaN
      if (lane < HEAD_DIM / 8) {
        if (has_new) sts128(stage + kv_piece(pos, lane), fresh.value);
        for (int j = pos + 1; j < TOKENS; ++j) sts128(stage + kv_piece(j, lane), make_uint4(0, 0, 0, 0));
      }
      __syncwarp();
    }
#pragma unroll
    for (int d = 0; d < TILES; d += 2) {
      u32 b[4];             // tokens 0 to 7 and 8 to 15, of eight dimensions and of the next eight
      ldmatrix_t(b, stage + kv_piece(lane & 15, d + (lane >> 4)));
      mma(o[d], a0, a1, b[0], b[1]);
      mma(o[d + 1], a0, a1, b[2], b[3]);
    }
    if (is_last) async_fence();
    __syncwarp();
    refill();
    ring.next_out();
  }
};

// A warp's part of its team's tasks. `merge` [PARTIES][GROUP][HEAD_DIM + 2] is the team's own.
template <class R, class Refill>
__device__ __forceinline__ void attend(const Args& p, R& ring, const Team& team, float* merge, int* word, u32 tag, Refill refill) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, tid = team.index * 32 + lane, num_threads = team.width * 32;
  Task task;
  for (task.id = team.first_id; task.find(p.num_rows, team.lens, team.index); task.id += team.stride) {
    const int len = __shfl_sync(~0u, team.lens, task.seq);
    const int newest = task.end == len ? (len - 1 - task.start) / TOKENS % PARTIES : -1;    // the party that meets the new token
    const bool has_new = newest % team.width == team.index && lane < HEAD_DIM / 8;
    Fresh fresh;
    fresh.poll(p, task, has_new, tag, lane);
    team.sync();            // `merge` is free
    for (; task.party < PARTIES; task.begin(task.party + team.width)) {
      Softmax mine;
      for (; task.at < task.end; task.at += PARTIES * TOKENS)
        mine.take(fresh, ring, task.at, task.end, len, has_new, lane, refill);
      if (g < GROUP) {
        float* to = merge + (task.party * GROUP + g) * (HEAD_DIM + 2);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) *reinterpret_cast<float2*>(to + d * 8 + 2 * t) = make_float2(mine.o[d][0], mine.o[d][1]);
        if (t == 0) { to[HEAD_DIM] = mine.m; to[HEAD_DIM + 1] = mine.l; }
      }
    }
    team.sync();
    const size_t seq_head = (size_t)task.seq * KV_HEADS + task.kv;
    float* part = p.part + seq_head * MAX_SPLITS * GROUP * (HEAD_DIM + 1);
    u16* attended = p.attended + (size_t)task.seq * Q_SIZE + task.kv * GROUP * HEAD_DIM;
    for (int i = tid; i < GROUP * HEAD_DIM; i += num_threads) {
      const int h = i / HEAD_DIM, d = i % HEAD_DIM;
      float m = -INFINITY_F, sum = 0, v = 0;
#pragma unroll
      for (int j = 0; j < PARTIES; ++j) m = fmaxf(m, merge[(j * GROUP + h) * (HEAD_DIM + 2) + HEAD_DIM]);
#pragma unroll
      for (int j = 0; j < PARTIES; ++j) {
        const float* from = merge + (j * GROUP + h) * (HEAD_DIM + 2);
        const float f = exp2f(from[HEAD_DIM] - m);
        sum += f * from[HEAD_DIM + 1];
        v += f * from[d];
      }
      if (task.num_splits == 1) {
        attended[i] = pack1(v / sum);
      } else {
        float* to = part + (size_t)(task.split * GROUP + h) * (HEAD_DIM + 1);
        __stcg(to + d, v / sum);
        if (d == 0) __stcg(to + HEAD_DIM, m + log2f(sum));
      }
    }
    if (task.num_splits == 1) continue;
    // Whoever comes last adds up all parts, in order.
    __threadfence();
    team.sync();
    if (tid == 0) *word = atomicAdd(p.split_count + seq_head, 1);
    team.sync();
    if (*word != task.num_splits - 1) continue;
    __threadfence();
    for (int i = tid; i < GROUP * HEAD_DIM; i += num_threads) {
      const float* from = part + (size_t)(i / HEAD_DIM) * (HEAD_DIM + 1);
      constexpr int STEP = GROUP * (HEAD_DIM + 1);
      float m = -INFINITY_F, sum = 0, v = 0;
      for (int j = 0; j < task.num_splits; ++j) m = fmaxf(m, __ldcg(from + j * STEP + HEAD_DIM));
      for (int j = 0; j < task.num_splits; ++j) {
        const float f = exp2f(__ldcg(from + j * STEP + HEAD_DIM) - m);
        sum += f;
        v += f * __ldcg(from + j * STEP + i % HEAD_DIM);
      }
      attended[i] = pack1(v / sum);
    }
    if (tid == 0) p.split_count[seq_head] = 0;
  }
}

// What a tile becomes. Lane (g, t) has the sums a and b of weight rows 2t and 2t + 1 for token g. `load` is called before the
// sums are there, for what will be needed then.
template <int MODE>
struct Finish {
  float2 residual, rotation;
  int row, head, slot;
  __device__ __forceinline__ void load(const Args& p, int tile, int g, int t) {
    row = weight_row<MODE>(tile, 2 * t);
    if (MODE == OUT || MODE == DOWN) residual = __ldcg(reinterpret_cast<const float2*>(p.h + (size_t)g * HIDDEN + row));
    if (MODE == QKV) {
      head = tile / TILES_A_HEAD;
      rotation = make_float2(1, 0);
      if (head < HEADS + KV_HEADS) {
        const int at = __ldg(p.positions + g) * (HEAD_DIM / 2) + row % HEAD_DIM;
        rotation = make_float2(__ldg(p.cos + at), __ldg(p.sin + at));
      }
      slot = __ldg(p.slots + g);
    }
  }
  __device__ __forceinline__ void store(const Args& p, float a, float b, int tile, int g, int t, u32 tag, float2& best) {
    if (MODE == QKV || MODE == OUT ? ATTENTION_BIAS : MODE != HEAD && MLP_BIAS) {
      a += __ldg(p.bias + row);
      b += __ldg(p.bias + weight_row<MODE>(tile, 2 * t + 1));
    }
    if (MODE == QKV) {
      const int d = row % HEAD_DIM;
      const float rotated = a * rotation.x - b * rotation.y;
      b = b * rotation.x + a * rotation.y;
      a = rotated;
      if (head >= HEADS) {
        u16* to = (head < HEADS + KV_HEADS ? p.keys : p.values) +
                  (((size_t)(slot / KV_BLOCK) * KV_HEADS + (head - HEADS) % KV_HEADS) * KV_BLOCK + slot % KV_BLOCK) * HEAD_DIM + d;
        a = clipped(a);
        b = clipped(b);
        to[0] = pack1(a);
        to[HEAD_DIM / 2] = pack1(b);
      }
      st_tagged(p.fresh + ((size_t)g * ALL_HEADS + head) * (HEAD_DIM / 2) + d, pack2(a, b), tag);
    } else if (MODE == OUT || MODE == DOWN) {
      __stcg(reinterpret_cast<float2*>(p.h + (size_t)g * HIDDEN + row), make_float2(residual.x + a, residual.y + b));
    } else if (MODE == GATE_UP) {
      p.y[(size_t)g * FFN + row] = pack1(a / (1.f + __expf(-a)) * b);
    } else {
      float* to = p.logits + (size_t)g * VOCAB;
      if (row < VOCAB) to[row] = a;
      if (row + 1 < VOCAB) to[row + 1] = b;
      if (row < VOCAB && a > best.x) best = make_float2(a, __int_as_float(row));
      if (row + 1 < VOCAB && b > best.x) best = make_float2(b, __int_as_float(row + 1));
    }
  }
};

// The CTA's best token of each row; of equals the lowest. `each` [NW][ROWS].
__device__ __forceinline__ bool is_better(float2 a, float2 b) {
  return a.x > b.x || (a.x == b.x && __float_as_int(a.y) < __float_as_int(b.y));
}
__device__ __forceinline__ void store_best(const Args& p, float2 best, float2* each) {
  const int tid = threadIdx.x, warp = tid >> 5, g = tid % 32 >> 2, t = tid & 3;
#pragma unroll
  for (int o = 1; o < 4; o <<= 1) {
    const float2 other = make_float2(__shfl_xor_sync(~0u, best.x, o), __shfl_xor_sync(~0u, best.y, o));
    if (is_better(other, best)) best = other;
  }
  __syncthreads();
  if (t == 0 && g < ROWS) each[warp * ROWS + g] = best;
  __syncthreads();
  if (tid >= ROWS) return;
  best = each[tid];
  for (int j = 1; j < NW; ++j)
    if (is_better(each[j * ROWS + tid], best)) best = each[j * ROWS + tid];
  p.best[blockIdx.x * ROWS + tid] = best;
}

template <int MODE, int K>
__device__ __forceinline__ void run(const Args& p, const TensorMap& map) {
  using Layout = Shared<MODE, K>;
  constexpr int STAGES = Layout::STAGES;
  constexpr bool NORM = MODE == QKV || MODE == GATE_UP || MODE == HEAD;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  unsigned char* input = shared + Layout::RINGS;
  float* parts = reinterpret_cast<float*>(input + Layout::INPUT);       // [NBUF][NW][ROWS][TILE]
  u64* bars = reinterpret_cast<u64*>(input + Layout::WORK);
  float* words = reinterpret_cast<float*>(bars + NW * STAGES + NBUF);
  Ring<STAGES> ring{smem32(shared + warp * STAGES * STAGE), smem32(bars + warp * STAGES)};
  const u32 done = smem32(bars + NW * STAGES);

  // Consecutive tiles, as many as any other CTA has, or one less.
  constexpr int TILES = num_rows_of(MODE) / TILE;
  const int first = (int)((long long)TILES * blockIdx.x / gridDim.x), last = (int)((long long)TILES * (blockIdx.x + 1) / gridDim.x);
  const u64 policy = evict_first();
  Weights<MODE, K> weights;
  weights.start(first, last, warp);
  CachedTokens cached;
  auto refill = [&]() {
    if (weights.left) weights.request(map, ring, lane, policy);
    else if (MODE == QKV && cached.more) cached.request(p, ring, lane, policy);
  };

  if (lane < STAGES) mbar_init(ring.full + lane * 8, 1);
  if (tid < NBUF) mbar_init(done + tid * 8, NW);
  mbar_init_fence();
  launch_dependents();
  __syncthreads();
  int num_requested = 0;
  for (; num_requested < STAGES && weights.left; ++num_requested) weights.request(map, ring, lane, policy);
  if (MODE == QKV) {
    cached.start(p, warp, lane);
    cached.prefetch(p, lane);
    for (; num_requested < STAGES && cached.more; ++num_requested) cached.request(p, ring, lane, policy);
  }

  Fragments<NORM, MODE == HEAD, K> fragments;
  if constexpr (ROWS == 1) load_row<NORM, MODE == HEAD, K>(p, input, words);
  else fragments.load(p, input, parts, words, warp, lane);
  if (ROWS == 1 || NORM) __syncthreads();     // a warp's fragments are its own

  // Parts of tile i lie in buffer i % NBUF; warp i % NW finishes it. A warp that writes to buffer i % NBUF again has finished one
  // of the tiles from i + NW on, for which every warp had come so far: tile i was finished, its buffer is free.
  const u32 tag = MODE == QKV ? ((u32)__ldg(p.epoch) + 1) * 1024 + p.layer : 0;
  const bool is_row = g < p.num_rows;
  float2 best = make_float2(-INFINITY_F, 0);
  for (int i = 0, tile = first; tile < last; ++i, ++tile) {
    Finish<MODE> finish;
    if (i % NW == warp && is_row) finish.load(p, tile, g, t);
    float c0[2] = {}, c1[2] = {};
#pragma unroll
    for (int c = 0; c < Slice<K>::MOST; ++c) {
      if (!Slice<K>::IS_EVEN && c == Slice<K>::MOST - 1 && c == weights.num_chunks) break;
      const u32 stage = ring.wait() + box_row<MODE>(g) * ROW_BYTES + t * 16;
      const u32 row = smem32(input) + Slice<K>::column(warp, c) * 2 + t * 16;
#pragma unroll
      for (int u = 0; u < CHUNK / UNIT; ++u) {
        const uint4 w = lds128(stage + u * UNIT * 2);
        uint4 x = make_uint4(0, 0, 0, 0);
        if constexpr (ROWS == 1) {
          if (g == 0) x = lds128(row + u * UNIT * 2);
        } else {
          x = fragments.get(c * (CHUNK / UNIT) + u);
        }
        mma(c0, x.x, x.y, w.x, w.y);
        mma(c1, x.z, x.w, w.z, w.w);
      }
      __syncwarp();
      refill();
      ring.next_out();
    }
    float* part = parts + i % NBUF * NW * ROWS * TILE + g * TILE + 2 * t;
    if (g < ROWS) *reinterpret_cast<float2*>(part + warp * ROWS * TILE) = make_float2(c0[0] + c1[0], c0[1] + c1[1]);
    __syncwarp();
    const u32 bar = done + i % NBUF * 8;
    if (lane == 0) mbar_arrive(bar);
    if (i % NW != warp) continue;
    mbar_wait(bar, i / NBUF & 1);
    if (is_row) {
      float a = 0, b = 0;
#pragma unroll
      for (int j = 0; j < NW; ++j) {
        const float2 v = *reinterpret_cast<const float2*>(part + j * ROWS * TILE);
        a += v.x;
        b += v.y;
      }
      finish.store(p, a, b, tile, g, t, tag, best);
    }
  }
  if (MODE == QKV) {
    __syncthreads();        // what the input and the parts lay in is free
    const Team& team = cached.team;
    float* merge = reinterpret_cast<float*>(input) + team.group * (PARTIES * GROUP * (HEAD_DIM + 2));
    attend(p, ring, team, merge, reinterpret_cast<int*>(words) + team.group, tag, refill);
  }
  if (MODE == HEAD) {
    store_best(p, best, reinterpret_cast<float2*>(parts));
    if (blockIdx.x == 0 && tid == 0) ++*p.epoch;      // all kernels that read it in this step have ended
  }
}

#define KERNEL(name, mode, k)                                                                  \
  static_assert(Shared<mode, k>::TOTAL == SHARED_##name, "shared memory as planned");          \
  extern "C" __global__ __launch_bounds__(NT, 1) void name

KERNEL(qkv, QKV, HIDDEN)(const __grid_constant__ TensorMap w, const float* bias, float* h, const float* gamma, const float* cos, const float* sin,
                         const int* positions, const int* slots, const int* seq_lens, const int* block_table, u16* keys, u16* values,
                         const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap value_map, u16* attended, float* part, uint2* fresh, int* epoch, int* split_count, int* error, int table_stride,
                         int num_rows, int layer) {
  Args p{};
  p.bias = bias; p.h = h; p.gamma = gamma; p.cos = cos; p.sin = sin; p.positions = positions; p.slots = slots;
  p.seq_lens = seq_lens; p.block_table = block_table; p.keys = keys; p.values = values; p.attended = attended; p.part = part;
  p.key_map = &key_map; p.value_map = &value_map; p.fresh = fresh; p.epoch = epoch; p.split_count = split_count; p.error = error; p.table_stride = table_stride;
  p.num_rows = num_rows; p.layer = layer;
  run<QKV, HIDDEN>(p, w);
}

KERNEL(out, OUT, Q_SIZE)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, float* h, int num_rows) {
  Args p{};
  p.bias = bias; p.x = x; p.h = h; p.num_rows = num_rows;
  run<OUT, Q_SIZE>(p, w);
}

KERNEL(gate_up, GATE_UP, HIDDEN)(const __grid_constant__ TensorMap w, const float* bias, float* h, const float* gamma, u16* y, int num_rows) {
  Args p{};
  p.bias = bias; p.h = h; p.gamma = gamma; p.y = y; p.num_rows = num_rows;
  run<GATE_UP, HIDDEN>(p, w);
}

KERNEL(down, DOWN, FFN)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, float* h, int num_rows) {
  Args p{};
  p.bias = bias; p.x = x; p.h = h; p.num_rows = num_rows;
  run<DOWN, FFN>(p, w);
}

KERNEL(head, HEAD, HIDDEN)(const __grid_constant__ TensorMap w, float* h, const float* gamma, const int* rows, float* logits, float2* best, int* epoch,
                           int num_rows) {
  Args p{};
  p.h = h; p.gamma = gamma; p.rows = rows; p.logits = logits; p.best = best; p.epoch = epoch; p.num_rows = num_rows;
  run<HEAD, HIDDEN>(p, w);
}

// tokens[r] = the best of each CTA's best tokens of row r; it becomes the last token of row rows[r] of the mirror. After a lost
// signal all tokens are -1.
extern "C" __global__ void pick(const float2* best, const int* rows, int* last, int* tokens, const int* error, int num_ctas) {
  grid_wait();
  const int r = blockIdx.x;
  float2 mine = make_float2(-INFINITY_F, __int_as_float(0x7fffffff));
  for (int j = threadIdx.x; j < num_ctas; j += 32) {
    const float2 other = __ldcg(best + j * ROWS + r);
    if (is_better(other, mine)) mine = other;
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const float2 other = make_float2(__shfl_xor_sync(~0u, mine.x, o), __shfl_xor_sync(~0u, mine.y, o));
    if (is_better(other, mine)) mine = other;
  }
  if (threadIdx.x) return;
  const int token = __ldcg(error) ? -1 : __float_as_int(mine.y);
  tokens[r] = token;
  if (rows[r] >= 0) last[rows[r]] = token;
}
