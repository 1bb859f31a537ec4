// Layer scale, residual add and RMSNorm or LayerNorm in one pass. What they compute:
// kernels/add_rms_norm.py, add_layer_norm.py.
//
// As rms_norm.cu: a block per row, the sum stays in registers. Bound by memory: two reads and two writes.
// Compiled; not yet measured on a GPU.

#include "norm.cuh"

namespace internvl::cuda {
namespace {

template <Norm NORM, typename T, typename W, typename Y>
__global__ void __launch_bounds__(kMaxThreads)
    add_norm_kernel(Rows<const T> x, Rows<const T> residual, const T* scale, const W* weight,
                    const W* bias, Y* y, T* residual_out, int64_t cols, float eps) {
  constexpr int N = kPerLoad<T>;
  const int64_t row = blockIdx.x;
  const T *from = x[row], *onto = residual[row];
  float values[kVectors][N];
  for_each_vector<N>(cols, [&](int v, int64_t c) {
    float added[N], factor[N];
    load(onto + c, values[v]);
    load(from + c, added);
    if (scale) load(scale + c, factor);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float term = scale ? added[i] * factor[i] : added[i];
      values[v][i] = to_float(from_float<T>(values[v][i] + term));  // as it is stored
    }
    store(values[v], residual_out + row * cols + c);
  });
  normalise<NORM, T>(values, weight, bias, y + row * cols, cols, eps);
}

}  // namespace

void add_norm(Norm norm, int dtype, int weight_dtype, Rows<const void> x, Rows<const void> residual,
              const void* scale, const void* weight, const void* bias, void* y, void* residual_out,
              int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  with_norm(norm, dtype, weight_dtype, [&](auto kind, auto type, auto weight_type) {
    using T = decltype(type);
    using W = decltype(weight_type);
    using Y = typename Result<kind, T, W>::Type;
    add_norm_kernel<kind, T, W, Y><<<grid(rows), threads_for<T>(cols), 0, stream>>>(
        typed<T>(x), typed<T>(residual), static_cast<const T*>(scale),
        static_cast<const W*>(weight), static_cast<const W*>(bias), static_cast<Y*>(y),
        static_cast<T*>(residual_out), cols, eps);
  });
  check_launch("add_norm");
}

}  // namespace internvl::cuda
