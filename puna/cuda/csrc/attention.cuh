// Attention of a decode step, at the end of the kernel that computes queries, keys and values: who works on what, which blocks of
// the cache are requested when, and the softmax over them.
#pragma once
#include "stream.cuh"
#include "fresh.cuh"

static_assert(GROUP <= 8, "the queries of a KV head are the rows of one product");
constexpr int MAX_SPLITS = 16, MIN_SPLIT = 256;
static_assert(KV_STAGE <= STAGE, "a stage of keys fits");

// A task of attention: a KV head and a part of the sequence's context, whose length depends on the context alone. Its stretches
// of TOKENS tokens are dealt to eight parties, each of which sums up alone; what the parties have is then added in order. A task
// belongs to `width` warps, each of which plays one party or several, one after the other: as many warps as leave no CTA
// without a task, so the bits do not depend on it.
struct Task {
  int id, kv, start, end, party, at, split, num_splits;     // at: the next token of the party's
  __device__ __forceinline__ bool find(int len, int first_party) {
    const int part = split_len(len);
    num_splits = (len + part - 1) / part;
    if (id >= num_splits * KV_HEADS) return false;
    split = id / KV_HEADS;
    kv = id % KV_HEADS;
    start = split * part;
    end = min(len, start + part);
    begin(first_party);
    return true;
  }
  __device__ __forceinline__ void begin(int which) {
    party = which;
    at = start + which * TOKENS;
  }
  static __device__ __forceinline__ int split_len(int len) {
    int part = MIN_SPLIT;
    while (part * MAX_SPLITS < len) part *= 2;
    return part;
  }
  static __device__ __forceinline__ int count(int len) {
    const int part = split_len(len);
    return (len + part - 1) / part * KV_HEADS;
  }
};

// Who of a CTA's warps works on which task: groups of `width` warps.
struct Team {
  int width, group, index, first_id, stride, len;           // len: of the context
  __device__ __forceinline__ void form(const Args& p, int warp) {
    len = __ldg(p.seq_lens);
    width = Task::count(len) > gridDim.x ? NW / 2 : NW;
    group = warp / width;
    index = warp % width;
    first_id = blockIdx.x + group * gridDim.x;
    stride = NW / width * gridDim.x;
  }
  __device__ __forceinline__ void sync() const {
    named_barrier(1 + group, width * 32);
  }
};

// What a warp requests of the cache: keys, then values, of each of its stretches, of all its tasks in order.
struct CachedTokens {
  Task task;
  Team team;
  bool more = false, is_value = false;
  int base = 0, blocks = 0;   // blocks: of the task's blocks from the base-th on, one a lane
  __device__ __forceinline__ void start(const Args& p, int warp, int lane) {
    team.form(p, warp);
    task.id = team.first_id;
    find(p, lane);
    prefetch(p, lane);
  }
  __device__ __forceinline__ void find(const Args& p, int lane) {
    for (;; task.id += team.stride) {
      more = task.find(team.len, team.index);
      if (!more) return;
      if (task.at < task.end) return load_blocks(p, 0, lane);
    }
  }
  __device__ __forceinline__ void load_blocks(const Args& p, int first, int lane) {
    base = first;
    const int at = task.start + (base + lane) * KV_BLOCK;
    blocks = at < task.end ? __ldg(p.block_table + at / KV_BLOCK) : 0;
  }
  __device__ __forceinline__ size_t offset(int block, int at) const {
    return (((size_t)block * KV_HEADS + task.kv) * KV_BLOCK + at % KV_BLOCK) * HEAD_DIM;
  }
  // They are requested last and needed at once then: from the level-2 cache they come sooner.
  __device__ __forceinline__ void prefetch(const Args& p, int lane) {
    if (!more) return;
    const int at = task.start + lane * TOKENS, block = __shfl_sync(~0u, blocks, lane * TOKENS / KV_BLOCK);
    if (lane >= MIN_SPLIT / TOKENS || lane % team.width != team.index || at >= task.end) return;
    bulk_prefetch(p.keys + offset(block, at), TOKENS * HEAD_DIM * 2);
    bulk_prefetch(p.values + offset(block, at), TOKENS * HEAD_DIM * 2);
  }
  template <class R>
  __device__ __forceinline__ void request(const Args& p, R& ring, int lane, u64 policy) {
    const int nth = (task.at - task.start) / KV_BLOCK;
    if (nth < base || nth >= base + 32) load_blocks(p, nth / 32 * 32, lane);
    const int block = __shfl_sync(~0u, blocks, nth - base);
    if (lane == 0) {
      const u32 bar = ring.full + ring.in * 8, to = ring.data + ring.in * STAGE;
      mbar_expect(bar, KV_STAGE);
      box_load_eights(to, is_value ? *p.value_map : *p.key_map, 0, task.at % KV_BLOCK / 8, block * KV_HEADS + task.kv, bar, policy);
    }
    ring.next_in();
    is_value = !is_value;
    if (is_value) return;
    task.at += PARTIES * TOKENS;
    if (task.at < task.end) return;
    task.begin(task.party + team.width);
    if (task.party < PARTIES && task.at < task.end) return;
    task.id += team.stride;
    find(p, lane);
  }
};

