// RMSNorm and LayerNorm over the last dimension, by themselves or after a residual add, on the CPU. What
// they compute: kernels/rms_norm.py, layer_norm.py, add_rms_norm.py and add_layer_norm.py.
//
// Included once per instruction set, with ISA naming the namespace: see isa.h. A row of 4096 is in the
// first-level cache when it is read again.
#pragma once

#include <cmath>

#include "norm_call.h"
#include "vec.h"

namespace internvl::ISA {

// Of one row. Its mean is shift + rest: x - shift is exact where x is close to it, so a row that is far
// from zero loses nothing. RMSNorm has 0 and 0.
struct Moments {
  float shift, rest, rstd;
};

// x less the shift, and 0 past the end of a row.
template <Norm NORM, typename Count>
inline Vec shifted(Vec x, float shift, Count count) {
  return NORM == Norm::rms ? x : first(x - shift, count);
}

template <Norm NORM>
inline Vec normalised(Vec x, const Moments& m) {
  return NORM == Norm::rms ? x * m.rstd : (x - m.shift) * m.rstd - m.rest * m.rstd;
}

// Mean and variance of the values of a row, less a shift; for RMSNorm 0 and the mean square.
struct Spread {
  double mean, variance;

  // Whether mean**2, which was subtracted from the mean square, cost the variance accuracy.
  bool is_far() const { return !(mean * mean <= variance / 4); }
};

template <Norm NORM, typename Value>
Spread spread(int64_t cols, float shift, Value value) {
  Sum sum, squares;
  for_each_vec_in_chains(cols, [&](int64_t c, auto count, int chain) {
    const Vec v = shifted<NORM>(value(c, count), shift, count);
    if constexpr (NORM == Norm::layer) sum.chains[chain] += v;
    squares.chains[chain] += v * v;
  });
  const double mean = NORM == Norm::layer ? sum.total() / cols : 0.0;
  return {mean, squares.total() / cols - mean * mean};
}

// Of the row at x, whose vectors value(start, count) returns, each once; it may make them on the way.
// Rows far from zero are read again, about their mean.
template <Norm NORM, typename T, typename Value>
Moments moments(const T* x, int64_t cols, float eps, Value value) {
  float shift = 0.0f;
  Spread found = spread<NORM>(cols, 0.0f, value);
  if (NORM == Norm::layer && found.is_far()) {
    shift = static_cast<float>(found.mean);
    found = spread<NORM>(cols, shift, [&](int64_t c, auto count) { return load(x + c, count); });
  }
  return {shift, static_cast<float>(found.mean),
          static_cast<float>(1.0 / std::sqrt(found.variance + eps))};
}

template <typename T>
float reciprocal_rms(const T* x, int64_t cols, float eps) {
  const auto value = [&](int64_t c, auto count) { return load(x + c, count); };
  return moments<Norm::rms>(x, cols, eps, value).rstd;
}

template <Norm NORM, typename T>
void normalise_row(const T* x, const Moments& m, const T* weight, const T* bias, T* y,
                   int64_t cols) {
  for_each_vec(cols, [&](int64_t c, auto count) {
    const Vec normed = normalised<NORM>(load(x + c, count), m), w = load(weight + c, count);
    if constexpr (NORM == Norm::rms)  // rounded before weight is applied, as the reference does
      store(round_to<T>(normed) * w, y + c, count);
    else
      store(normed * w + load(bias + c, count), y + c, count);
  });
}

template <Norm NORM, typename T>
void norm_row(const NormCall<T>& call, int64_t r) {
  const int64_t cols = call.cols;
  const T* x = call.x[r];
  const auto value = [&](int64_t c, auto count) { return load(x + c, count); };
  const Moments m = moments<NORM>(x, cols, call.eps, value);
  normalise_row<NORM>(x, m, call.weight, call.bias, call.y + r * cols, cols);
}

// residual_out is rounded to T before the norm reads it.
template <Norm NORM, typename T>
void add_norm_row(const NormCall<T>& call, int64_t r) {
  const int64_t cols = call.cols;
  const T *x = call.x[r], *residual = call.residual[r], *scale = call.scale;
  T* sum = call.residual_out + r * cols;
  const auto value = [&](int64_t c, auto count) {
    const Vec v = load(x + c, count), onto = load(residual + c, count);
    return store_rounded(scale ? onto + v * load(scale + c, count) : onto + v, sum + c, count);
  };
  const Moments m = moments<NORM>(sum, cols, call.eps, value);
  normalise_row<NORM>(sum, m, call.weight, call.bias, call.y + r * cols, cols);
}

template <Norm NORM, typename T>
void norm_rows(const NormCall<T>& call, int threads) {
  if (call.residual.data) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < call.rows; ++r) add_norm_row<NORM>(call, r);
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < call.rows; ++r) norm_row<NORM>(call, r);
  }
}

template <typename T>
void norm(const NormCall<T>& call, int threads) {
  if (call.norm == Norm::rms)
    norm_rows<Norm::rms>(call, threads);
  else
    norm_rows<Norm::layer>(call, threads);
}

}  // namespace internvl::ISA
