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

// The numbers of d, four more each time: as operands, and by name.
#define D4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define L4 "%0,%1,%2,%3"
#define D8 D4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define L8 L4 ",%4,%5,%6,%7"
#define D12 D8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define L12 L8 ",%8,%9,%10,%11"
#define D16 D12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define L16 L12 ",%12,%13,%14,%15"
#define D20 D16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define L20 L16 ",%16,%17,%18,%19"
#define D24 D20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define L24 L20 ",%20,%21,%22,%23"
#define D28 D24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define L28 L24 ",%24,%25,%26,%27"
#define D32 D28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define L32 L28 ",%28,%29,%30,%31"
#define D36 D32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define L36 L32 ",%32,%33,%34,%35"
#define D40 D36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define L40 L36 ",%36,%37,%38,%39"
#define D44 D40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define L44 L40 ",%40,%41,%42,%43"
#define D48 D44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define L48 L44 ",%44,%45,%46,%47"
#define D52 D48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define L52 L48 ",%48,%49,%50,%51"
#define D56 D52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define L56 L52 ",%52,%53,%54,%55"
#define D60 D56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define L60 L56 ",%56,%57,%58,%59"
#define D64 D60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define L64 L60 ",%60,%61,%62,%63"
#define WGMMA(n, names, a_at, b_at, adds_at, ...)                                              \
  if constexpr (N == n)                                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #adds_at ", 0;\n"                         \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." DT "." DT " {" names "}, %" #a_at ", %" #b_at ", p, 1, 1, 0, 0;\n}\n" \
                 : __VA_ARGS__                                                                 \
                 : "l"(a), "l"(b), "r"(adds))

// d += a b, or d = a b: 64 rows of a, N of b, 16 columns of both. A lane has of its warp's sixteen rows of a lane / 4 and
// lane / 4 + 8, of each eight of b 2 (lane % 4) and one more: d[4 n + j] is of row j / 2 of the two, and of b
// 8 n + 2 (lane % 4) + j % 2.
template <int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, int adds) {
  static_assert(N % 8 == 0 && N <= 128, "one instruction");
  WGMMA(8, L4, 4, 5, 6, D4);
  WGMMA(16, L8, 8, 9, 10, D8);
  WGMMA(24, L12, 12, 13, 14, D12);
  WGMMA(32, L16, 16, 17, 18, D16);
  WGMMA(40, L20, 20, 21, 22, D20);
  WGMMA(48, L24, 24, 25, 26, D24);
  WGMMA(56, L28, 28, 29, 30, D28);
  WGMMA(64, L32, 32, 33, 34, D32);
  WGMMA(72, L36, 36, 37, 38, D36);
  WGMMA(80, L40, 40, 41, 42, D40);
  WGMMA(88, L44, 44, 45, 46, D44);
  WGMMA(96, L48, 48, 49, 50, D48);
  WGMMA(104, L52, 52, 53, 54, D52);
  WGMMA(112, L56, 56, 57, 58, D56);
  WGMMA(120, L60, 60, 61, 62, D60);
  WGMMA(128, L64, 64, 65, 66, D64);
}