// A warp's part of its team's tasks. `merge` [PARTIES][GROUP][HEAD_DIM + 2] is the team's own.
template <class R, class Refill>
__device__ __forceinline__ void attend(const Args& p, R& ring, const Team& team, float* merge, int* word, u32 tag, Refill refill) {
  const int lane = threadIdx.x & 31, tid = team.index * 32 + lane, num_threads = team.width * 32;
  WholeStretches<R> stretches{ring};
  Task task;
  for (task.id = team.first_id; task.find(team.len, team.index); task.id += team.stride) {
    const int len = team.len;
    const int newest = task.end == len ? (len - 1 - task.start) / TOKENS % PARTIES : -1;    // the party that meets the new token
    const bool has_new = newest % team.width == team.index;
    const int parties = min(PARTIES, (task.end - task.start + TOKENS - 1) / TOKENS);     // that have a stretch
    Fresh fresh;
    if (task.party < parties) fresh.poll(p.fresh, p.error, task.kv, has_new && lane < HEAD_DIM / 8, tag, lane);
    team.sync();            // `merge` is free
    for (; task.party < parties; task.begin(task.party + team.width)) {
      Softmax mine;
      for (; task.at < task.end; task.at += PARTIES * TOKENS)
        mine.take(fresh, stretches, EIGHTS, task.at, task.end, len, has_new, lane, [&](int, bool) { refill(); });
      mine.finish();
      float* to = merge + task.party * GROUP * (HEAD_DIM + 2);
      mine.each(lane, [&](float v, int head, int d) { to[head * (HEAD_DIM + 2) + d] = v; });
      mine.each_sum(lane, [&](float top, float sum, int head) {
        to[head * (HEAD_DIM + 2) + HEAD_DIM] = top;
        to[head * (HEAD_DIM + 2) + HEAD_DIM + 1] = sum;
      });
    }
    team.sync();
    // A thread has two dimensions of a head.
    constexpr int PAIRS = HEAD_DIM / 2, PART = HEAD_DIM + 2;
    float* part = p.part + task.kv * (MAX_SPLITS * GROUP * PART);
    u32* attended = reinterpret_cast<u32*>(p.attended + task.kv * GROUP * HEAD_DIM);
    for (int i = tid; i < GROUP * PAIRS; i += num_threads) {
      const int h = i / PAIRS, d = i % PAIRS * 2;
      float m = -INFINITY_F, sum = 0;
      float2 v = make_float2(0, 0);
#pragma unroll
      for (int j = 0; j < PARTIES; ++j)
        if (j < parties) m = fmaxf(m, merge[(j * GROUP + h) * PART + HEAD_DIM]);
#pragma unroll
      for (int j = 0; j < PARTIES; ++j) {
        if (j >= parties) continue;
        const float* from = merge + (j * GROUP + h) * PART;
        const float f = exp2f(from[HEAD_DIM] - m);
        const float2 o = *reinterpret_cast<const float2*>(from + d);
        sum += f * from[HEAD_DIM + 1];
        v.x += f * o.x;
        v.y += f * o.y;
      }
      if (task.num_splits == 1) {
        attended[i] = pack2(v.x / sum, v.y / sum);
      } else {
        float* to = part + (size_t)(task.split * GROUP + h) * PART;
        __stcg(reinterpret_cast<float2*>(to + d), make_float2(v.x / sum, v.y / sum));
        if (d == 0) __stcg(to + HEAD_DIM, m + log2f(sum));
      }
    }
    if (task.num_splits == 1) continue;
    // Whoever comes last adds up all parts, in order.
    __threadfence();
    team.sync();
    if (tid == 0) *word = atomicAdd(p.split_count + task.kv, 1);
    team.sync();
    if (*word != task.num_splits - 1) continue;
    __threadfence();
    for (int i = tid; i < GROUP * PAIRS; i += num_threads) {
      const float* from = part + (size_t)(i / PAIRS) * PART;
      constexpr int STEP = GROUP * PART;
      float scores[MAX_SPLITS], m = -INFINITY_F, sum = 0;       // all loads at once
      float2 values[MAX_SPLITS], v = make_float2(0, 0);
#pragma unroll
      for (int j = 0; j < MAX_SPLITS; ++j) {
        const bool is_there = j < task.num_splits;
        scores[j] = is_there ? __ldcg(from + j * STEP + HEAD_DIM) : -INFINITY_F;
        values[j] = is_there ? __ldcg(reinterpret_cast<const float2*>(from + j * STEP + i % PAIRS * 2)) : make_float2(0, 0);
      }
#pragma unroll
      for (int j = 0; j < MAX_SPLITS; ++j) m = fmaxf(m, scores[j]);
#pragma unroll
      for (int j = 0; j < MAX_SPLITS; ++j) {
        const float f = exp2f(scores[j] - m);
        sum += f;
        v.x += f * values[j].x;
        v.y += f * values[j].y;
      }
      attended[i] = pack2(v.x / sum, v.y / sum);
    }
    if (tid == 0) p.split_count[task.kv] = 0;
  }
}

