// RMSNorm, and LayerNorm, over the last dimension. What they compute: kernels/rms_norm.py, layer_norm.py.
//
// A block per row, which stays in registers between the sum and the scaling: 2 vectors of 16 bytes a
// thread, so 200 threads for 3200 bf16. Bound by memory. Compiled; not yet measured on a GPU.

#include "norm.cuh"

namespace internvl::cuda {
namespace {

template <Norm NORM, typename T, typename W, typename Y>
__global__ void __launch_bounds__(kMaxThreads)
    norm_kernel(Rows<const T> x, const W* weight, const W* bias, Y* y, int64_t cols, float eps) {
  constexpr int N = kPerLoad<T>;
  const int64_t row = blockIdx.x;
  const T* from = x[row];
  float values[kVectors][N];
  for_each_vector<N>(cols, [&](int v, int64_t c) { load(from + c, values[v]); });
  normalise<NORM, T>(values, weight, bias, y + row * cols, cols, eps);
}

}  // namespace

void norm(Norm norm, int dtype, int weight_dtype, Rows<const void> x, const void* weight,
          const void* bias, void* y, int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  with_norm(norm, dtype, weight_dtype, [&](auto kind, auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    using Y = typename Result<kind, T, W>::Type;
    norm_kernel<kind, T, W, Y><<<grid(rows), threads_for<T>(cols), 0, stream>>>(
        typed<T>(x), static_cast<const W*>(weight), static_cast<const W*>(bias),
        static_cast<Y*>(y), cols, eps);
  });
  check_launch("norm");
}

}  // namespace internvl::cuda
