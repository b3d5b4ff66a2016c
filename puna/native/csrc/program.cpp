#include "program.h"

#include <algorithm>
#include <cmath>

namespace {

// Rows of a GEMM whose results are kept in `Private::y` at a time; a multiple of the register
// tiles.
constexpr int Y_ROWS = 48;
// Rows are cut into pieces of multiples of this, a register tile's.
constexpr int64_t ROW_UNIT = 6;
// Rows that a thread takes for itself in every product, at least: each reads all weights then. With
// two threads 64 are 3 % faster than sharing all rows, more on a busy host (Zen 4, 2026-11); many
// threads have not been measured.
constexpr int GROUP_ROWS = 64;
// Tiles at a time where there is one row, at most, and bytes of weights that make a piece of work
// worth handing out. Long pieces let memory stream (gate and up alternate); short ones at the end
// of a share let the threads end together.
constexpr int SINGLE_TILES = 48;
constexpr int64_t SINGLE_BYTES = 32 * 1024;
constexpr int64_t FIRST_BYTES = 16 * 1024;
// Tiles at a time where there are more rows: the register tile's width (kernels_impl.h).
constexpr int WIDE_TILES = 2;
// Query rows (tokens x heads of one KV head) that attention takes at a time.
constexpr int ATTEND_ROWS = 24;

int64_t tiles_of(const Matrix& w) { return (w.n + TILE - 1) / TILE; }

int64_t tile_bytes(const Matrix& w) {
  const int64_t bits[] = {32, 16, 16, 8, 4};
  return static_cast<int64_t>(w.k) * TILE * bits[w.kind] / 8;
}

int64_t total_tiles(const Linear& linear) {
  int64_t total = 0;
  for (int i = 0; i < linear.num_parts; ++i) total += tiles_of(linear.parts[i]);
  return total;
}

// Tiles that are handed out at a time where there is one row.
int64_t single_grain(int64_t bytes_a_tile) {
  return std::min<int64_t>(SINGLE_TILES, std::max<int64_t>(1, SINGLE_BYTES / bytes_a_tile));
}

// Pieces of [first, last) tiles of one part; `column` is where the part's rows begin in the output.
template <class Work>
void by_part(const Linear& linear, int64_t first, int64_t last, Work work) {
  int64_t begin = 0, column = 0;
  for (int i = 0; i < linear.num_parts; ++i) {
    const Matrix& part = linear.parts[i];
    const int64_t end = begin + tiles_of(part);
    const int64_t from = std::max(first, begin), to = std::min(last, end);
    if (from < to) work(part, static_cast<int>(from - begin), static_cast<int>(to - begin), column);
    begin = end;
    column += part.n;
  }
}

// How a product is cut into pieces of work: `tiles` neighbouring tiles by `rows` rows. Where there
// are rows enough, each thread begins with rows of its own, the same in every product: what it
// wrote is still in its cache when it reads it. All rows of some tiles follow each other, so that
// the weights stay near.
struct Pieces {
  int64_t num_tiles, num_rows;
  int64_t tiles, most;  // a piece's, and how many pieces may be taken together
  int64_t group_rows, rows, row_steps, group_count, count;

