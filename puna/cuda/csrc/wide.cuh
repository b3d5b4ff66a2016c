// Products of 8 to 64 tokens with wgmma: instructions between the CTAs of a cluster, what lies where, and who does what.
#pragma once
#include "cluster.cuh"
#include "stream.cuh"
#include "wgmma.cuh"

constexpr int MAX_CTAS = 144;                       // of a product's grid
constexpr int STRIP = 16, STRIPS = 4;               // rows of weights that are one copy; of a tile
constexpr int COLUMNS = 64;                         // of a stage
constexpr int STRIP_BYTES = STRIP * COLUMNS * 2, W_STAGE = STRIPS * STRIP_BYTES, X_STAGE = ROWS * COLUMNS * 2;
constexpr int BLOCKS = ROWS / 8;                    // of eight tokens
constexpr int WIDE_THREADS = 16 * 32;
constexpr int EPILOGUE = 8, WEIGHTS = 12;           // first warps of the roles; those before compute
constexpr int MAX_STAGES = 24, MAX_SHARED = 227 * 1024;

// Shared memory of a product: stages of weights, the input (all of the CTA's chunks where there is room, else a ring), the sums
// received from the cluster, barriers, a few words.
constexpr int SOURCES = 2 * CLUSTER;                  // warpgroups of the cluster, each with a part of the columns
constexpr int RECEIVED = STRIPS / CLUSTER * SOURCES * BLOCKS * 512;     // [STRIPS / CLUSTER][SOURCES][BLOCKS][32] float4
__device__ constexpr int rest(int x_stages) { return RECEIVED + 1024 + ROWS * 4 + (2 * MAX_STAGES + 2 * x_stages + 10) * 8; }
__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
template <int K>
struct Wide {
  static constexpr int ALL = K / COLUMNS, MOST = (ALL + CLUSTER - 1) / CLUSTER;       // chunks: of all CTAs, of one
  static constexpr bool IS_RESIDENT = MAX_SHARED - rest(MOST) - MOST * X_STAGE >= 8 * W_STAGE;
  static constexpr int X_STAGES = IS_RESIDENT ? MOST : least(16, (MAX_SHARED - rest(16) - 10 * W_STAGE) / X_STAGE);
  static constexpr int STAGES = least(MAX_STAGES, (MAX_SHARED - rest(X_STAGES) - X_STAGES * X_STAGE) / W_STAGE);
  static constexpr int TOTAL = STAGES * W_STAGE + X_STAGES * X_STAGE + rest(X_STAGES);
  static constexpr int TILES = IS_RESIDENT ? 1 : 2;     // that are computed together: the input is copied once for them
  // Barriers.
  static constexpr int W_FULL = 0, W_EMPTY = STAGES, X_FULL = 2 * STAGES, X_EMPTY = X_FULL + X_STAGES, SUMS_FULL = X_EMPTY + X_STAGES,
                       SUMS_EMPTY = SUMS_FULL + 2, NUM_BARRIERS = SUMS_EMPTY + 8;
  static_assert(K % COLUMNS == 0, "whole chunks");
  static_assert(CLUSTER == 2, "two strips of a tile are a CTA's to finish");
};

// n things in as few parts as have at most `most`, about equal: where part i begins.
struct Parts {
  int n, num;
  __device__ __forceinline__ Parts(int n, int most) : n(n), num((n + most - 1) / most) {}
  __device__ __forceinline__ int begin(int i) const { return n * i / num; }
};

// Stages of a ring in order, by any step.
template <int STAGES>
struct Turn {
  int at = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next(int step = 1) {
    at += step;
    if (at >= STAGES) { at -= STAGES; parity ^= 1; }
  }
};
