// What a linear layer does to its finished sums: kernels/linear.py.
#pragma once

#include "epilogue.h"
#include "vec.h"

namespace internvl::ISA {

// x * Phi(x), the exact GELU. Phi comes from erfc by the Chebyshev fit of Press et al., Numerical
// Recipes, section 6.2: relative error below 1.2e-7, so small values of the negative tail are right too,
// where 1 + erf(x / sqrt(2)) cancels.
inline Vec gelu(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const Vec t = 1.0f / (1.0f + 0.5f * z);
  Vec p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  const Vec tail = 0.5f * t * exp(p * t - 1.26551223f - z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

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
inline void finish_vec(const Output<T>& out, const float* sums, const float* ups, int64_t row,
                       int64_t col, Count count) {
  Vec v = load(sums);
  if (out.bias) v += load(out.bias + col, count);
  if (out.epilogue == Epilogue::gelu) v = gelu(v);
  if (out.epilogue == Epilogue::swiglu) {
    Vec up = load(ups);
    if (out.bias) up += load(out.bias + out.width + col, count);
    v = silu(v) * up;
  }
  if (out.residual.data) v += load(out.residual[row] + col, count);
  store(v, out.y + row * out.width + col, count);
}

// Writes a block of rows of the panel that starts at column `col`. sums, ups: (rows, 2 * kWidth).
template <typename T>
void finish_panel(const Output<T>& out, const float* sums, const float* ups, int64_t first_row,
                  int64_t rows, int64_t col) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < 2 * kWidth && col + c < out.width; c += kWidth) {
      const int64_t at = r * 2 * kWidth + c, left = out.width - col - c;
      if (left >= kWidth)
        finish_vec(out, sums + at, ups + at, first_row + r, col + c, Full{});
      else
        finish_vec(out, sums + at, ups + at, first_row + r, col + c, left);
    }
}

}  // namespace internvl::ISA