  Pieces(int64_t all_tiles, int64_t bytes_a_tile, int all_rows, int rows_at_once, int num_threads)
      : num_tiles(all_tiles),
        num_rows(all_rows),
        tiles(all_rows == 1 ? single_grain(bytes_a_tile) : WIDE_TILES),
        most(all_rows == 1 ? SINGLE_TILES / tiles : 1) {
    const int64_t groups = std::min<int64_t>(num_threads, std::max(1, all_rows / GROUP_ROWS));
    group_rows = (num_rows + groups - 1) / groups;
    row_steps = (group_rows + rows_at_once - 1) / rows_at_once;
    rows = std::min<int64_t>(
        {rows_at_once, group_rows, (group_rows / row_steps + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT});
    row_steps = (group_rows + rows - 1) / rows;
    group_count = (num_tiles + tiles - 1) / tiles * row_steps;
    count = groups * group_count;
  }

  // Floats from one row of results to the next.
  int64_t stride() const { return most * tiles * TILE; }
};

// work(first tile, last tile, first row, last row, is_first) for every piece, shared by the
// threads. is_first: the tiles' other rows follow.
template <class Work>
void share_pieces(Pool& pool, int thread, const Pieces& pieces, Work work) {
  const auto run = [&](int64_t first, int64_t last) {
    const int64_t group_row = first / pieces.group_count * pieces.group_rows;
    const int64_t here = first % pieces.group_count;
    const int64_t tile = here / pieces.row_steps * pieces.tiles;
    const int64_t row = group_row + here % pieces.row_steps * pieces.rows;
    const int64_t end =
        std::min({row + pieces.rows, group_row + pieces.group_rows, pieces.num_rows});
    if (row < end)
      work(tile, std::min(tile + (last - first) * pieces.tiles, pieces.num_tiles),
           static_cast<int>(row), static_cast<int>(end), row == group_row);
  };
  pool.share(thread, pieces.count, 1, run, pieces.most);
}

// Where columns of results lie: row m's at `at` + m * `stride`. Null: not in one place.
struct Place {
  float* at;
  int64_t stride;
};

// Multiply rows [0, num_rows) by all tiles of `linear`, shared by the threads. The results go where
// to.place(column, count) says, or else, row by row, to to.write(row, column, count, values).
template <class Destination>
void project(Machine& machine, int thread, const Linear& linear, const Acts& acts, int num_rows,
             const Destination& to) {
  const int64_t num_tiles = total_tiles(linear);
  const Pieces pieces(num_tiles, tile_bytes(linear.parts[0]), num_rows, Y_ROWS,
                      machine.pool.num_threads());
  float* const y = machine.privates[static_cast<size_t>(thread)].y;
  const int64_t ld = pieces.stride();
  const auto multiply = [&](int64_t first, int64_t last, int m0, int m1, bool is_first) {
    by_part(linear, first, last, [&](const Matrix& part, int t0, int t1, int64_t column) {
      const int count = std::min(t1 * TILE, part.n) - t0 * TILE;
      const int64_t at = column + t0 * TILE;
      const bool is_whole = count == (t1 - t0) * TILE && !linear.bias;
      const Place place = is_whole ? to.place(at, count) : Place{};
      if (place.at) {
        machine.kernels->gemm(&part, t0, t1, &acts, m0, m1, place.at + m0 * place.stride,
                              place.stride, is_first);
        return;
      }
      machine.kernels->gemm(&part, t0, t1, &acts, m0, m1, y, ld, is_first);
      for (int m = m0; m < m1; ++m) {
        float* values = y + (m - m0) * ld;
        if (linear.bias)
          for (int i = 0; i < count; ++i) values[i] += linear.bias[at + i];
        to.write(m, at, count, values);
      }
    });
  };
  share_pieces(machine.pool, thread, pieces, multiply);
}

// With one row memory idles while every thread prepares the activations: let it bring the first
// weights of this thread's share.
void fetch_first(Machine& machine, int thread, const Linear& linear, int num_rows) {
  if (num_rows > 1) return;
  const int64_t grain = single_grain(tile_bytes(linear.parts[0]));
  const int64_t steps = (total_tiles(linear) + grain - 1) / grain;
  const int64_t first = steps * thread / machine.pool.num_threads() * grain;
  by_part(linear, first, first + 1, [&](const Matrix& part, int tile, int, int64_t) {
    const char* at = static_cast<const char*>(part.data) + tile * tile_bytes(part);
    const int64_t count = std::min<int64_t>(FIRST_BYTES, tile_bytes(part));
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(at + i, 0, 2);
  });
}

// The activations that a projection reads: a row of this thread's own, or the shared rows.
// prepare(row, acts, place) fills row `place` of `acts`.
template <class Prepare>
const Acts& prepared(Machine& machine, int thread, const Acts& shared, int num_rows,
                     Prepare prepare) {
  if (num_rows == 1) {
    const Acts& own = machine.privates[static_cast<size_t>(thread)].acts;
    prepare(0, own, 0);
    return own;
  }
  machine.pool.share(thread, num_rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      prepare(static_cast<int>(row), shared, static_cast<int>(row));
  });
  machine.pool.barrier();
  return shared;
}

// Results become the stream's partial; the one before is added to the residual where that is due.
struct ToPartial {
  const Stream& x;
  bool settles;

