// Layer scale, residual add and RMSNorm in one pass, on the CPU: kernels/add_rms_norm.py.
#pragma once

#include "rms_norm.h"

namespace internvl::ISA {

// scale may be null, for 1. residual_out is rounded to T before the norm reads it.
template <typename T>
void add_rms_norm_row(const T* x, const T* residual, const T* scale, const T* weight, T* y,
                      T* residual_out, int64_t cols, float eps) {
  Sum squares;
  for_each_vec_in_chains(cols, [&](int64_t c, auto count, int chain) {
    const Vec v = load(x + c, count), r = load(residual + c, count);
    const Vec added = scale ? r + v * load(scale + c, count) : r + v;
    const Vec sum = store_rounded(added, residual_out + c, count);
    squares.chains[chain] += sum * sum;
  });
  const double rstd = 1.0 / std::sqrt(squares.total() / cols + eps);
  normalise_row(residual_out, static_cast<float>(rstd), weight, y, cols);
}

template <typename T>
void add_rms_norm(Rows<const T> x, Rows<const T> residual, const T* scale, const T* weight, T* y,
                  T* residual_out, int64_t rows, int64_t cols, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    add_rms_norm_row(x[r], residual[r], scale, weight, y + r * cols, residual_out + r * cols, cols,
                     eps);
}

// dresidual = passed + the norm's gradient; dx = dresidual * scale, and dscale sums dresidual * x, both
// only where there is a scale. sums and totals: (threads, 2, cols) zeros for dweight and dscale.
template <typename T>
void add_rms_norm_backward(Rows<const T> grad, Rows<const T> passed, Rows<const T> x,
                           const T* residual_out, const T* scale, const T* weight, T* dx,
                           T* dresidual, float* sums, double* totals, int64_t rows, int64_t cols,
                           float eps, int threads) {
  const auto row_at = [&](int64_t r) {
    return BackwardRow<T>{grad[r], residual_out + r * cols, passed[r], x[r],
                          dresidual + r * cols, dx + r * cols};
  };
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    float* dweight = sums + t * 2 * cols;
    backward_of_thread<T>(rows * t / threads, rows * (t + 1) / threads, row_at, weight, scale,
                          {dweight, dweight + cols}, totals + t * 2 * cols, 2 * cols, cols, eps);
  }
}

}  // namespace internvl::ISA
