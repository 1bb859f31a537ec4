// The gradients of norm.h.
#pragma once

#include "norm.h"

namespace internvl::ISA {

// One row of a backward pass, as in NormBackwardCall. Null where there is none.
template <typename T>
struct BackwardRow {
  const T *grad, *x, *passed, *branch;
  T *dx, *dbranch;
};

// What the rows of a thread add up to: float sums of a few rows, next to each other. dbias and dscale
// are null where there are none.
struct WeightSums {
  float *dweight, *dbias, *dscale;
};

// dx = grad * weight * rstd - (x - mean) * slope - offset.
struct Slopes {
  Moments moments;
  float slope, offset;
};

// The sums that both need, about a shift. gain: the mean of grad * weight; product: that of it times the
// shifted values.
struct RowSums {
  Spread values;
  double gain, product;
};

template <Norm NORM, typename T>
RowSums sums_about(float shift, const BackwardRow<T>& row, const T* weight, int64_t cols) {
  // What the next pass reads is asked for here: it has too many streams for the processor to foresee.
  const T *passed = row.passed ? row.passed : row.x, *branch = row.passed ? row.branch : row.x;
  Sum values, squares, gains, products;
  for_each_vec_in_chains(cols, [&](int64_t c, auto count, int chain) {
    const Vec v = shifted<NORM>(load(row.x + c, count), shift, count);
    const Vec g = load(row.grad + c, count) * load(weight + c, count);
    __builtin_prefetch(passed + c);
    __builtin_prefetch(branch + c);
    squares.chains[chain] += v * v;
    products.chains[chain] += g * v;
    if constexpr (NORM == Norm::layer) {
      values.chains[chain] += v;
      gains.chains[chain] += g;
    }
  });
  const bool centred = NORM == Norm::layer;
  const double mean = centred ? values.total() / cols : 0.0;
  return {{mean, squares.total() / cols - mean * mean}, centred ? gains.total() / cols : 0.0,
          products.total() / cols};
}

template <Norm NORM, typename T>
Slopes slopes(const BackwardRow<T>& row, const T* weight, int64_t cols, float eps) {
  float shift = 0.0f;
  RowSums sums = sums_about<NORM>(shift, row, weight, cols);
  if (NORM == Norm::layer && sums.values.is_far()) {
    shift = static_cast<float>(sums.values.mean);
    sums = sums_about<NORM>(shift, row, weight, cols);
  }
  const double rest = sums.values.mean, r = 1.0 / std::sqrt(sums.values.variance + eps);
  return {{shift, static_cast<float>(rest), static_cast<float>(r)},
          static_cast<float>(r * r * r * (sums.product - rest * sums.gain)),
          static_cast<float>(r * sums.gain)};
}

// The gradients of ROWS rows: several share each load and store of the sums.
template <Norm NORM, int ROWS, typename T>
void norm_backward_rows(const BackwardRow<T>* rows, const T* weight, const T* scale,
                        WeightSums sums, int64_t cols, float eps) {
  Slopes of_row[ROWS];
  BackwardRow<T> row[ROWS];  // a copy, which no store can change
  for (int i = 0; i < ROWS; ++i) {
    of_row[i] = slopes<NORM>(rows[i], weight, cols, eps);
    row[i] = rows[i];
  }
  for_each_vec(cols, [&](int64_t c, auto count) {
    const Vec w = load(weight + c, count), s = scale ? load(scale + c, count) : Vec{};
    Vec dweight = {}, dbias = {}, dscale = {};
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const Moments m = of_row[i].moments;
      const Vec g = load(row[i].grad + c, count), x = load(row[i].x + c, count);
      const Vec v = NORM == Norm::rms ? x : x - m.shift - m.rest;
      Vec d = g * w * m.rstd - v * of_row[i].slope;
      if constexpr (NORM == Norm::layer) d -= of_row[i].offset;
      if (row[i].passed) d += load(row[i].passed + c, count);
      d = store_rounded(d, row[i].dx + c, count);
      dweight += g * (NORM == Norm::rms ? round_to<T>(v * m.rstd) : v * m.rstd);
      if constexpr (NORM == Norm::layer) dbias += g;
      if (scale) {
        store(d * s, row[i].dbranch + c, count);
        dscale += d * load(row[i].branch + c, count);
      }
    }
    const auto add = [&](Vec v, float* to) { store(load(to + c, count) + v, to + c, count); };
    add(dweight, sums.dweight);
    if constexpr (NORM == Norm::layer) add(dbias, sums.dbias);
    if (scale) add(dscale, sums.dscale);
  });
}

// Adds the sums of `kRowsPerSum` rows, in float, to a thread's totals in double: a float sum over a
// thousand rows would have several times the error of eager PyTorch.
constexpr int64_t kRowsPerSum = 16;
constexpr int kRowsTogether = 4;
inline void flush(float* sums, double* totals, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    totals[i] += sums[i];
    sums[i] = 0.0f;
  }
}

// Rows [first, last) of one thread. sums and totals: (call.vectors(), cols) zeros.
template <Norm NORM, typename T>
void backward_of_thread(const NormBackwardCall<T>& call, int64_t first, int64_t last, float* sums,
                        double* totals) {
  const int64_t cols = call.cols, width = call.vectors() * cols;
  const WeightSums parts{sums, NORM == Norm::layer ? sums + cols : nullptr,
                         call.scale ? sums + width - cols : nullptr};
  const auto row_at = [&](int64_t r) {
    return BackwardRow<T>{call.grad[r],   call.x[r],           call.passed[r],
                          call.branch[r], call.dx + r * cols, call.dbranch + r * cols};
  };
  for (int64_t r = first; r < last;) {
    const int64_t stop = last - r < kRowsPerSum ? last : r + kRowsPerSum;
    for (; r + kRowsTogether <= stop; r += kRowsTogether) {
      BackwardRow<T> rows[kRowsTogether];
      for (int i = 0; i < kRowsTogether; ++i) rows[i] = row_at(r + i);
      norm_backward_rows<NORM, kRowsTogether>(rows, call.weight, call.scale, parts, cols, call.eps);
    }
    for (; r < stop; ++r) {
      const BackwardRow<T> row = row_at(r);
      norm_backward_rows<NORM, 1>(&row, call.weight, call.scale, parts, cols, call.eps);
    }
    flush(sums, totals, width);
  }
}

// sums, totals: (threads, call.vectors(), cols) zeros; totals holds each thread's sums after.
template <typename T>
void norm_backward(const NormBackwardCall<T>& call, float* sums, double* totals, int threads) {
  const int64_t width = call.vectors() * call.cols;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t first = call.rows * t / threads, last = call.rows * (t + 1) / threads;
    if (call.norm == Norm::rms)
      backward_of_thread<Norm::rms>(call, first, last, sums + t * width, totals + t * width);
    else
      backward_of_thread<Norm::layer>(call, first, last, sums + t * width, totals + t * width);
  }
}

}  // namespace internvl::ISA
