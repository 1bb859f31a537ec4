// RMSNorm and LayerNorm of a row that a block of threads holds in registers.
#pragma once

#include "operators.h"
#include "vec.cuh"

namespace internvl::cuda {

// RMSNorm's result has the type of its weight, LayerNorm's that of x.
template <Norm NORM, typename T, typename W>
struct Result {
  using Type = W;
};
template <typename T, typename W>
struct Result<Norm::layer, T, W> {
  using Type = T;
};

// Calls body(v, c) for each of the thread's vectors in a row of `cols`: vector v starts at column c.
template <int N, typename Body>
__device__ __forceinline__ void for_each_vector(int64_t cols, Body body) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = (v * blockDim.x + threadIdx.x) * N;
    if (c < cols) body(v, c);
  }
}

template <int SLOT, int N, typename Term>
__device__ __forceinline__ float sum_of_row(const float (&values)[kVectors][N], int64_t cols,
                                            Term term) {
  float sum = 0.0f;
  for_each_vector<N>(cols, [&](int v, int64_t) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += term(values[v][i]);
  });
  return block_sum<SLOT>(sum);
}

// Subtracts the row's mean. Called twice, for the rounding of the first mean not to stay.
template <int SLOT, int N>
__device__ __forceinline__ void centre(float (&values)[kVectors][N], int64_t cols) {
  const float mean =
      sum_of_row<SLOT>(values, cols, [](float value) { return value; }) / static_cast<float>(cols);
  for_each_vector<N>(cols, [&](int v, int64_t) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[v][i] -= mean;
  });
}

// Normalises the row and writes it to y.
template <Norm NORM, typename T, typename W, typename Y, int N>
__device__ __forceinline__ void normalise(float (&values)[kVectors][N], const W* weight,
                                          const W* bias, Y* y, int64_t cols, float eps) {
  if constexpr (NORM == Norm::layer) {
    centre<1>(values, cols);
    centre<2>(values, cols);
  }
  const float squares = sum_of_row<0>(values, cols, [](float value) { return value * value; });
  const float rstd = rsqrtf(squares / cols + eps);
  for_each_vector<N>(cols, [&](int v, int64_t c) {
    float gain[N], offset[N];
    load(weight + c, gain);
    if constexpr (NORM == Norm::layer) load(bias + c, offset);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float normed = values[v][i] * rstd;
      if constexpr (NORM == Norm::rms)  // rounded before weight is applied, as the reference does
        gain[i] *= to_float(from_float<T>(normed));
      else
        gain[i] = normed * gain[i] + offset[i];
    }
    store(gain, y + c);
  });
}

// Calls body(integral_constant<Norm>, T{}, W{}) with the norm, the storage type and that of weight.
template <typename Body>
void with_norm(Norm norm, int dtype, int weight_dtype, Body body) {
  const auto with_types = [&](auto kind) {
    with_type(dtype, [&](auto type) {
      if (weight_dtype == 0)
        body(kind, type, float{});
      else
        body(kind, type, type);
    });
  };
  if (norm == Norm::rms)
    with_types(std::integral_constant<Norm, Norm::rms>{});
  else
    with_types(std::integral_constant<Norm, Norm::layer>{});
}

template <typename T>
Rows<const T> typed(Rows<const void> x) {
  return {static_cast<const T*>(x.data), x.inner, x.outer_stride, x.inner_stride};
}

}  // namespace internvl::cuda
