// Products of four warps together (wgmma), and the input's copies for them.
#pragma once
#include "sm90.cuh"

// A box of the input, of which every CTA needs a copy.
__device__ __forceinline__ void input_load(u32 dst, const TensorMap& map, int x, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%3}], [%4];" ::"r"(dst),
      "l"(&map), "r"(x), "r"(0), "r"(bar)
      : "memory");
}
// Between what kernels before have stored and copies of it.
__device__ __forceinline__ void global_async_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// A matrix in shared memory whose rows are 128 bytes, swizzled: bits 62 and 63 say so; 1,024 bytes from eight rows to the next.
__device__ __forceinline__ u64 matrix(u32 addr) { return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (addr & 0x3ffff) >> 4; }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define WGMMA(n, list, a, b, p)                                                                                                   \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." DT "." DT " {" list "}, " a ", " b \
  ", p, 1, 1, 0, 0;\n}\n"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])

// d += a b, or d = a b: 64 rows of weights, ROWS tokens, 16 columns. d[4 n + j]: of tokens 8 n to 8 n + 7.
__device__ __forceinline__ void wgmma(float (&d)[ROWS / 2], u64 a, u64 b, int adds) {
#if ROWS == 8
  asm volatile(WGMMA(8, "%0,%1,%2,%3", "%4", "%5", "%6") : D4(0) : "l"(a), "l"(b), "r"(adds));
#elif ROWS == 16
  asm volatile(WGMMA(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", "%10") : D4(0), D4(4) : "l"(a), "l"(b), "r"(adds));
#elif ROWS == 32
  asm volatile(WGMMA(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16", "%17", "%18")
               : D4(0), D4(4), D4(8), D4(12)
               : "l"(a), "l"(b), "r"(adds));
#else
  asm volatile(WGMMA(64,
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                     "%32", "%33", "%34")
               : D4(0), D4(4), D4(8), D4(12), D4(16), D4(20), D4(24), D4(28)
               : "l"(a), "l"(b), "r"(adds));
#endif
}

