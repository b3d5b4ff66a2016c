// A decode step of a LLaMA layer for one token on Hopper (sm_90a) in four launches: qkv (norm, projection, RoPE, KV append,
// attention over the paged cache), out (+ residual), gate_up (norm, SiLU), down (+ residual); then head (norm, logits, each CTA's
// best token) and pick.
//
// One scheme for all. A CTA an SM, eight warps. Weights are rows of a matrix [Np, K]; a CTA owns consecutive tiles of sixteen
// rows, and warp w about an eighth of their columns, in chunks of 256. It streams them through a ring of its own in shared memory
// (a chunk of all of a tile's rows is one copy, one stage, one barrier), so that in the main loop no warp waits for another.
// Products are mma.m16n8k16: the weights of a tile are the rows and the token is one of the eight columns. A warp's sums of a tile
// go to shared memory; the warps take turns to add up the eight parts, in order, and to finish the tile. So the order of a row's
// sum depends on nothing else.
//
// Which columns of a fragment are "k" is free as long as token and weights agree: a lane takes eight neighbouring columns of a row
// with one 16-byte load and feeds two products with them.
//
// Programmatic dependent launch: weights do not depend on the kernels before, so rings are filled before grid_wait. Every
// kernel takes more than half of an SM's shared memory, so that one CTA fits on each SM wherever it is placed: two on one and
// none on another, to which smaller footprints led now and then, cost 5 to 30 %; two kernels resident together, one streaming
// while the next one's rings are full, were no faster (H100, 2026-11-25).
//
// Defined by who compiles it: BF16 (0, 1), HIDDEN, HEADS, KV_HEADS, HEAD_DIM (64, 128), FFN, VOCAB, KV_BLOCK, EPS, ROWS (1),
// ATTENTION_BIAS, MLP_BIAS (0, 1), STAGES_<kernel>, SHARED_<kernel>: bytes of dynamic shared memory, which puna.cuda.fused_plan
// works out.
#include "attention.cuh"
#include "best.cuh"
#include "input.cuh"

constexpr int NBUF = 2 * NW;                        // tiles whose parts may be under way

// Shared memory of a kernel: rings, [input | parts of tiles] or [attention of the warps], barriers, a few words.
template <int MODE, int K>
struct Shared {
  static constexpr int STAGES = num_stages(MODE), RINGS = NW * STAGES * STAGE;
  static constexpr int INPUT = K * 2, PARTS = NBUF * NW * TILE * 4;
  static constexpr int MERGE = MODE == QKV ? 2 * PARTIES * GROUP * (HEAD_DIM + 2) * 4 : 0;      // of two teams
  static constexpr int WORK = INPUT + PARTS > MERGE ? INPUT + PARTS : MERGE;
  static constexpr int TOTAL = RINGS + WORK + (NW * STAGES + NBUF) * 8 + (NW + 8) * 4;
};

// What a tile becomes. Lane 4i has the sums a and b of the rows of pair i. `load` is called before the sums are there, for what
// will be needed then.
template <int MODE>
struct Finish {
  float2 residual, rotation;
  int row, head, slot;
  __device__ __forceinline__ void load(const Args& p, int tile, int i) {
    row = first_of<MODE>(tile, i);
    if (MODE == OUT || MODE == DOWN) residual = make_float2(__ldcg(p.h + row), __ldcg(p.h + row + PARTNER<MODE>));
    if (MODE == QKV) {
      head = tile / TILES_A_HEAD;
      rotation = make_float2(1, 0);
      if (head < HEADS + KV_HEADS) {
        const int at = __ldg(p.positions) * (HEAD_DIM / 2) + row % HEAD_DIM;
        rotation = make_float2(__ldg(p.cos + at), __ldg(p.sin + at));
      }
      slot = __ldg(p.slots);
    }
  }
  __device__ __forceinline__ void store(const Args& p, float a, float b, u32 tag, float2& best) {
    const int other = row + PARTNER<MODE>;
    if (MODE == QKV || MODE == OUT ? ATTENTION_BIAS : MODE != HEAD && MLP_BIAS) {
      a += __ldg(p.bias + row);
      b += __ldg(p.bias + other);
    }
    if (MODE == QKV) {
      const int d = row % HEAD_DIM;
      float2 v = rotated(a, b, rotation);
      if (head >= HEADS) v = append(p, v, head, d, slot);
      st_tagged(p.fresh + (size_t)head * (HEAD_DIM / 2) + d, pack2(v.x, v.y), tag);
    } else if (MODE == OUT || MODE == DOWN) {
      __stcg(p.h + row, residual.x + a);
      __stcg(p.h + other, residual.y + b);
    } else if (MODE == GATE_UP) {
      p.y[row] = pack1(silu(a) * b);
    } else {
      if (row < VOCAB) p.logits[row] = a;
      if (other < VOCAB) p.logits[other] = b;
      if (row < VOCAB && a > best.x) best = make_float2(a, __int_as_float(row));
      if (other < VOCAB && b > best.x) best = make_float2(b, __int_as_float(other));
    }
  }
};

