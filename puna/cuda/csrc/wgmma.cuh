// Products of four warps together (wgmma), and the copies of their operands.
#pragma once
#include "sm90.cuh"

// Between what kernels before have stored and copies of it.
__device__ __forceinline__ void global_async_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// A box that many CTAs read: it may stay in the cache.
__device__ __forceinline__ void box_load_kept(u32 dst, const TensorMap& map, int x, int y, int z, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4}], [%5];" ::"r"(dst),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(bar)
      : "memory");
}
// A box to the same place in every CTA of the cluster whose bit is in `mask`, and counted by each one's barrier.
__device__ __forceinline__ void box_load_shared(u32 dst, const TensorMap& map, int x, int y, int z, u32 bar, u16 mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2,%3,%4}], [%5], %6;" ::"r"(dst),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(bar), "h"(mask)
      : "memory");
}

// A matrix in shared memory whose rows are 128 bytes, swizzled: bits 62 and 63 say so; `stride` bytes from eight rows to the next.
// 16 columns further are 32 bytes: 2 more.
__device__ __forceinline__ u64 matrix(u32 addr, int stride = 1024) {
  return (u64)1 << 62 | (u64)(stride >> 4) << 32 | (u64)1 << 16 | (addr & 0x3ffff) >> 4;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)

// d += a b, or d = a b: 64 rows of a, N of b, 16 columns of both. A lane has of its warp's sixteen rows of a lane / 4 and
// lane / 4 + 8, of each eight of b 2 (lane % 4) and one more: d[4 n + j] is of row j / 2 of the two, and of b
// 8 n + 2 (lane % 4) + j % 2.
template <int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, int adds) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128, "one instruction");
  if constexpr (N == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32." DT "." DT " {"
                 "%0,%1,%2,%3"
                 "}, %4, %5, p, 1, 1, 0, 0;\n}\n"
                 : D4(0)
                 : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (N == 16) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32." DT "." DT " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7"
                 "}, %8, %9, p, 1, 1, 0, 0;\n}\n"
                 : D4(0), D4(4)
                 : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (N == 32) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." DT "." DT " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
                 "}, %16, %17, p, 1, 1, 0, 0;\n}\n"
                 : D16(0)
                 : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (N == 64) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." DT "." DT " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31"
                 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
                 : D16(0), D16(16)
                 : "l"(a), "l"(b), "r"(adds));
  } else if constexpr (N == 128) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." DT "." DT " {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
                 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
                 : D16(0), D16(16), D16(32), D16(48)
                 : "l"(a), "l"(b), "r"(adds));
  }
}
