// Instructions of Hopper by name, and the numbers of an engine (BF16: bfloat16, else float16). No headers of CUDA's are needed,
// so that NVRTC compiles it alone.
#pragma once
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

#if BF16
#define DT "bf16"
#else
#define DT "f16"
#endif
#define INFINITY_F __int_as_float(0x7f800000)

// What a launch was given of shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}
__device__ __forceinline__ u32 shared_bytes() {
  u32 r;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(r));
  return r;
}
__device__ __forceinline__ u32 smem32(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- Dependent launches: let the next kernel begin; wait until those before have ended -----------------------------------
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Of some of a CTA's threads. Barrier 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// ---- Barriers in shared memory, and copies that complete on them -----------------------------------------------------------
__device__ __forceinline__ void mbar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void mbar_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbar_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra wait;\n}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void mbar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// A box of a tensor that is described by a map (cuTensorMapEncodeTiled), at coordinates (x, y, z) from the innermost on.
struct alignas(64) TensorMap { unsigned char bytes[128]; };
__device__ __forceinline__ void box_load(u32 dst, const TensorMap& map, int x, int y, int z, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2,%3,%4}], [%5], %6;" ::"r"(dst),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(bar), "l"(policy)
      : "memory");
}
// A box of a tensor of five dimensions: columns, eight rows, parts that go together, eights of rows, heads; of the second and third all.
__device__ __forceinline__ void box_load_eights(u32 dst, const TensorMap& map, int x, int eight, int head, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2,%3,%3,%4,%5}], [%6], %7;" ::"r"(dst),
      "l"(&map), "r"(x), "r"(0), "r"(eight), "r"(head), "r"(bar), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const void* src, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}
// Between ordinary accesses to shared memory and copies into it that are started afterwards.
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Loads and stores ------------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint4 lds128(u32 addr) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr) : "memory");
  return v;
}
__device__ __forceinline__ void sts128(u32 addr, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four 8x8 matrices, transposed.
__device__ __forceinline__ void ldmatrix_t(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}
// A matrix of 8x8 numbers in the registers of a warp, transposed: a lane has two neighbours of row lane / 4.
__device__ __forceinline__ u32 transposed(u32 v) {
  u32 r;
  __syncwarp();
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ uint4 ldcg128(const void* p) { return __ldcg(reinterpret_cast<const uint4*>(p)); }
__device__ __forceinline__ float4 ldcg_f4(const void* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }
__device__ __forceinline__ float4 ldg_f4(const void* p) { return __ldg(reinterpret_cast<const float4*>(p)); }
__device__ __forceinline__ float2 ldcg_f2(const void* p) { return __ldcg(reinterpret_cast<const float2*>(p)); }
__device__ __forceinline__ float2 ldg_f2(const void* p) { return __ldg(reinterpret_cast<const float2*>(p)); }

// ---- A count of signals, of CTAs that are all resident: what a CTA stored before its signal is there for whoever has seen that ----
__device__ __forceinline__ void signal(u64* count) { asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(count) : "memory"); }
__device__ __forceinline__ u64 signals(const u64* count) {
  u64 r;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(r) : "l"(count) : "memory");
  return r;
}
// As many as there were some time before the thread's next signal.
__device__ __forceinline__ u64 signals_before(const u64* count) {
  u64 r;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(r) : "l"(count) : "memory");
  return r;
}

// ---- Words with a tag ------------------------------------------------------------------------------------------------------
// Between CTAs of one launch a word carries a tag beside its data, and whoever waits for it polls the data itself: no fence and
// no counter, either of which stalls the streams (one fence a tile: 13 of 46 us; H100, 2026-11-25). This is the low-latency
// protocol of NCCL: both halves of an aligned 8-byte store become visible at once.
__device__ __forceinline__ void st_tagged(uint2* p, u32 data, u32 tag) {
  asm volatile("st.volatile.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(data), "r"(tag) : "memory");
}
// The data of eight words; the result is not 0 where one of them has another tag.
__device__ __forceinline__ u32 ld_tagged(const uint2* p, u32 (&w)[8], u32 tag) {
  u32 wrong = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 t0, t1;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[2 * i]), "=r"(t0), "=r"(w[2 * i + 1]), "=r"(t1)
                 : "l"(p + 2 * i)
                 : "memory");
    wrong |= (t0 ^ tag) | (t1 ^ tag);
  }
  return wrong;
}

// ---- Numbers -----------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ u32 pack2(float lo, float hi) {
  u32 r;
  asm("cvt.rn." DT "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ u16 pack1(float v) {
  u16 r;
  asm("cvt.rn." DT ".f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
// A number for the cache: float16 after clipping to its range.
__device__ __forceinline__ float clipped(float v) { return BF16 ? v : fminf(fmaxf(v, -65504.f), 65504.f); }
// c += a b for sixteen rows and eight columns.
__device__ __forceinline__ void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." DT "." DT ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// To about two units in the last place; infinity for what is too large, zero for what is too small.
__device__ __forceinline__ float approximate_exp2(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float approximate_inverse(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
