// act = silu(x Wg^T + bg) * (x Wu^T + bu) for many tokens on Hopper (sm_90a): the product of gate and up with what follows it, so that
// neither is written.
//
// A tile is 128 tokens and 128 columns of act, that is as many rows of both matrices. Two CTAs, a cluster, have neighbouring tiles of
// tokens and the same rows, of which each copies half to both. Clusters take pairs of tiles in turn: all tokens of some rows, then of the
// next, so the input stays in the level-2 cache. One warp copies chunks of 64 columns into a ring; two warpgroups have 64 rows of gate and
// the same of up each, and so what silu needs in one lane.
//
// Defined by who compiles it: BF16, SHARED (bytes of dynamic shared memory), TOKENS = 128, MLP_BIAS.
#include "cluster.cuh"
#include "wgmma.cuh"

constexpr int CLUSTER = 2, COLUMNS = 64, TILE_ROWS = 128;
constexpr int QUARTER = 64 * COLUMNS * 2;           // bytes of 64 rows of weights
constexpr int WEIGHT_BYTES = 4 * QUARTER, STAGE = WEIGHT_BYTES + TOKENS * COLUMNS * 2;
constexpr int STAGES = SHARED / (STAGE + 16);
constexpr int COMPUTE = 8;                          // warps; one more copies
static_assert(TOKENS == 128 && STAGES >= 3 && STAGES * (STAGE + 16) == SHARED, "shared memory as planned");

// A place in the ring.
struct Turn {
  int at = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == STAGES) { at = 0; parity ^= 1; }
  }
};

// Nothing else runs meanwhile: with a division in full this alone would take a tenth of the kernel.
__device__ __forceinline__ float silu(float v) { return v * approximate_inverse(1.f + approximate_exp2(v * -1.44269504f)); }

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__((COMPUTE + 1) * 32, 1) void swiglu(
    const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap input, const float* bias, u16* act, int num_tokens,
    int ffn, int up_at, int num_chunks) {
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, rank = cluster_rank(), peer = rank ^ 1;
  const u32 data = smem32(shared), full = data + STAGES * STAGE, empty = full + STAGES * 8;
  const int num_pairs = (num_tokens + CLUSTER * TOKENS - 1) / (CLUSTER * TOKENS);
  const int num_tiles = (ffn + TILE_ROWS - 1) / TILE_ROWS * num_pairs, stride = gridDim.x / CLUSTER;

  if (tid < STAGES) {
    mbar_init(full + tid * 8, 1);
    mbar_init(empty + tid * 8, CLUSTER * COMPUTE);
  }
  mbar_init_fence();
  launch_dependents();
  __syncthreads();
  cluster_arrive();
  cluster_wait();           // the other CTA's barriers are there too

  if (warp == COMPUTE) {
    if (lane == 0) {
      // Chunks of all tiles in order; the copies of weights and of the input go through them apart.
      struct At {
        int tile, chunk;
        Turn turn;
      };
      auto next = [&](At& at) {
        if (++at.chunk == num_chunks) { at.chunk = 0; at.tile += stride; }
        at.turn.next();
      };
      auto load_weights = [&](const At& at) {
        const u32 bar = full + at.turn.at * 8;
        mbar_expect(bar, STAGE);
        box_load_shared(data + at.turn.at * STAGE + rank * 2 * QUARTER, weights, at.chunk * COLUMNS,
                        rank * up_at + at.tile / num_pairs * TILE_ROWS, 0, bar, 3);
      };
      auto load_input = [&](const At& at) {
        box_load_kept(data + at.turn.at * STAGE + WEIGHT_BYTES, input, at.chunk * COLUMNS,
                      (at.tile % num_pairs * CLUSTER + rank) * TOKENS, 0, full + at.turn.at * 8);
      };
      At at{(int)blockIdx.x / CLUSTER, 0, {}}, early = at;
      int in_use = 0;
      for (; in_use < STAGES && early.tile < num_tiles; ++in_use, next(early)) load_weights(early);
      grid_wait();
      global_async_fence();
      for (int i = 0; i < in_use; ++i, next(at)) load_input(at);
      Turn used;
      for (; at.tile < num_tiles; next(at), used.next()) {
        mbar_wait(empty + used.at * 8, used.parity);
        load_weights(at);
        load_input(at);
      }
      // No CTA ends while the other may tell it that a stage is empty.
      for (; in_use; --in_use, used.next()) mbar_wait(empty + used.at * 8, used.parity);
    }
  } else {
    const int group = warp / 4;
    Turn turn;
    for (int tile = blockIdx.x / CLUSTER; tile < num_tiles; tile += stride) {
      float gate[TOKENS / 2], up[TOKENS / 2];
      int before = 0;
      auto release = [&]() {
        if (lane < CLUSTER) arrive_remotely(remote(empty + before * 8, lane));
      };
      for (int chunk = 0; chunk < num_chunks; ++chunk, turn.next()) {
        mbar_wait(full + turn.at * 8, turn.parity);
        const u32 stage = data + turn.at * STAGE;
        const u64 x = matrix(stage + WEIGHT_BYTES), g = matrix(stage + group * QUARTER), u = matrix(stage + (2 + group) * QUARTER);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
          wgmma<TOKENS>(gate, g + 2 * k, x + 2 * k, k ? 1 : chunk);
          wgmma<TOKENS>(up, u + 2 * k, x + 2 * k, k ? 1 : chunk);
        }
        wgmma_commit();
        if (chunk) {        // the products before have ended
          wgmma_wait<1>();
          release();
        }
        before = turn.at;
      }
      wgmma_wait<0>();
      release();
      // The lane has two rows, a and b, of two tokens in each eight. Transposed, it has two rows, in eight, of one token.
      const int row = tile / num_pairs * TILE_ROWS + group * 64 + warp % 4 * 16, token = (tile % num_pairs * CLUSTER + rank) * TOKENS;
      const int a = row + lane / 4, b = a + 8;
      float4 biases = make_float4(0, 0, 0, 0);
      if (MLP_BIAS) {
        if (a < ffn) biases.x = __ldg(bias + a), biases.y = __ldg(bias + ffn + a);
        if (b < ffn) biases.z = __ldg(bias + b), biases.w = __ldg(bias + ffn + b);
      }
      auto made = [](float g, float u, float gate_bias, float up_bias) { return silu(g + gate_bias) * (u + up_bias); };
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) {
        const u32 of_a = pack2(made(gate[4 * n], up[4 * n], biases.x, biases.y), made(gate[4 * n + 1], up[4 * n + 1], biases.x, biases.y));
        const u32 of_b = pack2(made(gate[4 * n + 2], up[4 * n + 2], biases.z, biases.w), made(gate[4 * n + 3], up[4 * n + 3], biases.z, biases.w));
        const u32 lower = transposed(of_a), upper = transposed(of_b);
        const int t = token + n * 8 + lane / 4, f = row + lane % 4 * 2;
        u16* to = act + (size_t)t * ffn + f;
        if (t < num_tokens && f < ffn) *reinterpret_cast<u32*>(to) = lower;
        if (t < num_tokens && f + 8 < ffn) *reinterpret_cast<u32*>(to + 8) = upper;
      }
    }
  }
}
