#include "pack.h"

#include <algorithm>
#include <cstring>

namespace {

// out[tile, j, n] = row 16 tile + n, element j; elements beyond the rows' end are `filler`.
template <class Element, class Change>
void transpose(const Element* x, int64_t num_rows, int64_t num_cols, int64_t out_cols,
               Element filler, Element* out, Change change) {
  for (int64_t tile = 0; tile * TILE < num_rows; ++tile) {
    Element* at = out + tile * out_cols * TILE;
    const int64_t first = tile * TILE, rows = std::min<int64_t>(TILE, num_rows - first);
    const Element* row = x + first * num_cols;
    int64_t j = 0;
    if (rows == TILE)
      for (; j < num_cols; ++j)
        for (int n = 0; n < TILE; ++n) at[j * TILE + n] = change(row[n * num_cols + j]);
    for (; j < out_cols; ++j)
      for (int n = 0; n < TILE; ++n)
        at[j * TILE + n] =
            n < rows && j < num_cols ? change(row[n * num_cols + j]) : filler;
  }
}

// Four (or two) neighbouring columns as one element, where a row's bytes are a whole number of them.
uint32_t load32(const unsigned char* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// `size` bytes from byte `at` of a row of `row_bytes`, zeros beyond its end.
uint32_t load32_part(const unsigned char* row, int64_t at, int64_t row_bytes) {
  uint32_t x = 0;
  if (at < row_bytes) std::memcpy(&x, row + at, static_cast<size_t>(std::min<int64_t>(4, row_bytes - at)));
  return x;
}

// make(row pointer or null, j) for every unit j of every row, in the order of the layout.
template <class Make>
void pack_units(const unsigned char* x, int64_t num_rows, int64_t row_bytes, int64_t units,
                uint32_t* out, Make make) {
  for (int64_t first = 0; first < num_rows; first += TILE) {
    for (int64_t j = 0; j < units; ++j)
      for (int n = 0; n < TILE; ++n) {
        const int64_t row = first + n;
        *out++ = make(row < num_rows ? x + row * row_bytes : nullptr, j);
      }
  }
}

int64_t padded(int64_t cols) { return (cols + PAD - 1) / PAD * PAD; }

}  // namespace

void pack_dense(const void* x, MatrixKind kind, int64_t num_rows, int64_t num_cols, void* out) {
  if (kind == FLOAT32) {
    transpose(static_cast<const uint32_t*>(x), num_rows, num_cols, num_cols, uint32_t{0},
              static_cast<uint32_t*>(out), [](uint32_t v) { return v; });
    return;
  }
  const int64_t row_bytes = 2 * num_cols, whole = row_bytes / 4;
  pack_units(static_cast<const unsigned char*>(x), num_rows, row_bytes, (num_cols + 1) / 2,
             static_cast<uint32_t*>(out), [=](const unsigned char* row, int64_t j) {
               if (!row) return uint32_t{0};
               return j < whole ? load32(row + 4 * j) : load32_part(row, 4 * j, row_bytes);
             });
}

void pack_integers(const void* q, int bits, bool has_min, int64_t num_rows, int64_t num_cols,
                   uint8_t* out) {
  const auto* bytes = static_cast<const unsigned char*>(q);
  auto* units = reinterpret_cast<uint32_t*>(out);
  if (bits == 8) {
    const uint32_t flip = has_min ? 0 : 0x80808080u;  // q + 128
    const int64_t whole = num_cols / 4;
    pack_units(bytes, num_rows, num_cols, padded(num_cols) / 4, units,
               [=](const unsigned char* row, int64_t j) {
                 if (!row) return flip;
                 return flip ^ (j < whole ? load32(row + 4 * j) : load32_part(row, 4 * j, num_cols));
               });
    return;
  }
  const uint32_t flip = has_min ? 0 : 0x88888888u;  // q + 8
  const int64_t whole = num_cols / 8;
  pack_units(bytes, num_rows, num_cols, padded(num_cols) / 8, units,
             [=](const unsigned char* row, int64_t j) {
               if (!row) return flip;
               const bool is_whole = j < whole;
               const uint32_t a = is_whole ? load32(row + 8 * j) : load32_part(row, 8 * j, num_cols);
               const uint32_t b =
                   is_whole ? load32(row + 8 * j + 4) : load32_part(row, 8 * j + 4, num_cols);
               return flip ^ ((a & 0x0f0f0f0fu) | (b & 0x0f0f0f0fu) << 4);
             });
}

void pack_scales(const void* x, int size, int64_t num_rows, int64_t num_groups, void* out) {
  if (size == 4)
    transpose(static_cast<const uint32_t*>(x), num_rows, num_groups, num_groups, uint32_t{0},
              static_cast<uint32_t*>(out), [](uint32_t v) { return v; });
  else
    transpose(static_cast<const uint16_t*>(x), num_rows, num_groups, num_groups, uint16_t{0},
              static_cast<uint16_t*>(out), [](uint16_t v) { return v; });
}