  Place place(int64_t column, int) const {
    return settles ? Place{} : Place{x.partial_TD + column, x.hidden_size};
  }

  void write(int row, int64_t column, int count, const float* values) const {
    float* partial = x.partial_TD + static_cast<int64_t>(row) * x.hidden_size + column;
    float* residual = x.residual_TD + static_cast<int64_t>(row) * x.hidden_size + column;
    if (settles)
      for (int i = 0; i < count; ++i) residual[i] += partial[i];
    std::copy(values, values + count, partial);
  }
};

// Results are queries, and keys and values behind each other.
struct ToQueriesAndCache {
  float *q_TQ, *kv_TX;
  int64_t q_size, kv_size;

  Place place(int64_t column, int count) const {
    if (column + count <= q_size) return {q_TQ + column, q_size};
    if (column >= q_size) return {kv_TX + (column - q_size), 2 * kv_size};
    return {};
  }

  void write(int row, int64_t column, int count, const float* values) const {
    const int64_t in_q = std::min<int64_t>(std::max<int64_t>(q_size - column, 0), count);
    std::copy(values, values + in_q, q_TQ + row * q_size + column);
    std::copy(values + in_q, values + count, kv_TX + row * 2 * kv_size + (column + in_q - q_size));
  }
};

struct ToLogits {
  float* logits_LV;
  int64_t stride;

  Place place(int64_t column, int) const { return {logits_LV + column, stride}; }

  void write(int row, int64_t column, int count, const float* values) const {
    std::copy(values, values + count, logits_LV + row * stride + column);
  }
};

int64_t num_chunks(int context) { return (context + CONTEXT - 1) / CONTEXT; }

}  // namespace

float* Heads::query(int row, int h) const {
  return q_TQ + (static_cast<int64_t>(row) * num_heads + h) * cache.head_dim;
}

void Heads::rotate(const Kernels& k, int row, const float* head, float* out) const {
  const int64_t angle = static_cast<int64_t>(batch.positions_T[row]) * (cache.head_dim / 2);
  k.rope(head, rope.cos_PE + angle, rope.sin_PE + angle, cache.head_dim, out);
}

void Heads::rotate_query(const Kernels& k, int row, int h, float* out) const {
  rotate(k, row, query(row, h), out);
}

void Heads::place_key_and_value(const Kernels& k, int row, int h, float* own) const {
  const int64_t kv_size = static_cast<int64_t>(cache.num_kv_heads) * cache.head_dim;
  const float* key = kv_TX + row * 2 * kv_size + static_cast<int64_t>(h) * cache.head_dim;
  rotate(k, row, key, own);
  k.store_key(&cache, h, batch.slots_T[row], own);
  k.store_value(&cache, h, batch.slots_T[row], key + kv_size);
}

Machine::Machine(int num_threads, const Kernels* table)
    : pool(num_threads), kernels(table), privates(static_cast<size_t>(num_threads)) {}

