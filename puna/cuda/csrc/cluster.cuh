// Between the CTAs of a cluster.
#pragma once
#include "sm90.cuh"

__device__ __forceinline__ u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// Execution only: barriers are made known by mbar_init_fence. (With .release a fence of the whole GPU goes with it.)
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Where a CTA of the cluster has what lies at `addr` here.
__device__ __forceinline__ u32 remote(u32 addr, u32 rank) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
// To another CTA's memory, counted by its barrier.
__device__ __forceinline__ void send(u32 to, float4 v, u32 bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w), "r"(bar)
               : "memory");
}
// Of the CTA's scope, as CUTLASS has it: for telling that shared memory has been read. (With .cluster the compiler puts a fence of
// the whole GPU before it, and before each wait of that scope an invalidation of the first-level cache: once a tile, or a chunk.)
__device__ __forceinline__ void arrive_remotely(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
