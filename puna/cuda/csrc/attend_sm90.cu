// Attention of a decode step over the paged cache on Hopper (sm_90a), as a kernel of its own that is small enough to be resident
// beside those that stream weights: its rings fill while q, k and v are computed, and those of the next product fill while it
// computes, so that memory is busy throughout.
//
// All stretches of TOKENS tokens of all tasks (a KV head of a sequence) are numbered, sequence by sequence and head by head, and
// dealt to the CTAs in equal runs, a CTA's to its warps likewise. Bounds are moved to those of tasks where that costs little;
// where a task is cut the warps' and the CTAs' parts of it are added, in order. No warp waits for another until then.
//
// Each warp has a ring of its own. The key and value that this step adds are put in place of what was requested too early.
//
// Defined by who compiles it: BF16, HEADS, KV_HEADS, HEAD_DIM (64, 128), KV_BLOCK, MAX_SEQS, KV_STAGES (of a warp's ring), SHARED:
// bytes of dynamic shared memory, REGISTERS: most of a thread.
#include "ring.cuh"
#include "softmax.cuh"

constexpr int GROUP = HEADS / KV_HEADS, Q_SIZE = HEADS * HEAD_DIM;
static_assert(GROUP <= 8, "the queries of a KV head are the rows of one product");
constexpr int NW = 4, NT = NW * 32;
constexpr int PART = HEAD_DIM + 2, PIECE = GROUP * PART;      // numbers: weighted values, largest score and sum of each query
static_assert(KV_BLOCK % TOKENS == 0 && PIECE * 4 <= KV_STAGES * KV_STAGE, "a stretch lies in a block; a ring has room for a piece");
using WarpRing = Ring<KV_STAGES, KV_STAGE>;

struct Args {
  const u16* q;             // [num_seqs, Q_SIZE], rotated
  const u16 *keys, *values; // of this layer: [N, KV_HEADS, KV_BLOCK, HEAD_DIM]
  const TensorMap *key_map, *value_map;     // of the same as (HEAD_DIM, KV_BLOCK, N KV_HEADS), in boxes of (64, TOKENS, 1), swizzled
  const int* slots;         // [num_seqs]: where this step's keys and values are
  const int* seq_lens;      // [num_seqs], this step's token included; 0: no sequence
  const int* block_table;   // [num_seqs, table_stride]
  u16* attended;            // [num_seqs, Q_SIZE]
  float* pieces;            // [gridDim.x, 3, PIECE]: of the tasks that are cut at a CTA's ends; of the first, its first warp's
  int* counts;              // [gridDim.x]: pieces that are there, of the task that a CTA begins; 0 between launches
  int table_stride, num_seqs;
};

// A stretch: the at-th of `num` that a KV head has of a sequence.
struct Stretch {
  int seq, kv, at, num;
  // The n-th of all. `before` [num_seqs + 1]: how many a KV head has of the sequences before.
  __device__ __forceinline__ void find(const int* before, int num_seqs, int n) {
    int low = 0, high = num_seqs;     // before[low] <= n / KV_HEADS < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (before[middle] <= n / KV_HEADS) low = middle;
      else high = middle;
    }
    seq = low;
    num = before[low + 1] - before[low];
    n -= before[low] * KV_HEADS;
    kv = n / num;
    at = n % num;
  }
  __device__ __forceinline__ void next_task(const int* before, int num_seqs) {
    at = 0;
    if (++kv < KV_HEADS) return;
    kv = 0;
    do {
      if (++seq == num_seqs) return;
      num = before[seq + 1] - before[seq];
    } while (num == 0);
  }
};

