// Reads memory and does nothing with it: the ceiling of whatever reads all weights for each token. For any GPU.
using u32 = unsigned;

// `num_pieces` of 16 bytes; eight are in flight in each thread. `sum` is written in a case that does not arise, for which the
// compiler must keep the loads.
extern "C" __global__ __launch_bounds__(512) void read_only(const uint4* data, long long num_pieces, u32* sum) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  u32 mine = 0;
  for (; i + 7 * stride < num_pieces; i += 8 * stride) {
    uint4 piece[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) piece[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) mine += piece[j].x ^ piece[j].y ^ piece[j].z ^ piece[j].w;
  }
  for (; i < num_pieces; i += stride) {
    const uint4 piece = __ldcs(data + i);
    mine += piece.x ^ piece.y ^ piece.z ^ piece.w;
  }
  if (mine == 0x9e3779b9u) *sum = mine;
}
