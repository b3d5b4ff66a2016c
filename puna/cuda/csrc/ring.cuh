// The ring through which a warp receives what it reads.
#pragma once
#include "sm90.cuh"

// A warp's ring: stages are filled and emptied in the same order.
template <int STAGES, int BYTES>
struct Ring {
  u32 data, full;           // of stage 0
  int in = 0, out = 0;
  u32 parity = 0;
  __device__ __forceinline__ u32 wait() {
    mbar_wait(full + out * 8, parity);
    return data + out * BYTES;
  }
  __device__ __forceinline__ void next_out() {
    if (++out == STAGES) { out = 0; parity ^= 1; }
  }
  __device__ __forceinline__ void next_in() {
    if (++in == STAGES) in = 0;
  }
};
