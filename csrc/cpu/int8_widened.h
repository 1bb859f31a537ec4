// Linear layers over weights of 8 bits without instructions that multiply bytes: a chain of a panel is
// widened to fp32 in cache and multiplied as one of linear.h is; x is not rounded.
#pragma once

#include "int8_panels.h"

namespace internvl::ISA {

// Byte i of each word at the top of it, the rest 0: 2**24 times its value.
template <int I>
inline IntVec top_byte(IntVec words) {
#ifdef __AVX2__
  constexpr auto kPlaces = [](int word) { return static_cast<int>((word + I) * 0x1000000u | 0x808080u); };
#endif
#if defined(__AVX512F__)
  const __m512i places = _mm512_set4_epi32(kPlaces(12), kPlaces(8), kPlaces(4), kPlaces(0));
  return (IntVec)_mm512_maskz_shuffle_epi8(~0ull, (__m512i)words, places);
#elif defined(__AVX2__)
  const __m256i places = _mm256_setr_epi32(kPlaces(0), kPlaces(4), kPlaces(8), kPlaces(12), kPlaces(0),
                                           kPlaces(4), kPlaces(8), kPlaces(12));
  return (IntVec)_mm256_shuffle_epi8((__m256i)words, places);
#else
  return (IntVec)(((Bits)words << (24 - 8 * I)) & 0xff000000u);
#endif
}

template <typename T>
struct Int8Form {
  typedef float Product;
  static constexpr int kRows = kInt8Rows;
  static constexpr int64_t kBlockTiles = 2 * kTilesInL2;  // one chain of them: widening costs half
  static constexpr bool kInPlace = false;
  static constexpr int64_t kLongestChain = 256;
  static constexpr int64_t kAhead = 3072;  // bytes: what memory delivers in its latency

  Rows<const T> x;
  Int8Panels weight;

  Int8Form(Rows<const T> x, const Int8Weight& weight, void*) : x(x), weight{weight} {}
  static int64_t scratch(int64_t) { return kLongestChain * kPanel * sizeof(float); }
  static int64_t shared(int64_t) { return 0; }

  void pack(int64_t, int64_t first, int64_t rows, uint32_t* tile, char*) const {
    pack_tile(x, first, rows, weight.cols, tile);
    auto* values = reinterpret_cast<float*>(tile);
    for_each_vec(rows * weight.cols, [&](int64_t i, auto count) {
      store(load(values + i, count) * 0x1p-24f, values + i, count);  // see top_byte()
    });
  }
  const char* address(int64_t panel, int64_t from) const {
    return reinterpret_cast<const char*>(weight.step(panel, from / kInt8Columns));
  }
  static int64_t bytes(int64_t steps) { return steps * kInt8Rows; }

  // Calls body(column, 2**24 * kWidth rows of it), four times a vector.
  template <typename Body>
  static void widen(const Int8* from, Body body) {
    const IntVec words = load(reinterpret_cast<const int32_t*>(from));
    body(0, __builtin_convertvector(top_byte<0>(words), Vec));
    body(1, __builtin_convertvector(top_byte<1>(words), Vec));
    body(2, __builtin_convertvector(top_byte<2>(words), Vec));
    body(3, __builtin_convertvector(top_byte<3>(words), Vec));
  }

  // Columns [from, from + count) of kPanel rows of a panel: part `part` of it.
  const float* read(int64_t panel, int part, int64_t from, int64_t count, char* scratch) const {
    const Int8* step = weight.step(panel, from / kInt8Columns);
    auto* const to = reinterpret_cast<float*>(scratch);
    for (int64_t column = 0; column < count; column += kInt8Columns) {
      if (part == 0) ask(step + kAhead);
#pragma GCC unroll 2
      for (int r = 0; r < kPanel; r += kWidth)
        widen(step + (part * kPanel + r) * kInt8Columns, [&](int i, Vec v) __attribute__((always_inline)) {
          store(v, to + (column + i) * kPanel + r);
        });
      step += kInt8Rows * kInt8Columns;
    }
    return to;
  }
  static void ask(const Int8* step) {
    __builtin_prefetch(step);
    __builtin_prefetch(step + 64);
  }

  // A whole panel by a tile of few rows, widened in registers. The sums are those of multiply_tile, but
  // two chains of one row run side by side: additions that wait for each other are half as fast.
  static constexpr int kFewRows = kWidth < 8 ? 1 : 3;
  void multiply_few(const uint32_t* tile, int64_t rows, int64_t panel, float* sums) const {
    const auto* x = reinterpret_cast<const float*>(tile);
    const int64_t chain = Step<float>::chain(weight.cols);
    for (int64_t from = 0; from < weight.cols;) {
      const int64_t left = weight.cols - from;
      const bool two = rows == 1 && left >= 2 * chain;
      const auto multiply = two         ? &Int8Form::multiply_rows<1, 2>
                            : rows == 1 ? &Int8Form::multiply_rows<1, 1>
                            : rows == 2 ? &Int8Form::multiply_rows<2, 1>
                                        : &Int8Form::multiply_rows<3, 1>;
      (this->*multiply)(x + from * rows, panel, sums, from, smaller(chain, left));
      from += two ? 2 * chain : chain;
    }
  }

  // Columns [from, from + CHAINS * count) of the product, in CHAINS chains.
  template <int ROWS, int CHAINS>
  void multiply_rows(const float* x, int64_t panel, float* sums, int64_t from, int64_t count) const {
    constexpr int kVecs = kInt8Rows / kWidth;
    Vec acc[CHAINS][ROWS][kVecs] = {};
    const Int8* step = weight.step(panel, from / kInt8Columns);
    const auto columns = [&](int64_t column, int wanted) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int chain = 0; chain < CHAINS; ++chain) {
        const Int8* weights = step + chain * count * kInt8Rows;
        const float* values = x + (chain * count + column) * ROWS;
        // Behind the first of two chains lies the second: what comes then is the next pair's second.
        const bool ends = CHAINS == 2 && chain == 0 && column * kInt8Rows + kAhead >= count * kInt8Rows;
        ask(weights + kAhead + (ends ? 2 * count * kInt8Rows : 0));
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j)
          widen(weights + j * kWidth * kInt8Columns, [&](int i, Vec v) __attribute__((always_inline)) {
#pragma GCC unroll 3
            for (int r = 0; r < ROWS; ++r)
              if (i < wanted) acc[chain][r][j] += values[i * ROWS + r] * v;
          });
      }
      step += kInt8Rows * kInt8Columns;
    };
    int64_t column = 0;
    for (; column + kInt8Columns <= count; column += kInt8Columns) columns(column, kInt8Columns);
    if (column < count) columns(column, count - column);
#pragma GCC unroll 2
    for (int chain = 0; chain < CHAINS; ++chain)
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j)
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; ++r) {
          float* sum = sums + (j * kWidth / kPanel * ROWS + r) * kPanel + j * kWidth % kPanel;
          store(from + chain == 0 ? acc[chain][r][j] : load(sum) + acc[chain][r][j], sum);
        }
  }

  // Sums of the weights' bytes times their scales.
  float* settle(float* sums, int64_t panel, int64_t, int64_t rows) const {
    float* at = sums;
    for (int64_t col = panel * kRows; col < (panel + 1) * kRows; col += kPanel)
      for (int64_t r = 0; r < rows; ++r, at += kPanel)
        weight.for_each_vec_of_panel(col, [&](int64_t c, auto count) {
          store(load(at + c) * load(weight.scales + col + c, count), at + c);
        });
    return sums;
  }
};

}  // namespace internvl::ISA
