// What a linear layer does to its finished sums: kernels/linear.py.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "linear_call.h"
#include "tiles.h"

namespace internvl::ISA {

// The exact GELU, x * Phi(x). For small results of the negative tail to be right, it comes from
// Q(z) = 1 - Phi(z), z = |x|: 1 + erf(x / sqrt(2)) would cancel there.
#ifdef __AVX512F__

// Taylor's polynomials of Q in 16 segments that cover [0, 6), looked up by one permutation a
// coefficient: half the time of an exponential and two divisions. Error below 2e-8; Q is 0 from 6 on.
struct Gelu {
  static constexpr int kDegree = 6;
  static constexpr float kSegment = 0.375f;
  float coefficients[kDegree + 1][16];

  Gelu() {  // Q^(n)(c) = (-1)^n He_(n-1)(c) * density(c), He the Hermite polynomials
    for (int i = 0; i < 16; ++i) {
      const double c = (i + 0.5) * kSegment, density = 0.39894228040143268 * __builtin_exp(-c * c / 2);
      double he = 1.0, before = 0.0, scale = 1.0;
      coefficients[0][i] = static_cast<float>(0.5 * __builtin_erfc(c * 0.70710678118654752));
      for (int n = 1; n <= kDegree; ++n) {
        scale *= -kSegment / n;
        coefficients[n][i] = static_cast<float>(scale * he * density);
        const double next = c * he - (n - 1) * before;
        before = he;
        he = next;
      }
    }
  }

  Vec operator()(Vec x) const {
    const Vec t = (x < 0.0f ? -x : x) * (1.0f / kSegment);
    const IntVec segment = __builtin_convertvector(t, IntVec);  // beyond 15 its low bits count
    const Vec r = t - __builtin_convertvector(segment, Vec) - 0.5f;
    const auto coefficient = [&](int n) __attribute__((always_inline)) {
      // All lanes; without a mask gcc 12 warns of what its own header leaves uninitialised.
      return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)segment, (__m512)load(coefficients[n]));
    };
    Vec q = coefficient(kDegree);
#pragma GCC unroll 6
    for (int n = kDegree - 1; n >= 0; --n) q = q * r + coefficient(n);
    q = t < 16.0f ? q : Vec{};
    return x * (x < 0.0f ? q : 1.0f - q);
  }
};

#else

// erfc by the Chebyshev fit of Press et al., Numerical Recipes, section 6.2: relative error 1.2e-7.
struct Gelu {
  Vec operator()(Vec x) const {
    Vec z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
    z = z < 10.0f ? z : Vec{} + 10.0f;  // z * z must not overflow; Q is 0 from there on
    const Vec t = 1.0f / (1.0f + 0.5f * z);
    Vec p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    Vec q = 0.5f * t * exp(p * t - 1.26551223f - z * z);
    q = z < 10.0f ? q : Vec{};
    return x * (x < 0.0f ? q : 1.0f - q);
  }
};

#endif

// Computed at the first call: before it, the processor may not have this instruction set.
inline const Gelu& the_gelu() {
  static const Gelu function;
  return function;
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// x / 2 * (1 + tanh(u)) is x * sigmoid(2 u), which loses nothing in the negative tail.
inline Vec gelu_tanh(Vec x) {
  const Vec u2 = x * (1.5957691216057308f + 0.071354816272600248f * (x * x));
  return x / (1.0f + exp(-u2));
}

inline Vec gelu_quick(Vec x) { return x / (1.0f + exp(-1.702f * x)); }

// Where the results of a block of rows and one panel of columns go, and what joins them there.
template <typename T>
struct Output {
  const T* bias;           // of all F features, or null
  Rows<const T> residual;  // of all rows; its data is null for none
  T* y;                    // (rows, width)
  int64_t width;           // F, or F / 2 with SwiGLU
  Epilogue epilogue;
};

// Writes columns [col, col + count) of one row, count a number of elements or Full. sums: the products
// of these columns; ups: with SwiGLU those of the columns `width` further on.
template <typename T, typename Count>
inline void finish_vec(const Output<T>& out, const Gelu& gelu, const float* sums, const float* ups,
                       int64_t row, int64_t col, Count count) {
  Vec v = load(sums);
  if (out.bias) v += load(out.bias + col, count);
  if (out.epilogue == Epilogue::gelu) v = gelu(v);
  if (out.epilogue == Epilogue::gelu_tanh) v = gelu_tanh(v);
  if (out.epilogue == Epilogue::gelu_quick) v = gelu_quick(v);
  if (out.epilogue == Epilogue::swiglu) {
    Vec up = load(ups);
    if (out.bias) up += load(out.bias + out.width + col, count);
    v = silu(v) * up;
  }
  if (out.residual.data) v += load(out.residual[row] + col, count);
  store(v, out.y + row * out.width + col, count);
}

// Writes a block of rows of the panel that starts at column `col`. sums, ups: (rows, PANEL).
template <int PANEL = kPanel, typename T>
void finish_panel(const Output<T>& out, const float* sums, const float* ups, int64_t first_row,
                  int64_t rows, int64_t col) {
  const Gelu gelu = the_gelu();  // a copy, which no store can change: it stays in registers
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < PANEL && col + c < out.width; c += kWidth) {
      const int64_t at = r * PANEL + c, left = out.width - col - c;
      if (left >= kWidth)
        finish_vec(out, gelu, sums + at, ups + at, first_row + r, col + c, Full{});
      else
        finish_vec(out, gelu, sums + at, ups + at, first_row + r, col + c, left);
    }
}

}  // namespace internvl::ISA