// How stretches are dealt. `before` as above; `longest`: most that a KV head has of a sequence.
struct Deal {
  const int* before;
  int num_seqs, all, num_ctas;        // num_ctas: that have a stretch
  bool cuts_no_cta, cuts_no_warp;     // bounds of CTAs, and of warps, are those of tasks
  __device__ __forceinline__ void start(const int* table, int seqs, int longest, int num_present) {
    before = table;
    num_seqs = seqs;
    all = table[seqs] * KV_HEADS;
    num_ctas = max(min((int)gridDim.x, all), 1);
    const int num_tasks = num_present * KV_HEADS;
    auto most = [&](int num_parties) { return (num_tasks + num_parties - 1) / num_parties * longest; };
    auto is_even = [&](int num_parties) { return most(num_parties) * num_parties <= all + all / 8; };
    // What CTAs leave each other costs about as much time as a few stretches.
    cuts_no_cta = is_even(num_ctas) || most(num_ctas) <= 3 * NW;
    cuts_no_warp = cuts_no_cta && is_even(num_ctas * NW);
  }
  __device__ __forceinline__ int nearest_task(int n) const {
    if (n >= all) return n;
    Stretch s;
    s.find(before, num_seqs, n);
    return s.at * 2 < s.num ? n - s.at : n - s.at + s.num;
  }
  // Of all the cache's tokens, times the number of CTAs: less than 2^31.
  __device__ __forceinline__ int first_of_cta(int cta) const {
    const int n = (int)((u32)all * min(cta, num_ctas) / num_ctas);
    return cuts_no_cta ? nearest_task(n) : n;
  }
  // The CTA that has a stretch, where CTAs' bounds may cut.
  __device__ __forceinline__ int cta_of(int n) const { return (int)((((u32)n + 1) * num_ctas - 1) / all); }
  __device__ __forceinline__ int first_of_warp(int first, int last, int warp) const {
    const int n = first + (last - first) * warp / NW;
    return cuts_no_warp && warp % NW ? nearest_task(n) : n;
  }
};

// What a warp requests of the cache: keys, then values, of each of its stretches. It looks up one stretch ahead, and fetches that
// to the level-2 cache.
struct Requests {
  Stretch next;             // behind the one that is requested
  int left, block, num_next, y, z;    // left: of it and those behind; block: next's; y, z: where it lies in the tensor
  bool is_value = false;
  __device__ __forceinline__ void look_up(const Args& p) {
    block = num_next > 0 ? __ldg(p.block_table + (size_t)next.seq * p.table_stride + next.at * TOKENS / KV_BLOCK) : 0;
  }
  __device__ __forceinline__ void start(const Args& p, const Deal& deal, int first, int num) {
    left = num;
    num_next = num;
    if (num <= 0) return;
    next.find(deal.before, deal.num_seqs, first);
    look_up(p);
    advance(p, deal);
  }
  // What was next is to be requested.
  __device__ __forceinline__ void advance(const Args& p, const Deal& deal) {
    y = next.at * TOKENS % KV_BLOCK;
    z = block * KV_HEADS + next.kv;
    if (--num_next <= 0) return;
    if (++next.at == next.num) next.next_task(deal.before, deal.num_seqs);
    look_up(p);
  }
  __device__ __forceinline__ void request(const Args& p, const Deal& deal, WarpRing& ring, int lane, u64 policy) {
    if (lane == 0) {
      const u32 bar = ring.full + ring.in * 8, to = ring.data + ring.in * KV_STAGE;
      mbar_expect(bar, KV_STAGE);
#pragma unroll
      for (int x = 0; x < HEAD_DIM; x += 64) box_load(to + x / 64 * (TOKENS * 128), is_value ? *p.value_map : *p.key_map, x, y, z, bar, policy);
    }
    ring.next_in();
    is_value = !is_value;
    if (is_value) {
      if (lane == 0 && num_next > 0) {
        const size_t at = (((size_t)block * KV_HEADS + next.kv) * KV_BLOCK + next.at * TOKENS % KV_BLOCK) * HEAD_DIM;
        bulk_prefetch(p.keys + at, KV_STAGE);
        bulk_prefetch(p.values + at, KV_STAGE);
      }
      return;
    }
    --left;
    if (left > 0) advance(p, deal);
  }
};

