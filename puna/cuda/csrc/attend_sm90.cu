// Attention of a decode step over the paged cache on Hopper (sm_90a), as a kernel of its own that is small enough to be resident
// beside those that stream weights: its rings fill while q, k and v are computed, and those of the next product fill while it
// computes, so that memory is busy throughout.
//
// All stretches of TOKENS tokens of all tasks (a KV head of a sequence) are numbered, sequence by sequence and head by head, and
// dealt to the CTAs in equal runs, a CTA's to its warps likewise. Bounds are moved to those of tasks where that costs little;
// where a task is cut the warps' and the CTAs' parts of it are added, in order. No warp waits for another until then.
//
// Each warp has a ring of its own, in which a stretch takes as much room as it has tokens, in eights. The key and value that this step adds are put in place of what was requested too early.
//
// Defined by who compiles it: BF16, HEADS, KV_HEADS, HEAD_DIM (64, 128), KV_BLOCK, MAX_SEQS, KV_EIGHTS (of a warp's ring), SHARED:
// bytes of dynamic shared memory, REGISTERS: most of a thread.
#include "wgmma.cuh"

constexpr int GROUP = HEADS / KV_HEADS, Q_SIZE = HEADS * HEAD_DIM;
static_assert(GROUP <= 8, "the queries of a KV head are the rows of one product");
#include "softmax.cuh"

constexpr int NW = 4;
constexpr int PIECE = GROUP * (HEAD_DIM + 2);       // numbers: weighted values, largest score and sum of each query
static_assert(KV_BLOCK % TOKENS == 0, "a stretch lies in a block");

// A warp's ring of KV_EIGHTS eights of tokens. A stretch's keys, or values, take up to EIGHTS of them, and a barrier. Values behind which
// the next stretch would not begin at a multiple of EIGHTS take some more, so that one copy brings a whole one.
__device__ __forceinline__ int room_of(int num, bool is_value) { return num + (is_value ? num * 2 % EIGHTS : 0); }
struct WarpRing {
  u32 data, full;           // full: barriers [KV_EIGHTS], as many as there may be requests
  int in = 0, out = 0, in_bar = 0, out_bar = 0, room = KV_EIGHTS;
  u32 parity = 0;
  static_assert(EIGHTS == 4 && KV_EIGHTS % EIGHTS == 0 && KV_EIGHTS >= 2 * EIGHTS && KV_EIGHTS <= 32, "whole stretches; a lane for each barrier");
  static __device__ __forceinline__ int wrapped(int n) { return n < KV_EIGHTS ? n : n - KV_EIGHTS; }
  __device__ __forceinline__ void wait() const { mbar_wait(full + out_bar * 8, parity); }
  __device__ __forceinline__ u32 eight(int n) const { return data + wrapped(out + n) * EIGHT; }
  __device__ __forceinline__ void next_out(int num, bool is_value) {
    out = wrapped(out + room_of(num, is_value));
    if (++out_bar == KV_EIGHTS) { out_bar = 0; parity ^= 1; }
  }
  __device__ __forceinline__ void next_in(int num, bool is_value) {
    in = wrapped(in + room_of(num, is_value));
    in_bar = wrapped(in_bar + 1);
    room -= room_of(num, is_value);
  }
};