void Machine::reserve(int64_t cols, int head_dim) {
  if (cols <= cols_ && head_dim <= head_dim_) return;
  cols_ = std::max(cols_, (cols + PAD - 1) / PAD * PAD);
  head_dim_ = std::max(head_dim_, head_dim);
  const int64_t part_rows = 2 * ATTEND_ROWS * partial_size(head_dim_);
  const int64_t y_size = Y_ROWS * WIDE_TILES * TILE;
  static_assert(Y_ROWS * WIDE_TILES >= 2 * SINGLE_TILES, "a row of gate and of up must fit in y");
  const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t floats[] = {cols_, cols_, y_size, score_size(head_dim_), part_rows};
  const int64_t q32_bytes = cols_ / 32 * static_cast<int64_t>(sizeof(ActBlock<32>));
  const int64_t q16_bytes = cols_ / 16 * static_cast<int64_t>(sizeof(ActBlock<16>));
  int64_t total = 64;
  for (int64_t n : floats) total += padded(4 * n);
  total += padded(2 * cols_) + padded(q32_bytes) + padded(q16_bytes);
  for (Private& own : privates) {
    own.memory.assign(static_cast<size_t>(total), 0);
    unsigned char* at = own.memory.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64;
    const auto take = [&](int64_t bytes) {
      unsigned char* taken = at;
      at += padded(bytes);
      return taken;
    };
    const auto take_floats = [&](int64_t n) { return reinterpret_cast<float*>(take(4 * n)); };
    own.x = take_floats(cols_);
    own.acts.stride = cols_;
    own.acts.f = take_floats(cols_);
    own.y = take_floats(y_size);
    own.scores = take_floats(score_size(head_dim_));
    own.parts = take_floats(part_rows);
    own.acts.b = reinterpret_cast<uint16_t*>(take(2 * cols_));
    own.acts.q32 = reinterpret_cast<ActBlock<32>*>(take(q32_bytes));
    own.acts.q16 = reinterpret_cast<ActBlock<16>*>(take(q16_bytes));
  }
}

int Program::forms(const Linear& linear) const {
  int found = 0;
  for (int i = 0; i < linear.num_parts; ++i) {
    const Matrix& w = linear.parts[i];
    if (w.kind == FLOAT32 || w.kind == FLOAT16)
      found |= AS_FLOAT;
    else if (w.kind == BFLOAT16)
      found |= machine_->kernels->has_bf16_dot ? AS_BF16 : AS_FLOAT;
    else
      found |= w.group % 32 == 0 ? AS_Q32 : AS_Q16;
  }
  return found;
}

void Program::embed(const int32_t* token_ids_T, const Linear& table, const Stream& x) {
  Machine& m = *machine_;
  add([=, &m](int thread) {
    m.pool.share(thread, x.num_tokens, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        float* residual = x.residual_TD + t * x.hidden_size;
        float* partial = x.partial_TD + t * x.hidden_size;
        std::fill(residual, residual + x.hidden_size, 0.0f);
        // Each of several ranks holds a part of the vocabulary, and counts from its first.
        if (token_ids_T[t] >= 0 && token_ids_T[t] < table.parts[0].n)
          m.kernels->row(&table.parts[0], token_ids_T[t], partial);
        else
          std::fill(partial, partial + x.hidden_size, 0.0f);
      }
    });
    m.pool.barrier();
  });
}

void Program::settle() {
  place_heads(false);
  if (!is_unsettled_) return;
  is_unsettled_ = false;
  Machine& m = *machine_;
  const Stream x = unsettled_;
  add([=, &m](int thread) {
    const int64_t count = static_cast<int64_t>(x.num_tokens) * x.hidden_size;
    m.pool.share(thread, count, 1024, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) x.residual_TD[i] += x.partial_TD[i];
    });
    m.pool.barrier();
  });
}

void Program::place_heads(bool is_cache_only) {
  if (!unplaced_.is_due) return;
  unplaced_.is_due = is_cache_only;
  Machine& m = *machine_;
  const Heads all = unplaced_;
  add([=, &m](int thread) {
    const Kernels& k = *m.kernels;
    float* const own = m.privates[static_cast<size_t>(thread)].x;
    const int num_kv_heads = all.cache.num_kv_heads, head_dim = all.cache.head_dim;
    const int heads = num_kv_heads + (is_cache_only ? 0 : all.num_heads);
    const auto place = [&](int row, int h) {
      if (h < num_kv_heads) return all.place_key_and_value(k, row, h, own);
      all.rotate_query(k, row, h - num_kv_heads, own);
      std::copy(own, own + head_dim, all.query(row, h - num_kv_heads));
    };
    const int64_t count = static_cast<int64_t>(all.num_tokens) * heads;
    m.pool.share(thread, count, all.num_tokens == 1 ? 1 : heads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        place(static_cast<int>(i / heads), static_cast<int>(i % heads));
    });
    m.pool.barrier();
  });
}