__device__ __forceinline__ void load_queries(Queries& to, const Args& p, int seq, int kv, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const u16* q = p.q + (size_t)seq * Q_SIZE + (kv * GROUP + g) * HEAD_DIM + t * 16;
#pragma unroll
  for (int u = 0; u < HEAD_DIM / 32; ++u) {
    const uint4 v = g < GROUP ? ldcg128(q + u / 2 * 64 + u % 2 * 8) : make_uint4(0, 0, 0, 0);
    to.q[u][0] = v.x;
    to.q[u][1] = v.y;
    to.q[u][2] = v.z;
    to.q[u][3] = v.w;
  }
}
__device__ __forceinline__ void load_newest(Queries& to, const Args& p, int seq, int kv, int lane) {
  if (lane >= HEAD_DIM / 8) return;
  const int slot = __ldg(p.slots + seq);
  const size_t at = (((size_t)(slot / KV_BLOCK) * KV_HEADS + kv) * KV_BLOCK + slot % KV_BLOCK) * HEAD_DIM + lane * 8;
  to.key = ldcg128(p.keys + at);
  to.value = ldcg128(p.values + at);
}

// Weighted values of a query, of two neighbouring dimensions, from pieces of what it attends to: their largest score and sum.
struct Sum {
  float m = -INFINITY_F, l = 0;
  float2 v = {0, 0};
  __device__ __forceinline__ void add(float2 value, float largest, float sum) {
    const float top = fmaxf(m, largest), r = exp2f(m - top), f = exp2f(largest - top);
    m = top;
    l = l * r + sum * f;
    v.x = v.x * r + value.x * f;
    v.y = v.y * r + value.y * f;
  }
  __device__ __forceinline__ void store(u16* attended, int i) const { reinterpret_cast<u32*>(attended)[i] = pack2(v.x / l, v.y / l); }
};

// Where a warp's stretches begin, and the task that this cuts: it is from stretch `start` to `end`; none where `end` is 0.
struct Bound { int at, start, end, task; };

// Shared memory: rings | pieces of tasks that the warps before began, but for the first | barriers | bounds | `before` | two words.
constexpr int RINGS = NW * KV_STAGES * KV_STAGE, PIECES = (NW - 1) * PIECE * 4, BARRIERS = NW * KV_STAGES * 8;
constexpr int BOUNDS = (NW + 1) * (int)sizeof(Bound);
static_assert(RINGS + PIECES + BARRIERS + BOUNDS + (MAX_SEQS + 3) * 4 == SHARED, "shared memory as planned");

// Where a warp leaves its piece of a task: that a warp before began; or its last, so that its ring is free.
__device__ __forceinline__ float* piece_of(const Args& p, unsigned char* shared, int warp, bool is_begun) {
  if (!is_begun) return reinterpret_cast<float*>(shared + warp * KV_STAGES * KV_STAGE);
  if (warp == 0) return p.pieces + (size_t)(blockIdx.x * 3 + 2) * PIECE;
  return reinterpret_cast<float*>(shared + RINGS) + (warp - 1) * PIECE;
}

