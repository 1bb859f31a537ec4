// How an instruction set multiplies weights in 4 bits with activations in 8: what linear_int4.h is built
// from. The layout of the weights: kernels/_int4.py.
//
// A step is 8 columns. A lane of a vector holds a row of the panel: 4 bytes, two columns each. The halves
// of bytes, 0 to 15, meet x as unsigned times signed bytes where there are such products; that a half n
// means n - 8 is put right by the sum of x. Sums of a group are integers: exact, and so the same on every
// processor.
#pragma once

#include "tiles.h"

namespace internvl::ISA {

constexpr int kInt4Panel = 32;  // rows of a panel
constexpr int kInt4Step = 8;    // columns of a step
constexpr int kInt4Bytes = kInt4Panel * kInt4Step / 2;

// Rows of a tile of x. With more, the sums of groups in fp32 find no room in the registers beside those
// of products, two vectors of each a row: 14 % slower.
#if defined(__AVX512F__) || defined(__AVXVNNI__)
constexpr int kInt4Rows = 6;
#else
constexpr int kInt4Rows = 4;
#endif

typedef int16_t Shorts __attribute__((vector_size(4 * kWidth)));

// Sums of products over at most kSpan steps, added to what begin() is given. add() takes the part k of the weights of a
// step and the word k of x, k < kWords, in all lanes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

struct Int4Products {
  static constexpr int kWords = 2, kSpan = 16;
  IntVec sums;

  void begin(IntVec before) { sums = before; }
  void add(IntVec weights, IntVec x) {
#ifdef __AVX512VNNI__
    sums = (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)x);
#else
    sums = (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)x);
#endif
  }
  IntVec total() const { return sums; }
};

#elif defined(__AVX2__)

struct Int4Products {
  static constexpr int kWords = 2, kSpan = 4;  // 8 times 2 * 15 * 127 fit into 16 bits
  IntVec before;
  Shorts sums;

  void begin(IntVec from) {
    before = from;
    sums = Shorts{};
  }
#ifdef __AVX512F__
  void add(IntVec weights, IntVec x) {
    sums += (Shorts)_mm512_maskz_maddubs_epi16(~0u, (__m512i)weights, (__m512i)x);
  }
  IntVec total() const {
    const Shorts ones = Shorts{} + 1;
    return before + (IntVec)_mm512_maskz_madd_epi16(0xffff, (__m512i)sums, (__m512i)ones);
  }
#else
  void add(IntVec weights, IntVec x) {
    sums += (Shorts)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
  }
  IntVec total() const {
    const Shorts ones = Shorts{} + 1;
    return before + (IntVec)_mm256_madd_epi16((__m256i)sums, (__m256i)ones);
  }
#endif
};

#else

struct Int4Products {
  static constexpr int kWords = 4, kSpan = 4;  // 16 times 15 * 127 fit into 16 bits
  IntVec before;
  Shorts sums;

  void begin(IntVec from) {
    before = from;
    sums = Shorts{};
  }
  void add(IntVec weights, IntVec x) { sums += (Shorts)weights * (Shorts)x; }
  IntVec total() const { return before + ((IntVec)((Bits)sums << 16) >> 16) + ((IntVec)sums >> 16); }
};

#endif

// Part k of the weights of a step, by whole bytes or, where x comes in pairs, by every second byte.
inline IntVec int4_part(IntVec weights, int k) {
  const Bits bits = (Bits)weights;
  if (Int4Products::kWords == 2) return (IntVec)((k ? bits >> 4 : bits) & 0x0f0f0f0fu);
  return (IntVec)((bits >> (4 * (k / 2) + 8 * (k % 2))) & 0x000f000fu);
}

// Word k of the 8 values of x in a step.
inline uint32_t int4_word(const int8_t* x, int k) {
  uint32_t word;
  if (Int4Products::kWords == 2) {
    std::memcpy(&word, x + 4 * k, sizeof word);
    return word;
  }
  const int at = 4 * (k / 2) + k % 2;
  return (static_cast<uint32_t>(x[at]) & 0xffffu) | static_cast<uint32_t>(x[at + 2]) << 16;
}

inline IntVec load_int(const void* from) {
  IntVec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Of a half-precision number each.
inline Vec load_half(const uint16_t* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)half);
#else
  const Bits bits = __builtin_convertvector(half, Bits);
  const Vec size = (Vec)((bits & 0x7fffu) << 13) * 0x1p112f;  // finite: kernels/_int4.py
  return (Vec)((Bits)size | (bits & 0x8000u) << 16);
#endif
}

}  // namespace internvl::ISA
