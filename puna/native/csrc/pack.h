// Packing of matrices into layout "tiles" (puna/layout.py), and nothing else about building.
// All functions work on whole rows, from the first of a tile on; rows beyond num_rows are zero.
#pragma once

#include <cstdint>

#include "kernels.h"

// Rows of float32, float16 or bfloat16 (MatrixKind), `ld` elements apart.
void pack_dense(const void* x, MatrixKind kind, int64_t num_rows, int64_t num_cols, void* out);

// Integers, one a byte: signed without minimum, unsigned with one.
void pack_integers(const void* q, int bits, bool has_min, int64_t num_rows, int64_t num_cols,
                   uint8_t* out);

// Scales or minima [num_rows, num_groups] of `size` bytes each.
void pack_scales(const void* x, int size, int64_t num_rows, int64_t num_groups, void* out);