void Program::qkv(const Stream& x, const Norm& norm, const Linear& linear, const Rope& rope,
                  const Batch& batch, const Cache& cache, float* q_TQ, int num_heads) {
  settle();
  Machine& m = *machine_;
  m.reserve(std::max<int64_t>(x.hidden_size, cache.head_dim), cache.head_dim);
  const Acts shared = scratch_.acts;
  float* const kv_TX = scratch_.kv_TX;
  const int wanted = forms(linear), num_tokens = x.num_tokens, head_dim = cache.head_dim;
  const int64_t q_size = static_cast<int64_t>(num_heads) * head_dim;
  const int64_t kv_size = static_cast<int64_t>(cache.num_kv_heads) * head_dim;
  add([=, &m](int thread) {
    const Kernels& k = *m.kernels;
    float* const own = m.privates[static_cast<size_t>(thread)].x;
    fetch_first(m, thread, linear, num_tokens);
    const Acts& acts = prepared(m, thread, shared, num_tokens, [&](int row, const Acts& a, int at) {
      float* residual = x.residual_TD + static_cast<int64_t>(row) * x.hidden_size;
      k.norm(residual, x.partial_TD + static_cast<int64_t>(row) * x.hidden_size, norm.weight_D,
             norm.eps, x.hidden_size, own, num_tokens == 1 ? nullptr : residual);
      k.convert(own, x.hidden_size, wanted, &a, at);
    });
    project(m, thread, linear, acts, num_tokens, ToQueriesAndCache{q_TQ, kv_TX, q_size, kv_size});
    m.pool.barrier();
  });
  is_unsettled_ = num_tokens == 1;
  unsettled_ = x;
  unplaced_ = {true, rope, batch, cache, q_TQ, scratch_.kv_TX, num_heads, num_tokens};
}

namespace {

// Where attention's work lies. Sequences with one query are cut along their context and leave a
// partial result for each stretch; others are cut into groups of query rows, each of which goes
// through its context by itself. Both add up the same numbers in the same order.
struct AttentionWork {
  const Kernels& k;
  const Batch& batch;
  const Cache& cache;
  const float* q_TQ;
  int num_heads;
  float* attn_part;
  int64_t max_chunks;
  float* attended_TQ;
  const Heads* unplaced;  // or null: queries are rotated, and the cache has their keys and values
  bool places_cache;      // the cache lacks them: there is one query
  Private& own;

  int shared_heads() const { return num_heads / cache.num_kv_heads; }
  int queries(int s) const { return batch.query_start_S1[s + 1] - batch.query_start_S1[s]; }
  int tokens_at_once() const { return std::max(1, ATTEND_ROWS / shared_heads()); }

  int64_t pieces(int s) const {
    const int n = queries(s);
    const int64_t along =
        n == 1 ? num_chunks(batch.seq_lens_S[s]) : (n + tokens_at_once() - 1) / tokens_at_once();
    return along * cache.num_kv_heads;
  }

  float* part(int s, int64_t chunk, int64_t head) const {
    return attn_part + ((s * max_chunks + chunk) * num_heads + head) * partial_size(cache.head_dim);
  }

  const int32_t* table(int s) const {
    return batch.block_table_SM + static_cast<int64_t>(s) * batch.max_blocks;
  }

  void run(int s, int64_t piece) {
    const int h = static_cast<int>(piece % cache.num_kv_heads);
    const int64_t along = piece / cache.num_kv_heads;
    if (queries(s) == 1)
      run_stretch(s, h, along);
    else
      run_rows(s, h, along);
  }

