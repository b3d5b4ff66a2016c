// csrc/sm90.cuh without a GPU: a thread of CUDA's is a fiber, all CTAs of a grid run at once, and copies come some time later.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

using std::max;
using std::min;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __cluster_dims__(...)
#define INFINITY_F INFINITY

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct int2 { int x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

// ---- The machine ---------------------------------------------------------------------------------------------------------------
struct Meeting { int count = 0; unsigned generation = 0; };     // of threads that wait for each other
struct Warp : Meeting { u32 in[32][8], out[32][4]; };
struct Cta {
  int id, rank;
  unsigned char* shared;
  std::map<int, Meeting> barriers;
  Meeting* cluster;
  Cta** peers;              // of the cluster
  std::vector<Warp> warps;
};
struct Dim { int x; };
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  Cta* cta;
  Warp* warp;
  Dim thread;
  bool has_begun = false, is_done = false;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  Fiber* self = nullptr;
  jmp_buf scheduler;
  Dim grid, block;
  u32 shared = 0;           // bytes of a CTA
  u64 progress = 0;         // of anything: when it stands still, threads wait in vain
  std::vector<std::pair<int, std::function<void()>>> copies;    // passes until it comes
  std::mt19937 random{1};
  std::function<void()> kernel;

  // Jumps, not swapcontext, which makes a system call each time.
  void pause() {
    if (!_setjmp(self->at)) _longjmp(scheduler, 1);
  }
  void go_on(Fiber& f) {
    self = &f;
    if (_setjmp(scheduler)) return;
    if (f.has_begun) _longjmp(f.at, 1);
    f.has_begun = true;
    setcontext(&f.start);
  }
  template <class Done>
  void wait(Done done) {
    while (!done()) pause();
  }
  void meet(Meeting& m, int num) {
    const unsigned generation = m.generation;
    ++progress;
    if (++m.count == num) {
      m.count = 0;
      ++m.generation;
    } else {
      wait([&] { return m.generation != generation; });
    }
  }
  static void enter();
  // False: threads wait for what never comes.
  bool run(int num_ctas, int num_threads, int shared_bytes, int cluster, std::function<void()> call) {
    kernel = std::move(call);
    grid = {num_ctas};
    block = {num_threads};
    shared = shared_bytes;
    constexpr int STACK = 96 << 10, ALIGNED = 1 << 10;
    std::vector<Cta> ctas(num_ctas);
    std::vector<Cta*> pointers(num_ctas);
    std::vector<Meeting> clusters(num_ctas / cluster + 1);
    std::vector<std::vector<char>> memory(num_ctas);
    std::vector<Fiber> fibers(num_ctas * num_threads);
    for (int i = 0; i < num_ctas; ++i) {
      memory[i].assign(shared_bytes + ALIGNED, (char)0xff);       // NaNs
      const auto address = (reinterpret_cast<uintptr_t>(memory[i].data()) + ALIGNED - 1) / ALIGNED * ALIGNED;
      pointers[i] = &ctas[i];
      ctas[i].id = i;
      ctas[i].rank = i % cluster;
      ctas[i].shared = reinterpret_cast<unsigned char*>(address);
      ctas[i].cluster = &clusters[i / cluster];
      ctas[i].peers = pointers.data() + i / cluster * cluster;
      ctas[i].warps.resize((num_threads + 31) / 32);
      for (int t = 0; t < num_threads; ++t) {
        Fiber& f = fibers[i * num_threads + t];
        f.cta = &ctas[i];
        f.warp = &ctas[i].warps[t / 32];
        f.thread = {t};
        f.stack.reset(new char[STACK]);
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.get();
        f.start.uc_stack.ss_size = STACK;
        f.start.uc_link = nullptr;
        makecontext(&f.start, enter, 0);
      }
    }
    size_t left = fibers.size();
    u64 before = ~0ull;
    for (int idle = 0; left; ++idle) {
      if (progress != before) idle = 0;
      before = progress;
      if (idle > 100) return false;
      const size_t start = random() % fibers.size();      // no order to rely on
      for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& f = fibers[(start + i) % fibers.size()];
        if (f.is_done) continue;
        go_on(f);
        left -= f.is_done;
      }
      auto due = copies;
      copies.clear();
      for (auto& [passes, copy] : due) {
        ++progress;
        if (passes) copies.emplace_back(passes - 1, std::move(copy));
        else copy();
      }
    }
    return true;
  }
};
inline Machine machine;
inline void Machine::enter() {
  machine.kernel();
  machine.self->is_done = true;
  ++machine.progress;
  _longjmp(machine.scheduler, 1);
}
#define threadIdx (machine.self->thread)
#define blockIdx (Dim{machine.self->cta->id})
#define gridDim (machine.grid)

