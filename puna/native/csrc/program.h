// A recorded program: the operations of puna/ops/__init__.py over fixed arrays, replayed on a pool.
//
// An operation is a few phases with barriers between; each thread runs all of it. With one row the
// prologue (add, norm, convert) is done by every thread for itself, which costs less than waiting
// for one of them; with more rows they share the rows.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

// The structs below are mirrored in puna/cpu/ops.py.

struct Linear {
  int32_t num_parts;
  Matrix parts[3];    // their rows in order
  const float* bias;  // or null
};

struct Stream {
  float* residual_TD;
  float* partial_TD;
  int32_t num_tokens, hidden_size;
};

struct Norm {
  const float* weight_D;
  float eps;
};

struct Batch {
  const int32_t* positions_T;
  const int32_t* slots_T;
  const int32_t* query_start_S1;
  const int32_t* seq_lens_S;
  const int32_t* block_table_SM;
  int32_t num_seqs, max_blocks;
};

struct Rope {
  const float* cos_PE;
  const float* sin_PE;
};

// A step's heads as qkv leaves them: not rotated, and not in the cache.
struct Heads {
  bool is_due;
  Rope rope;
  Batch batch;
  Cache cache;
  float* q_TQ;
  float* kv_TX;  // keys, then values
  int32_t num_heads, num_tokens;

  float* query(int row, int h) const;
  void rotate_query(const Kernels& k, int row, int h, float* out) const;
  // `own` has room for a head.
  void place_key_and_value(const Kernels& k, int row, int h, float* own) const;

 private:
  void rotate(const Kernels& k, int row, const float* head, float* out) const;
};

// Arrays that operations use between their phases.
struct Scratch {
  Acts acts;
  float* kv_TX;
  float* attended_TQ;
  float* attn_part;  // [S, max_chunks, H, E + 2]
  int32_t max_chunks;
};

// What one thread keeps to itself.
struct Private {
  std::vector<unsigned char> memory;
  Acts acts;      // one row
  float* x;       // a row of floats
  float* y;       // a register tile's results, on their way to an array
  float* scores;  // attention: a register tile's
  float* parts;   // attention: rows x (E + 2), twice
};

// One engine's threads, the instruction set they use, and what each keeps to itself.
class Machine {
 public:
  Machine(int num_threads, const Kernels* kernels);
  // Grow the private memory of the threads for rows of `cols` columns and heads of `head_dim`.
  // Not while a program runs.
  void reserve(int64_t cols, int head_dim);

  Pool pool;
  const Kernels* const kernels;
  std::vector<Private> privates;

 private:
  int64_t cols_ = 0;
  int head_dim_ = 0;
};

class Program {
 public:
  Program(Machine* machine, const Scratch& scratch) : machine_(machine), scratch_(scratch) {}

  void embed(const int32_t* token_ids_T, const Linear& table, const Stream& x);
  void qkv(const Stream& x, const Norm& norm, const Linear& linear, const Rope& rope,
           const Batch& batch, const Cache& cache, float* q_TQ, int num_heads);
  void attention(const float* q_TQ, int num_heads, const Batch& batch, const Cache& cache,
                 const Linear& out, const Stream& x);
  void gate_up(const Stream& x, const Norm& norm, const Linear& linear, float* act_TF);
  void down(const float* act_TF, const Linear& linear, const Stream& x);
  void head(const Stream& x, const int32_t* rows_L, int num_rows, const Norm& norm,
            const Linear& linear, float* logits_LV, int64_t stride);
  // Call once, after the last operation.
  void end();
  void run();

 private:
  typedef std::function<void(int thread)> Op;

  // Do what was put off (below), or the heads alone, or of these only what the cache is to hold.
  void settle();
  void place_heads(bool is_cache_only);
  int forms(const Linear& linear) const;
  void add(Op op) { ops_.push_back(std::move(op)); }

  Machine* machine_;
  Scratch scratch_;
  std::vector<Op> ops_;
  // With one row, residual += partial is put off until nobody reads either: the next operation
  // that writes `partial` does it, column by column.
  bool is_unsettled_ = false;
  Stream unsettled_{};
  // Queries are rotated by attention, where they are read, and stay in q_TQ as they were projected.
  // With one row it stores the key and the value too, which spares a barrier.
  Heads unplaced_{};
};
