// Vectors of float as wide as the instruction set, loaded from and stored to float or bfloat16.
//
// They are the vector extensions of gcc and clang: ordinary operators, no intrinsics but one. Everything
// is in namespace ISA, and no template of the standard library is used here or in an operator: the
// linker keeps one copy of a shared function, perhaps the one that this processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../rows.h"

namespace internvl::ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;  // SSE2 and NEON
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef double WideVec __attribute__((vector_size(8 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kWidth)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline IntVec load(const int32_t* from) {
  IntVec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(IntVec v, int32_t* to) { std::memcpy(to, &v, sizeof v); }

// Of a bfloat16 each.
inline Vec widen(HalfBits half) {
#if defined(__AVX512F__)  // of __builtin_convertvector gcc 12 makes five instructions
  return (Vec)((Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
#elif defined(__AVX2__)
  return (Vec)((Bits)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
  return (Vec)(__builtin_convertvector(half, Bits) << 16);
#endif
}

inline Vec load(const bf16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
  return widen(half);
}

// The nearest bfloat16, ties to even, in the low halves; NaN stays NaN.
inline Bits rounded_bits(Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = (Bits)(v != v);
  return (is_nan & 0x7fc0u) | (~is_nan & rounded);
}

inline HalfBits to_bf16(Vec v) {
#ifdef __AVX512BF16__
  return (HalfBits)_mm512_cvtneps_pbh((__m512)v);  // flushes subnormals, below 1.2e-38
#else
  return __builtin_convertvector(rounded_bits(v), HalfBits);
#endif
}

inline void store(Vec v, float* to) { std::memcpy(to, &v, sizeof v); }
inline void store(Vec v, bf16* to) {
  const HalfBits half = to_bf16(v);
  std::memcpy(to, &half, sizeof half);
}

// v as it is after a store to T.
template <typename T>
inline Vec round_to(Vec v);
template <>
inline Vec round_to<float>(Vec v) {
  return v;
}
template <>
inline Vec round_to<bf16>(Vec v) {
#ifdef __AVX512BF16__
  return widen(to_bf16(v));
#else
  return (Vec)(rounded_bits(v) << 16);
#endif
}

// Stores v and returns what was stored.
inline Vec store_rounded(Vec v, float* to) {
  store(v, to);
  return v;
}
inline Vec store_rounded(Vec v, bf16* to) {
  const HalfBits half = to_bf16(v);
  std::memcpy(to, &half, sizeof half);
  return widen(half);
}

// The first `count` elements only; the rest of a loaded vector is 0.
template <typename T>
inline auto load(const T* from, int64_t count) {
  T padded[kWidth] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}
template <typename T>
inline void store(Vec v, T* to, int64_t count) {
  T padded[kWidth];
  store(v, padded);
  std::memcpy(to, padded, count * sizeof(T));
}

struct Full {};  // a count that is kWidth, known when compiling
template <typename T>
inline auto load(const T* from, Full) {
  return load(from);
}
template <typename T>
inline void store(Vec v, T* to, Full) {
  store(v, to);
}

template <typename T>
inline Vec store_rounded(Vec v, T* to, Full) {
  return store_rounded(v, to);
}
template <typename T>
inline Vec store_rounded(Vec v, T* to, int64_t count) {
  T padded[kWidth];
  const Vec rounded = store_rounded(v, padded);
  std::memcpy(to, padded, count * sizeof(T));
  return rounded;
}

// The first `count` elements of v, then 0.
inline Vec first(Vec v, Full) { return v; }
inline Vec first(Vec v, int64_t count) {
  Vec some = {};
  std::memcpy(&some, &v, count * sizeof(float));
  return some;
}

// Calls body(start, count) for every vector of a row; the last count may be smaller than kWidth.
template <typename Body>
inline void for_each_vec(int64_t cols, Body body) {
  int64_t c = 0;
  for (; c + kWidth <= cols; c += kWidth) body(c, Full{});
  if (c < cols) body(c, cols - c);
}

// The same with body(start, count, chain), for sums: chain counts 0, 1, 2, 3 and is known when compiling,
// so that a Sum stays in registers.
template <typename Body>
inline void for_each_vec_in_chains(int64_t cols, Body body) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= cols; c += 4 * kWidth) {
    body(c, Full{}, 0);
    body(c + kWidth, Full{}, 1);
    body(c + 2 * kWidth, Full{}, 2);
    body(c + 3 * kWidth, Full{}, 3);
  }
  for_each_vec(cols - c, [&](int64_t rest, auto count) { body(c + rest, count, 0); });
}

// A running sum with four independent chains, so that additions overlap and none has many terms.
struct Sum {
  Vec chains[4] = {};

  double total() const {
    WideVec lanes = __builtin_convertvector((chains[0] + chains[1]) + (chains[2] + chains[3]), WideVec);
    double sums[kWidth];
    std::memcpy(sums, &lanes, sizeof sums);
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }

  // The same in float: where it is called once for every few vectors.
  float nearly() const {
    const Vec lanes = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    float sums[kWidth];
    std::memcpy(sums, &lanes, sizeof sums);
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }
};

// e**x to 1 unit in the last place (Cephes' expf); arguments beyond float's range are clamped.
inline Vec exp(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x;  // comparisons are false for NaN, which passes through
  x = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec shift = x - x + 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  const Vec n = (x * 1.44269504088896341f + shift) - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Vec)((__builtin_convertvector(n, IntVec) + 127) << 23);
}

// 2**x of x up to 0, by a polynomial of 2**r - 1 for r in [-1/2, 1/2], coefficients from the highest on;
// 0 below -127 and of -infinity, NaN of NaN.
template <int N>
inline Vec exp2_by(const float (&coefficients)[N], Vec x) {
#ifdef __AVX512F__
  const __m512 n = _mm512_maskz_roundscale_ps(0xffff, (__m512)x, 8);  // to the nearest integer
  const Vec r = x - (Vec)n;  // NaN of -infinity, of which scalef makes 0
#else
  const Vec bounded = x < -127.0f ? Vec{} - 127.0f : x;
  const Vec shift = bounded - bounded + 12582912.0f;
  const Vec n = (bounded + shift) - shift;
  const Vec r = bounded - n;
#endif
  Vec p = Vec{} + coefficients[0];
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) p = p * r + coefficients[i];
  p = p * r + 1.0f;
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, n);
#else
  return p * (Vec)((__builtin_convertvector(n, IntVec) + 127) << 23);
#endif
}

// 2**x to 1 unit in the last place of a float.
inline Vec exp2(Vec x) {
  constexpr float kCoefficients[] = {1.5403530393e-4f, 1.3333558146e-3f, 9.6181291076e-3f,
                                     5.5504108665e-2f, 2.4022650696e-1f, 6.9314718056e-1f};
  return exp2_by(kCoefficients, x);
}

// 2**x for a store to T: to 2.9e-6 for bfloat16, a thousandth of its rounding (Remez' minimax).
template <typename T>
inline Vec exp2_for(Vec x) {
  constexpr float kCoefficients[] = {9.58285e-3f, 5.590642e-2f, 2.4024099e-1f, 6.9312419e-1f};
  return sizeof(T) < sizeof(float) ? exp2_by(kCoefficients, x) : exp2(x);
}

}  // namespace internvl::ISA