  void run_stretch(int s, int h, int64_t chunk) {
    const int row = batch.query_start_S1[s], shared = shared_heads();
    const int start = static_cast<int>(chunk) * CONTEXT;
    const int visible = std::min(CONTEXT, batch.seq_lens_S[s] - start);
    // Only the last stretch reads the new key and value.
    if (places_cache && start + visible == batch.seq_lens_S[s])
      unplaced->place_key_and_value(k, row, h, own.x);
    for (int first = 0; first < shared; first += ATTEND_ROWS) {
      const int count = std::min(ATTEND_ROWS, shared - first);
      const float* q[ATTEND_ROWS];
      int32_t sees[ATTEND_ROWS];
      for (int r = 0; r < count; ++r) {
        q[r] = query(row, h * shared + first + r, r);
        sees[r] = visible;
      }
      // A single query reads its context once: while one stretch is computed, the next comes
      // nearer.
      const int next_h = h + 1 < cache.num_kv_heads ? h + 1 : 0;
      const int next_start = next_h ? start : start + CONTEXT;
      const bool is_last = next_start + visible > batch.seq_lens_S[s];
      const Stretch next{table(s) + (is_last ? start : next_start) / BLOCK, next_h};
      attend(s, h, start, count, q, sees, is_last || first ? nullptr : &next,
             part(s, chunk, h * shared + first));
    }
  }

  void run_rows(int s, int h, int64_t along) {
    const int shared = shared_heads(), head_dim = cache.head_dim, n = queries(s);
    const int64_t size = partial_size(head_dim);
    const int first = static_cast<int>(along) * tokens_at_once();
    const int num_tokens = std::min(tokens_at_once(), n - first);
    const int row0 = batch.query_start_S1[s] + first;
    const int position0 = batch.seq_lens_S[s] - n + first;
    float *const states = own.parts, *const parts = own.parts + ATTEND_ROWS * size;
    // More query heads share a KV head than are taken at a time: take them in turns.
    for (int g0 = 0; g0 < shared; g0 += ATTEND_ROWS) {
      const int heads = std::min(ATTEND_ROWS, shared - g0), rows = num_tokens * heads;
      const int context = position0 + num_tokens;
      const float* queries[ATTEND_ROWS];
      for (int r = 0; r < rows; ++r)
        queries[r] = query(row0 + r / heads, h * shared + g0 + r % heads, r);
      for (int start = 0; start < context; start += CONTEXT) {
        const float* q[ATTEND_ROWS];
        int32_t sees[ATTEND_ROWS];
        int skipped = 0;  // rows of tokens before this stretch
        for (int r = 0; r < rows; ++r) {
          const int token = r / heads;
          const int visible = std::min(CONTEXT, position0 + token + 1 - start);
          if (visible <= 0) {
            ++skipped;
            continue;
          }
          q[r - skipped] = queries[r];
          sees[r - skipped] = visible;
        }
        attend(s, h, start, rows - skipped, q, sees, nullptr, start ? parts : states);
        for (int r = skipped; start && r < rows; ++r)
          k.fold(states + r * size, parts + (r - skipped) * size, head_dim);
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t head = h * shared + g0 + r % heads;
        k.finish(
            states + r * size, head_dim,
            attended_TQ + ((row0 + r / heads) * static_cast<int64_t>(num_heads) + head) * head_dim);
      }
    }
  }

  // One rotated query, in a place of this thread's for row r where it had not been.
  const float* query(int row, int head, int r) const {
    if (!unplaced) return q_TQ + (static_cast<int64_t>(row) * num_heads + head) * cache.head_dim;
    float* const rotated = own.x + static_cast<int64_t>(r) * cache.head_dim;
    unplaced->rotate_query(k, row, head, rotated);
    return rotated;
  }

