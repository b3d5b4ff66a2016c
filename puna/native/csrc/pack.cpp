#include "pack.h"

#include <algorithm>
#include <cstring>

namespace {

// Four bytes from byte `at` of a row of `row_bytes`, zeros beyond its end.
uint32_t word_at(const unsigned char* row, int64_t at, int64_t row_bytes) {
  uint32_t word = 0;
  if (at + 4 <= row_bytes)
    std::memcpy(&word, row + at, 4);
  else if (at < row_bytes)
    std::memcpy(&word, row + at, static_cast<size_t>(row_bytes - at));
  return word;
}

// out[tile, j, n] = make(row 16 tile + n, j), or `filler` for rows that are not there.
template <class Word, class Make>
void pack(const void* x, int64_t num_rows, int64_t row_bytes, int64_t num_words, Word filler,
          void* out, Make make) {
  const auto* rows = static_cast<const unsigned char*>(x);
  auto* to = static_cast<Word*>(out);
  for (int64_t first = 0; first < num_rows; first += TILE) {
    const int here = static_cast<int>(std::min<int64_t>(TILE, num_rows - first));
    for (int64_t j = 0; j < num_words; ++j, to += TILE) {
      for (int n = 0; n < here; ++n) to[n] = make(rows + (first + n) * row_bytes, j);
      for (int n = here; n < TILE; ++n) to[n] = filler;
    }
  }
}

int64_t padded(int64_t cols) { return (cols + PAD - 1) / PAD * PAD; }

}  // namespace

void pack_words(const void* x, int64_t num_rows, int64_t row_bytes, int64_t num_words, void* out) {
  pack(x, num_rows, row_bytes, num_words, uint32_t{0}, out,
       [=](const unsigned char* row, int64_t j) { return word_at(row, 4 * j, row_bytes); });
}

void pack_integers(const void* q, int bits, bool has_min, int64_t num_rows, int64_t num_cols,
                   void* out) {
  if (bits == 8) {
    const uint32_t zero = has_min ? 0 : 0x80808080u;  // q + 128
    pack(q, num_rows, num_cols, padded(num_cols) / 4, zero, out,
         [=](const unsigned char* row, int64_t j) { return zero ^ word_at(row, 4 * j, num_cols); });
    return;
  }
  const uint32_t zero = has_min ? 0 : 0x88888888u;  // q + 8
  pack(q, num_rows, num_cols, padded(num_cols) / 8, zero, out,
       [=](const unsigned char* row, int64_t j) {
         const uint32_t low = word_at(row, 8 * j, num_cols) & 0x0f0f0f0fu;
         const uint32_t high = word_at(row, 8 * j + 4, num_cols) & 0x0f0f0f0fu;
         return zero ^ (low | high << 4);
       });
}

void pack_halves(const void* x, int64_t num_rows, int64_t num_cols, void* out) {
  pack(x, num_rows, 2 * num_cols, num_cols, uint16_t{0}, out,
       [](const unsigned char* row, int64_t j) {
         uint16_t half;
         std::memcpy(&half, row + 2 * j, 2);
         return half;
       });
}