struct Args {
  const u16* q;             // [num_seqs, Q_SIZE], rotated
  const u16 *keys, *values; // of this layer: [N, KV_HEADS, KV_BLOCK, HEAD_DIM]
  // Of the same: see `CacheMaps`; in boxes of TOKENS and of eight.
  const TensorMap *key_map, *value_map, *eight_keys, *eight_values;
  const int* slots;         // [num_seqs]: where this step's keys and values are
  const int* seq_lens;      // [num_seqs], this step's token included; 0: no sequence
  const int* block_table;   // [num_seqs, table_stride]
  u16* attended;            // [num_seqs, Q_SIZE]
  float* pieces;            // [gridDim.x, 2, PIECE]: of the tasks that are cut at a CTA's ends
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

// How stretches are dealt: evenly, or whole tasks, as many to each, where that is about as even. `before` as above; `longest`: most that a
// KV head has of a sequence; `num_present`: sequences that have some.
struct Deal {
  const int* before;
  int num_seqs, all, num_tasks, num_ctas;       // num_ctas: that have a stretch
  bool cuts_no_cta, cuts_no_warp;     // bounds of CTAs, and of warps, are those of tasks
  __device__ __forceinline__ void start(const int* table, int seqs, int longest, int num_present) {
    before = table;
    num_seqs = seqs;
    all = table[seqs] * KV_HEADS;
    num_tasks = num_present * KV_HEADS;
    num_ctas = max(min((int)gridDim.x, all), 1);
    auto most = [&](int num_parties) { return (num_tasks + num_parties - 1) / num_parties * longest; };
    auto is_even = [&](int num_parties) { return most(num_parties) * num_parties <= all + all / 8; };
    const bool is_dense = table[num_present] == table[seqs];      // those that are absent follow the others
    // What CTAs leave each other costs about as much time as a few stretches.
    cuts_no_cta = is_dense && (is_even(num_ctas) || most(num_ctas) <= 3 * NW);
    cuts_no_warp = cuts_no_cta && is_even(num_ctas * NW);
  }
  // The first stretch of the n-th of num parties' tasks.
  __device__ __forceinline__ int first_of_tasks(int n, int num) const {
    const int task = num_tasks * min(n, num) / num, seq = task / KV_HEADS;
    return task == num_tasks ? all : before[seq] * KV_HEADS + task % KV_HEADS * (before[seq + 1] - before[seq]);
  }
  // Of all the cache's tokens, times the number of CTAs: less than 2^31.
  __device__ __forceinline__ int first_of_cta(int cta) const {
    return cuts_no_cta ? first_of_tasks(cta, num_ctas) : (int)((u32)all * min(cta, num_ctas) / num_ctas);
  }
  // The CTA that has a stretch, where CTAs' bounds may cut.
  __device__ __forceinline__ int cta_of(int n) const { return (int)((((u32)n + 1) * num_ctas - 1) / all); }
  __device__ __forceinline__ int first_of_warp(int first, int last, int warp) const {
    return cuts_no_warp ? first_of_tasks(blockIdx.x * NW + warp, num_ctas * NW) : first + (last - first) * warp / NW;
  }
};

// Of the at-th stretch of a context.
__device__ __forceinline__ int eights_of(int at, int len) { return min((len - at * TOKENS + 7) / 8, EIGHTS); }

// What a warp requests of the cache: keys, then values, of each of its stretches; of the last one of a context the tokens that there are,
// in eights. It looks up one stretch ahead. (To fetch that to the level-2 cache takes the memory's time while it is short, before the
// queries are there: a step 1 to 2 % slower; H200, 2026-11-26.)
struct Requests {
  Stretch next;             // behind the one that is requested
  int left, num_next, block, len;     // left: of it and those behind; block, len: next's, and of its context
  int y, z, eights;         // where it lies in the tensor: the y-th eight of the z-th head of a block; and how many eights it has
  bool is_value = false, is_ready = false;      // is_ready: y, z and eights are known
  __device__ __forceinline__ void look_up(const Args& p) {
    if (num_next <= 0) return;
    block = __ldg(p.block_table + (size_t)next.seq * p.table_stride + next.at * TOKENS / KV_BLOCK);
    len = __ldg(p.seq_lens + next.seq);
  }
  __device__ __forceinline__ void start(const Args& p, const Deal& deal, int first, int num) {
    left = num;
    num_next = num;
    if (num > 0) next.find(deal.before, deal.num_seqs, first);
    look_up(p);
  }
  // What was next is to be requested.
  __device__ __forceinline__ void advance(const Args& p, const Deal& deal) {
    if (is_ready || left <= 0) return;
    is_ready = true;
    y = next.at * TOKENS % KV_BLOCK / 8;
    z = block * KV_HEADS + next.kv;
    eights = eights_of(next.at, len);
    if (--num_next <= 0) return;
    if (++next.at == next.num) next.next_task(deal.before, deal.num_seqs);
    look_up(p);
  }
  __device__ __forceinline__ void request(const Args& p, WarpRing& ring, int lane, u64 policy) {
    if (lane == 0) {
      const u32 bar = ring.full + ring.in_bar * 8, to = ring.data + ring.in * EIGHT;
      mbar_expect(bar, eights * EIGHT);
      if (eights == EIGHTS) {
        box_load_eights(to, is_value ? *p.value_map : *p.key_map, 0, y, z, bar, policy);
      } else {
        const TensorMap& map = is_value ? *p.eight_values : *p.eight_keys;
        for (int n = 0; n < eights; ++n) box_load_eights(ring.data + ring.wrapped(ring.in + n) * EIGHT, map, 0, y + n, z, bar, policy);
      }
    }
    ring.next_in(eights, is_value);
    is_ready = !is_value;
    left -= is_value;
    is_value = !is_value;
  }
  // All that there is room for; but what follows is looked into only where a whole stretch could be requested: that takes a while, and
  // may wait until the warp waits.
  __device__ __forceinline__ void fill(const Args& p, const Deal& deal, WarpRing& ring, int lane, u64 policy) {
    for (; left > 0; request(p, ring, lane, policy)) {
      if (ring.room >= EIGHTS) advance(p, deal);
      if (!is_ready || ring.room < room_of(eights, is_value)) return;
    }
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
__device__ __forceinline__ void load_newest(Queries& to, const Args& p, int slot, int kv, int lane) {
  if (lane >= HEAD_DIM / 8) return;
  const size_t at = (((size_t)(slot / KV_BLOCK) * KV_HEADS + kv) * KV_BLOCK + slot % KV_BLOCK) * HEAD_DIM + lane * 8;
  to.key = ldcg128(p.keys + at);
  to.value = ldcg128(p.values + at);
}

// Shared memory: rings | pieces of tasks that the CTA's warps before began | barriers | `before` | two words.
constexpr int RINGS = NW * KV_EIGHTS * EIGHT, PIECES = (NW - 1) * PIECE * 4, BARRIERS = NW * (KV_EIGHTS + 1) * 8;
static_assert(RINGS + PIECES + BARRIERS + (MAX_SEQS + 3) * 4 == SHARED, "shared memory as planned");

__device__ __forceinline__ void run(const Args& p) {
  unsigned char* shared = shared_memory();
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  float* pieces = reinterpret_cast<float*>(shared + RINGS);
  u64* bars = reinterpret_cast<u64*>(shared + RINGS + PIECES);
  int* before = reinterpret_cast<int*>(bars + NW * (KV_EIGHTS + 1));   // [MAX_SEQS + 1]
  int* words = before + MAX_SEQS + 1;
  WarpRing ring{smem32(shared + warp * KV_EIGHTS * EIGHT), smem32(bars + warp * KV_EIGHTS)};
  const u32 is_put = smem32(bars + NW * KV_EIGHTS);      // barriers: a warp's piece is there

  launch_dependents();
  if (lane < KV_EIGHTS) mbar_init(ring.full + lane * 8, 1);
  if (lane == 0) mbar_init(is_put + warp * 8, 32);
  mbar_init_fence();
  if (warp == 0) {
    int sum = 0, longest = 0, num_present = 0;
    for (int base = 0; base < p.num_seqs; base += 32) {
      const int num = base + lane < p.num_seqs ? (__ldg(p.seq_lens + base + lane) + TOKENS - 1) / TOKENS : 0;
      int upto = num;       // of the lanes up to this one
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const int other = __shfl_sync(~0u, upto, lane - o & 31);
        if (lane >= o) upto += other;
      }
      if (base + lane < p.num_seqs) before[base + lane] = sum + upto - num;
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
      before[p.num_seqs] = sum;
      words[0] = longest;
      words[1] = num_present;
    }
  }
  __syncthreads();
  Deal deal;
  deal.start(before, p.num_seqs, words[0], words[1]);
  const int first_of_cta = deal.first_of_cta(blockIdx.x), last_of_cta = deal.first_of_cta(blockIdx.x + 1);
  const int first = deal.first_of_warp(first_of_cta, last_of_cta, warp), last = deal.first_of_warp(first_of_cta, last_of_cta, warp + 1);

  const u64 policy = evict_first();
  Requests requests;
  requests.start(p, deal, first, last - first);
  requests.fill(p, deal, ring, lane, policy);
  auto refill = [&](int num, bool is_value) {
    ring.room += room_of(num, is_value);
    requests.fill(p, deal, ring, lane, policy);
  };
  int left = last - first, num_read = 0;    // num_read: eights; those of the first ring were requested before the cache had the newest
  // What a task is known by is looked up while the one before is worked on, the first one's before the queries are there.
  Stretch s, next;
  Queries queries, next_queries;
  int len = 0, next_len = 0, slot = 0, next_slot = 0;
  if (left > 0) {
    next.find(before, p.num_seqs, first);
    next_len = __ldg(p.seq_lens + next.seq);
    next_slot = __ldg(p.slots + next.seq);
  }
  grid_wait();
  if (left > 0) {
    load_queries(next_queries, p, next.seq, next.kv, lane);
    load_newest(queries, p, next_slot, next.kv, lane);
  }
  global_async_fence();     // behind those loads

  auto store = [&](const Softmax& sum, const Stretch& s) {
    u32* to = reinterpret_cast<u32*>(p.attended + (size_t)s.seq * Q_SIZE + s.kv * GROUP * HEAD_DIM);
    if constexpr (GROUP == 1) {       // four lanes have all: a lane takes what it stores of them
      u32 pairs[HEAD_DIM / 64];
      sum.result([&](int eight, u32 pair) {
        pair = __shfl_sync(~0u, pair, t);
        if (eight % 8 == g) pairs[eight / 8] = pair;
      });
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 64; ++i) to[i * 32 + lane] = pairs[i];
    } else {
      sum.result([&](int eight, u32 pair) {
        if (g < GROUP) to[g * (HEAD_DIM / 2) + eight * 4 + t] = pair;
      });
    }
  };
  // Of the first of the CTA's warps that have pieces of a task: adds theirs to its own.
  auto collect = [&](Softmax& sum, const Stretch& s, int start) {
    const int end = start + s.num;
    for (int w = warp + 1, from = last; w < NW && from < end; ++w) {
      const int to = deal.first_of_warp(first_of_cta, last_of_cta, w + 1);
      if (from < to) {
        mbar_wait(is_put + w * 8, 0);
        sum.add<false>(pieces + (w - 1) * PIECE, lane);
      }
      from = to;
    }
    const bool begins = start >= first_of_cta;
    if (begins && end <= last_of_cta) return store(sum, s);
    // Whoever comes last adds up what the CTAs have, in order.
    sum.put<true>(p.pieces + (size_t)(blockIdx.x * 2 + begins) * PIECE, lane);
    const int from = deal.cta_of(start), to = deal.cta_of(end - 1);
    __threadfence();
    __syncwarp();
    const int num_before = __shfl_sync(~0u, lane ? 0 : atomicAdd(p.counts + from, 1), 0);
    if (num_before != to - from) return;
    __threadfence();
    Softmax total;
#pragma unroll 2
    for (int c = from; c <= to; ++c) total.add<true>(p.pieces + (size_t)(c * 2 + (c == from)) * PIECE, lane);
    store(total, s);
    if (lane == 0) p.counts[from] = 0;
  };

