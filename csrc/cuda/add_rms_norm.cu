// Layer scale, residual add and RMSNorm in one pass. What it computes: kernels/add_rms_norm.py.
//
// As rms_norm.cu: a block per row, the sum stays in registers. Bound by memory: two reads and two writes.
// Compiled; not yet measured on a GPU.

#include "operators.h"
#include "vec.cuh"

namespace internvl::cuda {
namespace {

template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads)
    add_rms_norm_kernel(Rows<const T> x, Rows<const T> residual, const T* scale, const W* weight,
                        W* y, T* residual_out, int64_t cols, float eps) {
  constexpr int N = kPerLoad<T>;
  const int64_t row = blockIdx.x;
  const T *from = x[row], *onto = residual[row];
  float values[kVectors][N];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = (v * blockDim.x + threadIdx.x) * N;
    if (c < cols) {
      float added[N], factor[N];
      load(onto + c, values[v]);
      load(from + c, added);
      if (scale) load(scale + c, factor);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float term = scale ? added[i] * factor[i] : added[i];
        values[v][i] = to_float(from_float<T>(values[v][i] + term));  // as it is stored
        sum += values[v][i] * values[v][i];
      }
      store(values[v], residual_out + row * cols + c);
    }
  }
  const float rstd = rsqrtf(block_sum(sum) / cols + eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = (v * blockDim.x + threadIdx.x) * N;
    if (c < cols) {
      float gain[N];
      load(weight + c, gain);
#pragma unroll
      for (int i = 0; i < N; ++i) gain[i] *= to_float(from_float<T>(values[v][i] * rstd));
      store(gain, y + row * cols + c);
    }
  }
}

template <typename T>
Rows<const T> typed(Rows<const void> x) {
  return {static_cast<const T*>(x.data), x.inner, x.outer_stride, x.inner_stride};
}

template <typename T, typename W>
void launch(Rows<const void> x, Rows<const void> residual, const void* scale, const void* weight,
            void* y, void* residual_out, int64_t rows, int64_t cols, float eps,
            cudaStream_t stream) {
  add_rms_norm_kernel<T, W><<<grid(rows), threads_for<T>(cols), 0, stream>>>(
      typed<T>(x), typed<T>(residual), static_cast<const T*>(scale), static_cast<const W*>(weight),
      static_cast<W*>(y), static_cast<T*>(residual_out), cols, eps);
}

}  // namespace

void add_rms_norm(int dtype, int weight_dtype, Rows<const void> x, Rows<const void> residual,
                  const void* scale, const void* weight, void* y, void* residual_out, int64_t rows,
                  int64_t cols, float eps, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (weight_dtype == 0)
      launch<T, float>(x, residual, scale, weight, y, residual_out, rows, cols, eps, stream);
    else
      launch<T, T>(x, residual, scale, weight, y, residual_out, rows, cols, eps, stream);
  });
  check_launch("add_rms_norm");
}

}  // namespace internvl::cuda
