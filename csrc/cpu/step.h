// How values are multiplied, and the sizes that this gives panels and tiles: tiles.h.
#pragma once

#include "vec.h"

namespace internvl::ISA {

#ifdef __AVXVNNI__
constexpr int kVectors = 4;  // of a panel: that of 8-bit weights, which has 32 rows everywhere
constexpr int kTileRows = 3;
#else
constexpr int kVectors = 2;
#ifdef __AVX512F__
constexpr int kTileRows = 14;  // 28 of 32 registers hold sums
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif
#endif
constexpr int kPanel = kVectors * kWidth;

// How T is multiplied: kDepth columns of C a step, Word what a panel holds of them, Sum and Value what
// the products are added up in, chain() the steps of one chain of sums, which a block of x and of a panel
// spans. MKL has shorter ones where C is small.
template <typename T>
struct Step {
  typedef Vec Sum;
  typedef float Value;
  static constexpr int kDepth = 1;
  static int64_t chain(int64_t steps) { return steps > 1024 ? 256 : 32; }
  typedef T Word;
  static Vec weights(const Word* from) { return load(from); }
  static uint32_t pack(const T* from) {
    const float wide = widen(*from);
    uint32_t word;
    std::memcpy(&word, &wide, sizeof word);
    return word;
  }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return sum + x * w; }

  static float widen(float value) { return value; }
  static float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
};

#ifdef __AVX512BF16__
template <>
struct Step<bf16> {
  typedef Vec Sum;
  typedef float Value;
  static constexpr int kDepth = 2;
  static int64_t chain(int64_t) { return 320; }
  struct Word {
    bf16 pair[2];
  };
  static Vec weights(const Word* from) { return load(reinterpret_cast<const float*>(from)); }
  static uint32_t pack(const bf16* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
  }
  static Vec multiply_add(Vec sum, Vec x, Vec w) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Unsigned values of x by signed ones of a weight. Sums of int32 are exact up to 66,000 columns.
template <>
struct Step<Int8> {
  typedef IntVec Sum;
  typedef int32_t Value;
  static constexpr int kDepth = 4;
  static int64_t chain(int64_t) { return 800; }
  struct Word {
    int8_t four[4];
  };
  static IntVec weights(const Word* from) { return load(reinterpret_cast<const int32_t*>(from)); }
  static uint32_t pack(const Int8* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
  }
  static IntVec multiply_add(IntVec sum, IntVec x, IntVec w) {
#ifdef __AVX512VNNI__
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#endif
  }
};
#endif

}  // namespace internvl::ISA
