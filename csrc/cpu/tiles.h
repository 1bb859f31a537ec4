// Products of packed matrices on the CPU: what linear.h and attention.h are built from.
//
// The right side is packed in panels of kPanel columns: (steps, kPanel) words. A step is what one
// instruction multiplies in a lane: two bf16 values (vdpbf16ps), four of 8 bits (vpdpbusd), else one
// value. The left side is packed in tiles of at most kTileRows rows: (steps, rows) words. The sums of a
// tile and a panel fill the registers; each step loads the panel's vectors and broadcasts the tile's words.
#pragma once

#include "step.h"

namespace internvl::ISA {

inline int64_t parts_of(int64_t total, int64_t size) { return (total + size - 1) / size; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// `total` things in `parts` of nearly the same size.
struct Split {
  int64_t total, parts;

  int64_t start(int64_t part) const {
    return part * (total / parts) + smaller(part, total % parts);
  }
  int64_t size(int64_t part) const { return total / parts + (part < total % parts); }
};

#ifdef __AVX512F__
// Transposes words: to[j * stride + i] = word `first` + j of row i for i < rows, 0 for other i below 16,
// and j < 16. Every intrinsic takes all lanes; without a mask gcc 12 warns of what its own header leaves
// uninitialised.
template <typename T>
void transpose_words(const T* const* from, int64_t first, int64_t rows, void* to, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i)
    a[i] = i < rows ? _mm512_loadu_si512(from[i] + first * Step<T>::kDepth) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_epi32(0xffff, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_maskz_unpacklo_epi64(0xff, b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(0xff, b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_maskz_shuffle_i32x4(0xffff, a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_maskz_shuffle_i32x4(0xffff, a[i + j], a[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    a[j] = _mm512_maskz_shuffle_i32x4(0xffff, b[j], b[j + 8], 0x88);
    a[j + 8] = _mm512_maskz_shuffle_i32x4(0xffff, b[j], b[j + 8], 0xdd);
  }
  for (int j = 0; j < 16; ++j) {
    _mm512_storeu_si512(static_cast<uint32_t*>(to) + j * stride, a[j]);
  }
}
#endif

// Whether a word is what lies in memory: 32 bits, not a bf16 to be widened.
template <typename T>
constexpr bool kWordsInMemory = Step<T>::kDepth * sizeof(T) == sizeof(uint32_t);

// Packs `rows` rows of the right side's transpose, `stride` apart, as the columns of one panel: (steps,
// kPanel) words; absent rows and columns are 0.
template <typename T>
void pack_panel(const T* from, int64_t stride, int64_t rows, int64_t cols,
                typename Step<T>::Word* to) {
  constexpr int64_t kDepth = Step<T>::kDepth;
  const int64_t whole = cols / kDepth, steps = parts_of(cols, kDepth);
  if (rows < kPanel || whole < steps)
    std::memset(static_cast<void*>(to), 0, steps * kPanel * sizeof(*to));
  const T* row[kPanel];
  for (int64_t r = 0; r < rows; ++r) row[r] = from + r * stride;
  int64_t step = 0;
#ifdef __AVX512F__
  if (kWordsInMemory<T>)
    for (; step + 16 <= whole; step += 16)
      for (int64_t r = 0; r < rows; r += 16)
        transpose_words(row + r, step, smaller(16, rows - r), to + step * kPanel + r, kPanel);
#endif
  for (; step < steps; ++step)
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(to + step * kPanel + r, row[r] + step * kDepth,
                  smaller(kDepth, cols - step * kDepth) * sizeof(T));
}

// Packs `rows` rows of x, from row `first` on: (steps, rows) words.
template <typename T>
void pack_tile(Rows<const T> x, int64_t first, int64_t rows, int64_t cols, uint32_t* tile) {
  using S = Step<T>;
  const int64_t whole = cols / S::kDepth;
  const T* row[kTileRows];
  for (int64_t r = 0; r < rows; ++r) row[r] = x[first + r];
  int64_t step = 0;
#ifdef __AVX512F__
  // Each step writes 16 words, of which the next overwrites what is beyond `rows`: so not the last.
  if (kWordsInMemory<T>)
    for (; step + 16 < whole; step += 16) transpose_words(row, step, rows, tile + step * rows, rows);
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = step; i < whole; ++i) tile[i * rows + r] = S::pack(row[r] + i * S::kDepth);
    if (whole * S::kDepth < cols) {
      const T last[S::kDepth] = {row[r][cols - 1]};
      tile[whole * rows + r] = S::pack(last);
    }
  }
}

// Adds the product of `steps` steps of a tile of x (steps, ROWS) and a panel to sums (ROWS, kPanel), or
// writes it there if `first`. On the way it asks for the weights at `next`: a cache line every four
// steps or, where STREAM, as many as it reads.
template <typename T, int ROWS, bool STREAM>
void multiply_tile(const uint32_t* x, const typename Step<T>::Word* panel,
                   typename Step<T>::Value* sums, int64_t steps, bool first, const char* next) {
  using S = Step<T>;
  using Sum = typename S::Sum;
  constexpr int kStepBytes = kPanel * sizeof(typename S::Word);
  Sum acc[ROWS][kVectors];
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      acc[r][i] = Sum{};
      __builtin_prefetch(sums + r * kPanel + i * kWidth, 1);
    }
  const auto one_step = [&](int64_t step) __attribute__((always_inline)) {
    Sum w[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) w[i] = S::weights(panel + step * kPanel + i * kWidth);
    if (STREAM) {
      __builtin_prefetch(next + step * kStepBytes);
      if (kStepBytes > 64) __builtin_prefetch(next + step * kStepBytes + 64);
    }
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
      const Sum word = (Sum)(x[step * ROWS + r] + Bits{});
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) acc[r][i] = S::multiply_add(acc[r][i], word, w[i]);
    }
  };
  int64_t step = 0;
  for (; step + 4 <= steps; step += 4) {
    if (!STREAM) __builtin_prefetch(next + step * 16, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) one_step(step + i);
  }
  for (; step < steps; ++step) one_step(step);
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      auto* sum = sums + r * kPanel + i * kWidth;
      store(first ? acc[r][i] : load(sum) + acc[r][i], sum);
    }
}

// multiply_tile for tiles of `rows` rows.
template <typename T>
using MultiplyTile = void (*)(const uint32_t*, const typename Step<T>::Word*,
                              typename Step<T>::Value*, int64_t, bool, const char*);
template <typename T, bool STREAM>
MultiplyTile<T> multiply_tile_of(int64_t rows) {
#define INTERNVL_ROWS(n) multiply_tile<T, n, STREAM>
  static constexpr MultiplyTile<T> kBy[] = {
      nullptr,          INTERNVL_ROWS(1), INTERNVL_ROWS(2),  INTERNVL_ROWS(3),
#ifndef __AVXVNNI__
      INTERNVL_ROWS(4), INTERNVL_ROWS(5), INTERNVL_ROWS(6),
#endif
#ifdef __AVX512F__
      INTERNVL_ROWS(7), INTERNVL_ROWS(8), INTERNVL_ROWS(9),  INTERNVL_ROWS(10),
      INTERNVL_ROWS(11), INTERNVL_ROWS(12), INTERNVL_ROWS(13), INTERNVL_ROWS(14),
#endif
  };
#undef INTERNVL_ROWS
  return kBy[rows];
}

}  // namespace internvl::ISA
