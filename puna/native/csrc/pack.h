// Packing of matrices into layout "tiles" (puna/layout.py), and nothing else about building.
// All functions work on whole rows, from the first of a tile on; rows beyond num_rows are zero.
#pragma once

#include <cstdint>

#include "kernels.h"

// Rows of `row_bytes` bytes into tiles of `num_words` four-byte words a row.
void pack_words(const void* x, int64_t num_rows, int64_t row_bytes, int64_t num_words, void* out);

// Integers, one a byte: signed without a minimum, unsigned with one.
void pack_integers(const void* q, int bits, bool has_min, int64_t num_rows, int64_t num_cols,
                   void* out);

// Two-byte numbers [num_rows, num_cols], each a word of its own: [tiles, num_cols, 16].
void pack_halves(const void* x, int64_t num_rows, int64_t num_cols, void* out);