  void attend(int s, int h, int start, int rows, const float* const* q, const int32_t* visible,
              const Stretch* next, float* out) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(cache.head_dim));
    k.attend(&cache, h, table(s), start, rows, q, visible, scale, next, own.scores, out);
  }

  // The partial results of a sequence with one query, folded in order, into out[Q].
  void combine(int s, float* out) const {
    const int head_dim = cache.head_dim;
    const int64_t chunks = num_chunks(batch.seq_lens_S[s]);
    for (int h = 0; h < num_heads; ++h) {
      float* state = own.parts;
      std::copy(part(s, 0, h), part(s, 0, h) + partial_size(head_dim), state);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) k.fold(state, part(s, chunk, h), head_dim);
      k.finish(state, head_dim, out + static_cast<int64_t>(h) * head_dim);
    }
  }
};

}  // namespace

void Program::attention(const float* q_TQ, int num_heads, const Batch& batch, const Cache& cache,
                        const Linear& out, const Stream& x) {
  Machine& m = *machine_;
  const int64_t q_size = static_cast<int64_t>(num_heads) * cache.head_dim;
  m.reserve(std::max<int64_t>(q_size, ATTEND_ROWS * cache.head_dim), cache.head_dim);
  const Scratch scratch = scratch_;
  const int wanted = forms(out), num_tokens = x.num_tokens;
  const bool settles = is_unsettled_;
  is_unsettled_ = false;
  // Queries are rotated by who reads them. A single one's key and value are stored so too.
  const bool rotates = unplaced_.is_due && unplaced_.q_TQ == q_TQ;
  if (!rotates || num_tokens > 1) place_heads(rotates);
  const Heads unplaced = unplaced_;
  unplaced_.is_due = false;
  add([=, &m](int thread) {
    const Kernels& k = *m.kernels;
    Private& own = m.privates[static_cast<size_t>(thread)];
    AttentionWork work{k,
                       batch,
                       cache,
                       q_TQ,
                       num_heads,
                       scratch.attn_part,
                       scratch.max_chunks,
                       scratch.attended_TQ,
                       rotates ? &unplaced : nullptr,
                       rotates && num_tokens == 1,
                       own};
    int64_t total = 0;
    for (int s = 0; s < batch.num_seqs; ++s) total += work.pieces(s);
    m.pool.share(thread, total, 1, [&](int64_t piece, int64_t) {
      int s = 0;
      while (piece >= work.pieces(s)) piece -= work.pieces(s++);
      work.run(s, piece);
    });
    fetch_first(m, thread, out, num_tokens);
    m.pool.barrier();
    const Acts& acts =
        prepared(m, thread, scratch.acts, num_tokens, [&](int row, const Acts& a, int at) {
          const int32_t* starts = batch.query_start_S1;
          const int s = static_cast<int>(
              std::upper_bound(starts, starts + batch.num_seqs + 1, row) - starts - 1);
          const float* attended = scratch.attended_TQ + row * q_size;
          if (work.queries(s) == 1) {
            work.combine(s, own.x);
            attended = own.x;
          }
          k.convert(attended, static_cast<int>(q_size), wanted, &a, at);
        });
    project(m, thread, out, acts, num_tokens, ToPartial{x, settles});
    m.pool.barrier();
  });
}