// Adds up the pieces of the tasks that are cut at the CTA's or its warps' bounds.
__device__ __forceinline__ void add_cut(const Args& p, const Deal& deal, unsigned char* shared, const Bound* bounds, int* word) {
  const int tid = threadIdx.x, first = bounds[0].at, last = bounds[NW].at;
  int done = 0;             // up to here
  for (int j = 0; j <= NW; ++j) {
    const Bound cut = bounds[j];
    if (cut.end <= done) continue;
    done = cut.end;
    const bool is_begun = cut.start < first, is_whole = !is_begun && cut.end <= last;
    u16* attended = p.attended + (size_t)cut.task * GROUP * HEAD_DIM;
    float* of_cta = p.pieces + (size_t)(blockIdx.x * 3 + !is_begun) * PIECE;
    for (int i = tid; i < GROUP * HEAD_DIM / 2; i += NT) {
      const int at = i / (HEAD_DIM / 2) * PART, d = i % (HEAD_DIM / 2) * 2;
      Sum sum;
#pragma unroll
      for (int w = 0; w < NW; ++w) {
        const int from = bounds[w].at;
        if (max(from, cut.start) >= min(bounds[w + 1].at, cut.end)) continue;
        const float* piece = piece_of(p, shared, w, from > cut.start) + at;
        const float2 of_all = *reinterpret_cast<const float2*>(piece + HEAD_DIM);
        sum.add(*reinterpret_cast<const float2*>(piece + d), of_all.x, of_all.y);
      }
      if (is_whole) {
        sum.store(attended, i);
      } else {
        __stcg(reinterpret_cast<float2*>(of_cta + at + d), sum.v);
        if (d == 0) __stcg(reinterpret_cast<float2*>(of_cta + at + HEAD_DIM), make_float2(sum.m, sum.l));
      }
    }
    if (is_whole) continue;
    // Whoever comes last adds up what the CTAs have, in order.
    const int from = deal.cta_of(cut.start), to = deal.cta_of(cut.end - 1);
    __threadfence();
    __syncthreads();
    if (tid == 0) *word = atomicAdd(p.counts + from, 1);
    __syncthreads();
    const int num_before = *word;
    __syncthreads();        // the word is free
    if (num_before != to - from) continue;
    __threadfence();
    for (int i = tid; i < GROUP * HEAD_DIM / 2; i += NT) {
      const int at = i / (HEAD_DIM / 2) * PART, d = i % (HEAD_DIM / 2) * 2;
      Sum sum;
#pragma unroll 4
      for (int c = from; c <= to; ++c) {
        const float* piece = p.pieces + (size_t)(c * 3 + (c == from)) * PIECE + at;
        const float2 of_all = __ldcg(reinterpret_cast<const float2*>(piece + HEAD_DIM));
        sum.add(__ldcg(reinterpret_cast<const float2*>(piece + d)), of_all.x, of_all.y);
      }
      sum.store(attended, i);
    }
    if (tid == 0) p.counts[from] = 0;
  }
}

