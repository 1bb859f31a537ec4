// RMSNorm over the last dimension. What it computes: kernels/rms_norm.py.
//
// A block per row, which stays in registers between the sum and the scaling: 2 vectors of 16 bytes a
// thread, so 200 threads for 3200 bf16. Bound by memory. Compiled; not yet measured on a GPU.

#include "operators.h"
#include "vec.cuh"

namespace internvl::cuda {
namespace {

template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(Rows<const T> x, const W* weight, W* y, int64_t cols, float eps) {
  constexpr int N = kPerLoad<T>;
  const int64_t row = blockIdx.x;
  const T* from = x[row];
  float values[kVectors][N];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = (v * blockDim.x + threadIdx.x) * N;
    if (c < cols) {
      load(from + c, values[v]);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += values[v][i] * values[v][i];
    }
  }
  const float rstd = rsqrtf(block_sum(sum) / cols + eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = (v * blockDim.x + threadIdx.x) * N;
    if (c < cols) {
      float scale[N];
      load(weight + c, scale);
#pragma unroll
      for (int i = 0; i < N; ++i)  // rounded before weight is applied, as the reference does
        scale[i] *= to_float(from_float<T>(values[v][i] * rstd));
      store(scale, y + row * cols + c);
    }
  }
}

template <typename T, typename W>
void launch(Rows<const void> x, const void* weight, void* y, int64_t rows, int64_t cols, float eps,
            cudaStream_t stream) {
  const Rows<const T> typed{static_cast<const T*>(x.data), x.inner, x.outer_stride, x.inner_stride};
  rms_norm_kernel<T, W><<<grid(rows), threads_for<T>(cols), 0, stream>>>(
      typed, static_cast<const W*>(weight), static_cast<W*>(y), cols, eps);
}

}  // namespace

void rms_norm(int dtype, int weight_dtype, Rows<const void> x, const void* weight, void* y,
              int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (weight_dtype == 0)
      launch<T, float>(x, weight, y, rows, cols, eps, stream);
    else
      launch<T, T>(x, weight, y, rows, cols, eps, stream);
  });
  check_launch("rms_norm");
}

}  // namespace internvl::cuda