void Program::gate_up(const Stream& x, const Norm& norm, const Linear& linear, float* act_TF) {
  settle();
  Machine& m = *machine_;
  m.reserve(x.hidden_size, 0);
  const Acts shared = scratch_.acts;
  const int wanted = forms(linear), num_tokens = x.num_tokens, ffn = linear.parts[0].n;
  add([=, &m](int thread) {
    const Kernels& k = *m.kernels;
    Private& own = m.privates[static_cast<size_t>(thread)];
    fetch_first(m, thread, linear, num_tokens);
    const Acts& acts = prepared(m, thread, shared, num_tokens, [&](int row, const Acts& a, int at) {
      float* residual = x.residual_TD + static_cast<int64_t>(row) * x.hidden_size;
      k.norm(residual, x.partial_TD + static_cast<int64_t>(row) * x.hidden_size, norm.weight_D,
             norm.eps, x.hidden_size, own.x, num_tokens == 1 ? nullptr : residual);
      k.convert(own.x, x.hidden_size, wanted, &a, at);
    });
    // Gate and up of the same columns are one piece of work.
    const Matrix &gate = linear.parts[0], &up = linear.parts[1];
    const int64_t num_tiles = tiles_of(gate);
    const Pieces pieces(num_tiles, tile_bytes(gate) + tile_bytes(up), num_tokens, Y_ROWS / 2,
                        m.pool.num_threads());
    const int64_t ld = pieces.stride();
    float *const y_gate = own.y, *const y_up = own.y + pieces.rows * ld;
    const auto multiply = [&](int64_t first, int64_t last, int m0, int m1, bool is_first) {
      const int t0 = static_cast<int>(first), t1 = static_cast<int>(last);
      const int column = t0 * TILE, count = std::min(t1 * TILE, ffn) - column;
      const auto result = [&](int row) {
        return act_TF + static_cast<int64_t>(row) * ffn + column;
      };
      k.gemm(&gate, t0, t1, &acts, m0, m1, y_gate, ld, is_first);
      // The results' lines come nearer while `up` is multiplied.
      for (int row = m0; row < m1; ++row)
        for (int i = 0; i < count; i += TILE) __builtin_prefetch(result(row) + i, 1, 3);
      k.gemm(&up, t0, t1, &acts, m0, m1, y_up, ld, is_first);
      for (int row = m0; row < m1; ++row) {
        float *g = y_gate + (row - m0) * ld, *u = y_up + (row - m0) * ld;
        if (linear.bias)
          for (int i = 0; i < count; ++i) {
            g[i] += linear.bias[column + i];
            u[i] += linear.bias[ffn + column + i];
          }
        k.silu_mul(g, u, count, result(row));
      }
    };
    share_pieces(m.pool, thread, pieces, multiply);
    m.pool.barrier();
  });
  is_unsettled_ = num_tokens == 1;
  unsettled_ = x;
}

void Program::down(const float* act_TF, const Linear& linear, const Stream& x) {
  Machine& m = *machine_;
  const int ffn = linear.parts[0].k;
  m.reserve(ffn, 0);
  const Acts shared = scratch_.acts;
  const int wanted = forms(linear), num_tokens = x.num_tokens;
  const bool settles = is_unsettled_;
  is_unsettled_ = false;
  add([=, &m](int thread) {
    fetch_first(m, thread, linear, num_tokens);
    const Acts& acts = prepared(m, thread, shared, num_tokens, [&](int row, const Acts& a, int at) {
      m.kernels->convert(act_TF + static_cast<int64_t>(row) * ffn, ffn, wanted, &a, at);
    });
    project(m, thread, linear, acts, num_tokens, ToPartial{x, settles});
    m.pool.barrier();
  });
}

void Program::head(const Stream& x, const int32_t* rows_L, int num_rows, const Norm& norm,
                   const Linear& linear, float* logits_LV, int64_t stride) {
  settle();
  Machine& m = *machine_;
  m.reserve(x.hidden_size, 0);
  const Acts shared = scratch_.acts;
  const int wanted = forms(linear);
  add([=, &m](int thread) {
    const Kernels& k = *m.kernels;
    float* const own = m.privates[static_cast<size_t>(thread)].x;
    fetch_first(m, thread, linear, num_rows);
    const Acts& acts = prepared(m, thread, shared, num_rows, [&](int row, const Acts& a, int at) {
      const int64_t from = static_cast<int64_t>(rows_L[row]) * x.hidden_size;
      k.norm(x.residual_TD + from, x.partial_TD + from, norm.weight_D, norm.eps, x.hidden_size, own,
             nullptr);
      k.convert(own, x.hidden_size, wanted, &a, at);
    });
    project(m, thread, linear, acts, num_rows, ToLogits{logits_LV, stride});
    m.pool.barrier();
  });
}

void Program::end() { settle(); }

void Program::run() {
  machine_->pool.run([this](int thread) {
    for (const Op& op : ops_) op(thread);
  });
}