extern "C" __global__ __maxnreg__(REGISTERS) void attend(const u16* q, const u16* keys, const u16* values, const __grid_constant__ TensorMap key_map,
                                                       const __grid_constant__ TensorMap value_map, const int* slots, const int* seq_lens,
                                                       const int* block_table, u16* attended, float* pieces, int* counts, int table_stride,
                                                       int num_seqs) {
  const Args p{q, keys, values, &key_map, &value_map, slots, seq_lens, block_table, attended, pieces, counts, table_stride, num_seqs};
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  u64* bars = reinterpret_cast<u64*>(shared + RINGS + PIECES);
  Bound* bounds = reinterpret_cast<Bound*>(bars + NW * KV_STAGES);  // [NW + 1]
  int* before = reinterpret_cast<int*>(bounds + NW + 1);            // [MAX_SEQS + 1]
  int* words = before + MAX_SEQS + 1;
  WarpRing ring{smem32(shared + warp * KV_STAGES * KV_STAGE), smem32(bars + warp * KV_STAGES)};

  launch_dependents();
  if (lane < KV_STAGES) mbar_init(ring.full + lane * 8, 1);
  mbar_init_fence();
  if (warp == 0) {
    int sum = 0, longest = 0, num_present = 0;
    for (int base = 0; base < num_seqs; base += 32) {
      const int num = base + lane < num_seqs ? (__ldg(seq_lens + base + lane) + TOKENS - 1) / TOKENS : 0;
      int upto = num;       // of the lanes up to this one
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const int other = __shfl_sync(~0u, upto, lane - o & 31);
        if (lane >= o) upto += other;
      }
      if (base + lane < num_seqs) before[base + lane] = sum + upto - num;
      sum += __shfl_sync(~0u, upto, 31);
      longest = max(longest, num);
      num_present += num > 0;
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      longest = max(longest, __shfl_xor_sync(~0u, longest, o));
      num_present += __shfl_xor_sync(~0u, num_present, o);
    }
    if (lane == 0) {
      before[num_seqs] = sum;
      words[0] = longest;
      words[1] = num_present;
    }
  }
  __syncthreads();
  Deal deal;
  deal.start(before, num_seqs, words[0], words[1]);
  const int first_of_cta = deal.first_of_cta(blockIdx.x), last_of_cta = deal.first_of_cta(blockIdx.x + 1);
  const int first = deal.first_of_warp(first_of_cta, last_of_cta, warp), last = deal.first_of_warp(first_of_cta, last_of_cta, warp + 1);

  const u64 policy = evict_first();
  Requests requests;
  requests.start(p, deal, first, last - first);
  int room = KV_STAGES;        // of the ring
  for (; room && requests.left > 0; --room) requests.request(p, deal, ring, lane, policy);
  auto refill = [&]() {
    if (requests.left > 0) requests.request(p, deal, ring, lane, policy);
    else ++room;
  };
  auto mark = [&](int which, int at, const Stretch& s) {
    if (lane == 0) bounds[which] = {at, at - s.at, s.at ? at - s.at + s.num : 0, s.seq * KV_HEADS + s.kv};
  };
  Stretch s{};
  if (first < deal.all) s.find(before, num_seqs, first);
  if (!deal.cuts_no_warp) {
    mark(warp, first, s);
    if (warp == NW - 1) {
      Stretch behind{};
      if (last < deal.all) behind.find(before, num_seqs, last);
      mark(NW, last, behind);
    }
  }
  grid_wait();

  int left = last - first;
  if (left > 0) {
    Queries queries, next_queries;
    load_queries(next_queries, p, s.seq, s.kv, lane);
    for (;;) {
      const int len = __ldg(seq_lens + s.seq), end = min(s.num, s.at + left), begin = s.at;
      left -= end - begin;
      Stretch next = s;
#pragma unroll
      for (int u = 0; u < HEAD_DIM / 32; ++u)
#pragma unroll
        for (int j = 0; j < 4; ++j) queries.q[u][j] = next_queries.q[u][j];
      load_newest(queries, p, s.seq, s.kv, lane);
      if (left > 0) {       // they come while this task is worked on
        next.next_task(before, num_seqs);
        load_queries(next_queries, p, next.seq, next.kv, lane);
      }
      Softmax mine;
      for (; s.at < end; ++s.at) mine.take(queries, ring, s.at * TOKENS, len, len, lane < HEAD_DIM / 8, lane, refill);
      if (g < GROUP) {
        if (end - begin == s.num) {
          u32* to = reinterpret_cast<u32*>(attended + (size_t)s.seq * Q_SIZE + (s.kv * GROUP + g) * HEAD_DIM) + t;
          const float r = 1 / mine.l;
#pragma unroll
          for (int d = 0; d < HEAD_DIM / 8; ++d) to[d * 4] = pack2(mine.o[d][0] * r, mine.o[d][1] * r);
        } else {
          float* to = piece_of(p, shared, warp, begin > 0) + g * PART;
#pragma unroll
          for (int d = 0; d < HEAD_DIM / 8; ++d) *reinterpret_cast<float2*>(to + d * 8 + 2 * t) = make_float2(mine.o[d][0], mine.o[d][1]);
          if (t == 0) *reinterpret_cast<float2*>(to + HEAD_DIM) = make_float2(mine.m, mine.l);
        }
      }
      if (left <= 0) break;
      s = next;
    }
  }
  if (deal.cuts_no_warp || first_of_cta == last_of_cta) return;
  __syncthreads();
  add_cut(p, deal, shared, bounds, words);
}