// ---- CUDA's functions ------------------------------------------------------------------------------------------------------------
// Of global memory: other addresses are errors.
template <class T>
T* global(T* p) {
  const Cta* cta = machine.self->cta;
  const auto at = reinterpret_cast<const unsigned char*>(p);
  if (at >= cta->shared && at < cta->shared + machine.shared) throw std::runtime_error("shared memory is not global");
  return p;
}
template <class T> T __ldg(const T* p) { return *global(p); }
template <class T> T __ldcg(const T* p) { return *global(p); }
template <class T> void __stcg(T* p, T v) { *global(p) = v; }
inline float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
inline int __float_as_int(float v) { int i; memcpy(&i, &v, 4); return i; }
inline float __uint_as_float(u32 v) { return __int_as_float((int)v); }
inline u32 __float_as_uint(float v) { return (u32)__float_as_int(v); }
inline float __expf(float v) { return expf(v); }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline u32 __byte_perm(u32 a, u32 b, u32 s) {
  const u64 all = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= (u32)(all >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return r;
}
inline int atomicAdd(int* p, int v) { ++machine.progress; const int before = *p; *p += v; return before; }
inline int atomicOr(int* p, int v) { const int before = *p; *p |= v; return before; }
inline void __threadfence() {}
inline void named_barrier(int id, int num_threads) { machine.meet(machine.self->cta->barriers[id], num_threads); }
inline void __syncthreads() { named_barrier(0, machine.block.x); }
// All lanes of a warp give `in`; the last to come computes every lane's `out`.
template <class Compute>
void together(Compute compute) {
  Warp& w = *machine.self->warp;
  if (w.count == 31) compute(w);
  machine.meet(w, 32);
}
inline int lane_id() { return threadIdx.x % 32; }
inline u32* lane_in() { return machine.self->warp->in[lane_id()]; }
inline u32* lane_out() { return machine.self->warp->out[lane_id()]; }
inline void __syncwarp() { together([](Warp&) {}); }
template <class T>
T shuffle(T v, int from) {
  static_assert(sizeof(T) == 4);
  memcpy(lane_in(), &v, 4);
  lane_in()[1] = from;
  together([](Warp& w) {
    for (int i = 0; i < 32; ++i) w.out[i][0] = w.in[w.in[i][1]][0];
  });
  memcpy(&v, lane_out(), 4);
  return v;
}
template <class T> T __shfl_sync(u32, T v, int from) { return shuffle(v, from % 32); }
template <class T> T __shfl_xor_sync(u32, T v, int mask) { return shuffle(v, lane_id() ^ mask); }
inline int __any_sync(u32, int v) {
  lane_in()[0] = v != 0;
  together([](Warp& w) {
    u32 any = 0;
    for (auto& in : w.in) any |= in[0];
    for (auto& out : w.out) out[0] = any;
  });
  return (int)lane_out()[0];
}

// ---- Of Hopper: see csrc/sm90.cuh --------------------------------------------------------------------------------------------------
inline u32 shared_bytes() { return machine.shared; }
inline unsigned char* shared_memory() { return machine.self->cta->shared; }
// The upper byte of an address is a rank of the cluster + 1; 0: here.
inline u32 smem32(const void* p) { return (u32)(static_cast<const unsigned char*>(p) - shared_memory()); }
inline unsigned char* at(u32 addr) {
  const Cta* cta = machine.self->cta;
  return (addr >> 24 ? cta->peers[(addr >> 24) - 1]->shared : cta->shared) + (addr & 0xffffff);
}
inline void launch_dependents() {}
inline void grid_wait() {}
struct Barrier {
  int16_t threads, pending;
  int32_t bytes : 31;
  u32 phase : 1;
  void settle() {
    if (pending || bytes) return;
    pending = threads;
    phase ^= 1;
    ++machine.progress;
  }
  void arrive(int more) {
    bytes += more;
    if (--pending < 0) throw std::runtime_error("more arrivals than a barrier has");
    settle();
  }
  void receive(int num_bytes) {
    bytes -= num_bytes;
    settle();
  }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier(u32 bar) { return *reinterpret_cast<Barrier*>(at(bar)); }
inline void mbar_init(u32 bar, u32 count) { barrier(bar) = {(int16_t)count, (int16_t)count, 0, 0}; }
inline void mbar_init_fence() {}
inline void mbar_wait(u32 bar, u32 parity) {
  Barrier& b = barrier(bar);
  machine.wait([&] { return b.phase != parity; });
}
inline void mbar_arrive(u32 bar) { barrier(bar).arrive(0); }
inline void mbar_expect(u32 bar, u32 bytes) { barrier(bar).arrive((int)bytes); }
inline u64 evict_first() { return 0; }
struct alignas(64) TensorMap {
  const u16* data;
  int64_t dims[5], strides[5];        // of up to five dimensions
  int32_t box[5], is_swizzled;
  char padding[16];
};
static_assert(sizeof(TensorMap) == 128);
inline void load_box(u32 dst, const TensorMap& map, const int (&from)[5], u32 bar) {
  unsigned char* to = at(dst);
  Barrier* b = &barrier(bar);
  std::vector<int> first(from, from + 5);
  machine.copies.emplace_back(machine.random() % 8, [=] {
    int num = 1;
    for (int d = 0; d < 5; ++d) num *= map.box[d];
    for (int n = 0; n < num; ++n) {
      const int i = n / map.box[0], j = n % map.box[0];     // row, column
      int64_t where = 0;
      bool is_there = true;
      for (int d = 0, left = n; d < 5; left /= map.box[d++]) {
        const int64_t at = first[d] + left % map.box[d];
        is_there &= at < map.dims[d];
        where += at * map.strides[d];
      }
      const int place = map.is_swizzled ? i * map.box[0] + ((j / 8 ^ i % 8) * 8 | j % 8) : n;
      reinterpret_cast<u16*>(to)[place] = is_there ? map.data[where] : 0;
    }
    b->receive(num * 2);
  });
}
inline void box_load(u32 dst, const TensorMap& map, int x, int y, int z, u32 bar, u64) { load_box(dst, map, {x, y, z, 0, 0}, bar); }
inline void box_load_eights(u32 dst, const TensorMap& map, int x, int eight, int head, u32 bar, u64) {
  load_box(dst, map, {x, 0, 0, eight, head}, bar);
}
inline void bulk_prefetch(const void*, u32) {}
inline void async_fence() {}
inline uint4 lds128(u32 addr) { return *reinterpret_cast<uint4*>(at(addr)); }
inline void sts128(u32 addr, uint4 v) { *reinterpret_cast<uint4*>(at(addr)) = v; }
inline void ldmatrix_t(u32 (&r)[4], u32 addr) {
  lane_in()[0] = addr;
  together([](Warp& w) {
    for (int i = 0; i < 32; ++i)
      for (int m = 0; m < 4; ++m) {
        auto number = [&](int row) { return (u32) reinterpret_cast<u16*>(at(w.in[m * 8 + row][0]))[i / 4]; };
        w.out[i][m] = number(i % 4 * 2) | number(i % 4 * 2 + 1) << 16;
      }
  });
  memcpy(r, lane_out(), 16);
}
inline u32 transposed(u32 v) {
  lane_in()[0] = v;
  together([](Warp& w) {
    for (int i = 0; i < 32; ++i) {
      const int row = i / 4, shift = row % 2 * 16;
      const u32 low = w.in[i % 4 * 8 + row / 2][0] >> shift & 0xffff, high = w.in[i % 4 * 8 + 4 + row / 2][0] >> shift & 0xffff;
      w.out[i][0] = low | high << 16;
    }
  });
  return lane_out()[0];
}
inline uint4 ldcg128(const void* p) { return *static_cast<const uint4*>(p); }
inline float4 ldcg_f4(const void* p) { return *static_cast<const float4*>(p); }
inline float4 ldg_f4(const void* p) { return *static_cast<const float4*>(p); }
inline float2 ldcg_f2(const void* p) { return *static_cast<const float2*>(p); }
inline float2 ldg_f2(const void* p) { return *static_cast<const float2*>(p); }
inline void st_tagged(uint2* p, u32 data, u32 tag) {
  *p = {data, tag};
  ++machine.progress;
}
inline u32 ld_tagged(const uint2* p, u32 (&w)[8], u32 tag) {
  machine.pause();
  u32 wrong = 0;
  for (int i = 0; i < 8; ++i) {
    w[i] = p[i].x;
    wrong |= p[i].y ^ tag;
  }
  return wrong;
}
inline void signal(u64* count) {
  ++*count;
  ++machine.progress;
}
inline u64 signals(const u64* count) {
  machine.pause();
  return *count;
}
inline u64 signals_before(const u64* count) { return *count; }
inline u16 rounded(float v) {
  u32 bits = __float_as_uint(v);
#if BF16
  if (isnan(v)) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
  const u32 sign = bits >> 16 & 0x8000;
  const float size = fabsf(v);
  if (isnan(v)) return (u16)(sign | 0x7fff);
  if (size >= 65520) return (u16)(sign | 0x7c00);
  if (size < 6.103515625e-5f) return (u16)(sign | (u32)lrintf(size * 16777216.f));      // subnormal, in units of 2^-24
  bits &= 0x7fffffff;
  bits += 0xfff + (bits >> 13 & 1);
  return (u16)(sign | ((bits >> 13) - (112 << 10)));
#endif
}
inline float number(u32 bits) {
#if BF16
  return __uint_as_float(bits << 16);
#else
  const u32 exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? mantissa / 16777216.f
                                     : __uint_as_float((exponent + 112) << 23 | mantissa << 13);
  return bits & 0x8000 ? -size : size;
#endif
}
inline u32 pack2(float lo, float hi) { return rounded(lo) | (u32)rounded(hi) << 16; }
inline u16 pack1(float v) { return rounded(v); }
inline float clipped(float v) { return BF16 ? v : fminf(fmaxf(v, -65504.f), 65504.f); }
// in: four registers of a, two of b. c: four numbers.
inline void multiply(float* c, int num, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 given[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(lane_in(), given, sizeof given);
  together([](Warp& w) {
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 2; ++j) {
        const int g = i / 4, k = i % 4 * 2 + j;
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][k + r / 2 * 8] = number(w.in[i][r] >> 16 * j & 0xffff);
        for (int r = 0; r < 2; ++r) b[k + r * 8][g] = number(w.in[i][4 + r] >> 16 * j & 0xffff);
      }
    for (int i = 0; i < 32; ++i)
      for (int r = 0; r < 4; ++r) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[i / 4 + r / 2 * 8][k] * b[k][i % 4 * 2 + r % 2];
        w.out[i][r] = __float_as_uint(sum);
      }
  });
  for (int r = 0; r < num; ++r) c[r] += __uint_as_float(lane_out()[r]);
}
inline void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { multiply(c, 4, a0, a1, a2, a3, b0, b1); }
inline float approximate_exp2(float v) { return exp2f(v); }
inline float approximate_inverse(float v) { return 1 / v; }
inline float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
