// y = x W^T for up to TOKENS (32, 64) tokens on Hopper (sm_90a), at the speed at which W can be read: "stream-K" (Osama et
// al., 2023, arXiv 2301.03598). The product is cut into blocks of 256 rows of W, a block into chunks of 64 columns, and all chunks,
// block by block, into equal runs, one for each CTA. So a block is the sum of one or several CTAs' parts: each is stored, and whoever
// reads the product adds them (puna.cuda.stream_k_plan says how many there are). No CTA waits for another.
//
// One warp copies weights and input into a ring; it requests weights before the kernels in front have ended. Two warpgroups have 128
// rows each: wgmma with the weights as its first operand, and the tokens as the columns.
//
// Its ring has as many stages as there is room for in the shared memory that a launch was given.
//
// Defined by who compiles it: TOKENS, BF16, REGISTERS (most of a thread).
#include "wgmma.cuh"

constexpr int BLOCK_ROWS = 256, COLUMNS = 64, PART_TOKENS = 64;
constexpr int TILE_BYTES = 64 * COLUMNS * 2;        // of 64 rows
constexpr int WEIGHT_BYTES = BLOCK_ROWS * COLUMNS * 2, INPUT_BYTES = TOKENS * COLUMNS * 2, STAGE = WEIGHT_BYTES + INPUT_BYTES;
constexpr int COMPUTE = 8;                          // warps; one more copies

// A place in the ring.
struct Turn {
  int at = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int num_stages) {
    if (++at == num_stages) { at = 0; parity ^= 1; }
  }
};

struct Product {
  const float* bias;        // [num_rows], or null
  float* y;                 // [parts, PART_TOKENS, num_rows]
  int num_tokens, num_rows;
  int num_blocks, num_chunks;       // of W; of a block
  int is_whole;             // CTAs have whole blocks: y is [num_tokens, num_rows]
};

__device__ __forceinline__ int first_chunk(const Product& p, int cta) {
  const int all = p.is_whole ? p.num_blocks : p.num_blocks * p.num_chunks;
  return all * cta / (int)gridDim.x * (p.is_whole ? p.num_chunks : 1);
}

// The sums of 64 rows, from `row` on: those of the lane.
__device__ __forceinline__ void store(const Product& p, const float (&d)[TOKENS / 2], int row, int part, int lane, bool has_bias) {
  const int a = row + lane / 4, b = a + 8;
  const float bias_a = has_bias && a < p.num_rows ? __ldg(p.bias + a) : 0, bias_b = has_bias && b < p.num_rows ? __ldg(p.bias + b) : 0;
  float* y = p.y + (size_t)part * PART_TOKENS * p.num_rows;
#pragma unroll
  for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = n * 8 + lane % 4 * 2 + j;
      if (token >= p.num_tokens) continue;
      float* to = y + (size_t)token * p.num_rows;
      if (a < p.num_rows) __stcg(to + a, d[4 * n + j] + bias_a);
      if (b < p.num_rows) __stcg(to + b, d[4 * n + 2 + j] + bias_b);
    }
}

extern "C" __global__ __maxnreg__(REGISTERS) void stream_k(const __grid_constant__ TensorMap weights,
                                                                            const __grid_constant__ TensorMap input, const float* bias,
                                                                            float* y, int num_tokens, int num_rows, int num_blocks,
                                                                            int num_chunks, int is_whole) {
  const Product p{bias, y, num_tokens, num_rows, num_blocks, num_chunks, is_whole};
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const int num_stages = shared_bytes() / (STAGE + 16);
  const u32 data = smem32(shared), full = data + num_stages * STAGE, empty = full + num_stages * 8;
  const int first = first_chunk(p, blockIdx.x), last = first_chunk(p, blockIdx.x + 1);

  if (tid < num_stages) {
    mbar_init(full + tid * 8, 1);
    mbar_init(empty + tid * 8, COMPUTE);
  }
  mbar_init_fence();
  launch_dependents();
  __syncthreads();

  if (warp == COMPUTE) {
    if (lane) return;
    const u64 policy = evict_first();
    auto load_weights = [&](int chunk, int stage) {
      mbar_expect(full + stage * 8, STAGE);
      box_load(data + stage * STAGE, weights, chunk % num_chunks * COLUMNS, chunk / num_chunks * BLOCK_ROWS, 0, full + stage * 8, policy);
    };
    auto load_input = [&](int chunk, int stage) {
      box_load_kept(data + stage * STAGE + WEIGHT_BYTES, input, chunk % num_chunks * COLUMNS, 0, 0, full + stage * 8);
    };
    const int early = min(last - first, num_stages);
    for (int i = 0; i < early; ++i) load_weights(first + i, i);
    grid_wait();
    global_async_fence();
    for (int i = 0; i < early; ++i) load_input(first + i, i);
    Turn turn;
    for (int chunk = first + early; chunk < last; ++chunk, turn.next(num_stages)) {
      mbar_wait(empty + turn.at * 8, turn.parity);
      load_weights(chunk, turn.at);
      load_input(chunk, turn.at);
    }
    return;
  }

  const int group = warp / 4;
  Turn turn;
  for (int chunk = first; chunk < last;) {
    const int block = chunk / num_chunks, begin = chunk, end = min(last, (block + 1) * num_chunks);
    float d[2][TOKENS / 2];
    int before = 0;
    auto release = [&]() {
      if (lane == 0) mbar_arrive(empty + before * 8);
    };
    for (; chunk < end; ++chunk, turn.next(num_stages)) {
      mbar_wait(full + turn.at * 8, turn.parity);
      const u32 stage = data + turn.at * STAGE;
      const u64 x = matrix(stage + WEIGHT_BYTES);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
        for (int t = 0; t < 2; ++t) wgmma<TOKENS>(d[t], matrix(stage + (group * 2 + t) * TILE_BYTES) + 2 * k, x + 2 * k, k ? 1 : chunk - begin);
      wgmma_commit();
      if (chunk > begin) {  // the products before have ended
        wgmma_wait<1>();
        release();
      }
      before = turn.at;
    }
    wgmma_wait<0>();
    release();
    // Parts of a block are numbered from the CTA that has its first chunk.
    const bool is_first = begin == block * num_chunks;
    const int owner = ((block * num_chunks + 1) * (int)gridDim.x - 1) / (num_blocks * num_chunks);
    const int part = is_first ? 0 : blockIdx.x - owner;
#pragma unroll
    for (int t = 0; t < 2; ++t) store(p, d[t], block * BLOCK_ROWS + (group * 2 + t) * 64 + warp % 4 * 16, part, lane, is_first && bias);
  }
}