  if (left > 0) {
    for (int at = first;;) {
      s = next;
      len = next_len;
      slot = next_slot;
      const int end = min(s.num, s.at + left), start = at - s.at;
      left -= end - s.at;
      at = start + s.num;
#pragma unroll
      for (int u = 0; u < HEAD_DIM / 32; ++u)
#pragma unroll
        for (int j = 0; j < 4; ++j) queries.q[u][j] = next_queries.q[u][j];
      if (num_read && num_read < KV_EIGHTS) load_newest(queries, p, slot, s.kv, lane);
      if (left > 0) {
        next.next_task(before, p.num_seqs);
        next_len = __ldg(p.seq_lens + next.seq);
        next_slot = __ldg(p.slots + next.seq);
        load_queries(next_queries, p, next.seq, next.kv, lane);
      }
      Softmax mine;
      const bool is_whole = s.at == 0 && end == s.num, is_begun = max(start, first_of_cta) < first;
      for (; s.at < end; ++s.at) {
        const int num = eights_of(s.at, len);
        requests.advance(p, deal);
        mine.take(queries, ring, num, s.at * TOKENS, len, len, num_read < KV_EIGHTS, lane, refill);
        num_read += 2 * num;
      }
      mine.finish();
      if (is_whole) {
        store(mine, s);
      } else if (is_begun) {
        mine.put<false>(pieces + (warp - 1) * PIECE, lane);
        mbar_arrive(is_put + warp * 8);
      } else {
        collect(mine, s, start);
      }
      if (left <= 0) break;
    }
  }
  for (int seq = blockIdx.x; seq < p.num_seqs; seq += gridDim.x)        // zeros for who has no context
    if (before[seq] == before[seq + 1])
      for (int i = tid; i < Q_SIZE / 2; i += NW * 32) reinterpret_cast<u32*>(p.attended + (size_t)seq * Q_SIZE)[i] = 0;
}

extern "C" __global__ __maxnreg__(REGISTERS) void attend(const u16* q, const u16* keys, const u16* values,
                                                               const __grid_constant__ TensorMap key_map,
                                                               const __grid_constant__ TensorMap value_map,
                                                               const __grid_constant__ TensorMap eight_keys,
                                                               const __grid_constant__ TensorMap eight_values, const int* slots,
                                                               const int* seq_lens, const int* block_table, u16* attended, float* pieces,
                                                               int* counts, int table_stride, int num_seqs) {
  Args p{};
  p.q = q; p.keys = keys; p.values = values; p.key_map = &key_map; p.value_map = &value_map; p.eight_keys = &eight_keys;
  p.eight_values = &eight_values; p.slots = slots; p.seq_lens = seq_lens; p.block_table = block_table; p.attended = attended;
  p.pieces = pieces; p.counts = counts; p.table_stride = table_stride; p.num_seqs = num_seqs;
  run(p);
}