// The CTA's best token. `each` [NW].
__device__ __forceinline__ void store_best(const Args& p, float2 best, float2* each) {
  const int tid = threadIdx.x;
  best = better_of_lanes(best, 4, 32);
  __syncthreads();
  if (tid % 32 == 0) each[tid / 32] = best;
  __syncthreads();
  if (tid) return;
  for (int j = 1; j < NW; ++j)
    if (is_better(each[j], best)) best = each[j];
  p.best[blockIdx.x] = best;
}

template <int MODE, int K>
__device__ __forceinline__ void run(const Args& p, const TensorMap& map) {
  using Layout = Shared<MODE, K>;
  constexpr int STAGES = Layout::STAGES;
  constexpr bool NORM = MODE == QKV || MODE == GATE_UP || MODE == HEAD;
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  unsigned char* input = shared + Layout::RINGS;
  float* parts = reinterpret_cast<float*>(input + Layout::INPUT);       // [NBUF][NW][TILE / 2] pairs
  u64* bars = reinterpret_cast<u64*>(input + Layout::WORK);
  float* words = reinterpret_cast<float*>(bars + NW * STAGES + NBUF);
  Ring<STAGES, STAGE> ring{smem32(shared + warp * STAGES * STAGE), smem32(bars + warp * STAGES)};
  const u32 done = smem32(bars + NW * STAGES);

  // Consecutive tiles, as many as any other CTA has, or one less.
  constexpr int TILES = num_rows_of(MODE) / TILE;
  const int first = (int)((long long)TILES * blockIdx.x / gridDim.x), last = (int)((long long)TILES * (blockIdx.x + 1) / gridDim.x);
  const u64 policy = evict_first();
  Weights<MODE, K> weights;
  weights.start(first, last, warp);
  CachedTokens cached;
  int room = STAGES;        // of the ring
  auto refill = [&]() {     // as a stage has been read
    if (weights.left) weights.request(map, ring, lane, policy);
    else if (MODE == QKV && cached.more) cached.request(p, ring, lane, policy);
    else ++room;
  };

  if (lane < STAGES) mbar_init(ring.full + lane * 8, 1);
  if (tid < NBUF) mbar_init(done + tid * 8, NW * TILE / 2);
  mbar_init_fence();
  launch_dependents();
  __syncthreads();
  for (; room && weights.left; --room) weights.request(map, ring, lane, policy);
  if (MODE == QKV) cached.start(p, warp, lane);     // for one token it takes less time than the kernels in front
  load_row<NORM, MODE == HEAD, K>(p, input, words);
  __syncthreads();

  // Parts of tile i lie in buffer i % NBUF; warp i % NW finishes it. A warp that writes to buffer i % NBUF again has finished one
  // of the tiles from i + NW on, for which every warp had come so far: tile i was finished, its buffer is free.
  const u32 tag = MODE == QKV ? ((u32)__ldg(p.epoch) + 1) * 1024 + p.layer : 0;
  float2 best = make_float2(-INFINITY_F, 0);
  for (int i = 0, tile = first; tile < last; ++i, ++tile) {
    Finish<MODE> finish;
    if (i % NW == warp && t == 0) finish.load(p, tile, g);
    float c0[4] = {}, c1[4] = {};
#pragma unroll
    for (int c = 0; c < Slice<K>::MOST; ++c) {
      if (!Slice<K>::IS_EVEN && c == Slice<K>::MOST - 1 && c == weights.num_chunks) break;
      const u32 stage = ring.wait() + g * ROW_BYTES + t * 16;
      const u32 row = smem32(input) + Slice<K>::column(warp, c) * 2 + t * 16;
#pragma unroll
      for (int u = 0; u < CHUNK / UNIT; ++u) {
        const uint4 w = lds128(stage + u * UNIT * 2), v = lds128(stage + 8 * ROW_BYTES + u * UNIT * 2);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (g == 0) x = lds128(row + u * UNIT * 2);
        mma16(c0, w.x, v.x, w.y, v.y, x.x, x.y);
        mma16(c1, w.z, v.z, w.w, v.w, x.z, x.w);
      }
      __syncwarp();
      refill();
      ring.next_out();
    }
    float* part = parts + i % NBUF * NW * TILE + 2 * g;
    const u32 bar = done + i % NBUF * 8;
    if (t == 0) {           // each lane tells for itself: racecheck does not see one tell for its warp
      *reinterpret_cast<float2*>(part + warp * TILE) = make_float2(c0[0] + c1[0], c0[2] + c1[2]);
      mbar_arrive(bar);
    }
    if (i % NW != warp) continue;
    mbar_wait(bar, i / NBUF & 1);
    if (t == 0) {
      float a = 0, b = 0;
#pragma unroll
      for (int j = 0; j < NW; ++j) {
        const float2 v = *reinterpret_cast<const float2*>(part + j * TILE);
        a += v.x;
        b += v.y;
      }
      finish.store(p, a, b, tag, best);
    }
  }
  if (MODE == QKV) {
    for (; room && cached.more; --room) cached.request(p, ring, lane, policy);
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
                         const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap value_map, u16* attended, float* part, uint2* fresh, int* epoch, int* split_count, int* error,
                         int layer) {
  Args p{};
  p.bias = bias; p.h = h; p.gamma = gamma; p.cos = cos; p.sin = sin; p.positions = positions; p.slots = slots;
  p.seq_lens = seq_lens; p.block_table = block_table; p.keys = keys; p.values = values; p.attended = attended; p.part = part;
  p.key_map = &key_map; p.value_map = &value_map; p.fresh = fresh; p.epoch = epoch; p.split_count = split_count; p.error = error;
  p.layer = layer;
  run<QKV, HIDDEN>(p, w);
}

KERNEL(out, OUT, Q_SIZE)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, float* h) {
  Args p{};
  p.bias = bias; p.x = x; p.h = h;
  run<OUT, Q_SIZE>(p, w);
}

KERNEL(gate_up, GATE_UP, HIDDEN)(const __grid_constant__ TensorMap w, const float* bias, float* h, const float* gamma, u16* y) {
  Args p{};
  p.bias = bias; p.h = h; p.gamma = gamma; p.y = y;
  run<GATE_UP, HIDDEN>(p, w);
}

KERNEL(down, DOWN, FFN)(const __grid_constant__ TensorMap w, const float* bias, const u16* x, float* h) {
  Args p{};
  p.bias = bias; p.x = x; p.h = h;
  run<DOWN, FFN>(p, w);
}

KERNEL(head, HEAD, HIDDEN)(const __grid_constant__ TensorMap w, float* h, const float* gamma, const int* rows, float* logits, float2* best, int* epoch) {
  Args p{};
  p.h = h; p.gamma = gamma; p.rows = rows; p.logits = logits; p.best = best; p.epoch = epoch;
  run<HEAD, HIDDEN>(p, w);
}
