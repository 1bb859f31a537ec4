// Linear layers of a few rows with their activation, the residual add and the next norm's sums of
// squares. What they compute: kernels/linear.py, norm_linear.py, linear_squares.py. How: gemv.cuh.

#include "gemv.cuh"

namespace internvl::cuda {
namespace {

__device__ __forceinline__ float activate(float y, Epilogue epilogue) {
  if (epilogue == Epilogue::gelu) return 0.5f * y * (1.0f + erff(y * 0.70710678f));
  if (epilogue == Epilogue::gelu_tanh)  // x / 2 * (1 + tanh(u)) is x * sigmoid(2 u)
    return y / (1.0f + expf(-y * (1.59576912f + 0.0713548163f * y * y)));
  if (epilogue == Epilogue::gelu_quick) return y / (1.0f + expf(-1.702f * y));
  return y;
}

template <typename T>
struct Plain {
  static constexpr bool kPaired = false;
  struct Early {
    float bias, residual;
  };
  const T* bias;
  const T* residual;
  int64_t residual_stride;
  T* y;
  float* squares;
  int num_features;
  Epilogue epilogue;

  template <int OUTPUTS>
  __device__ __forceinline__ TileRows rows(int tile) const {
    const int64_t first = int64_t{tile} * OUTPUTS;
    return {first, first + OUTPUTS / 2};
  }

  template <int OUTPUTS>
  __device__ __forceinline__ Early fetch(int tile, int n, int output) const {
    const int feature = tile * OUTPUTS + output, features = computed_again(num_features);
    Early early{};
    if (feature < features) {
      if (bias) early.bias = to_float(bias[feature]);
      if (residual) early.residual = to_float(residual[n * residual_stride + feature]);
    }
    return early;
  }

  template <int OUTPUTS>
  __device__ __forceinline__ void store(int tile, int n, int output, bool there, float sum,
                                        float, const Early& early) const {
    const int feature = tile * OUTPUTS + output, features = computed_again(num_features);
    there = there && feature < features;
    const T value = from_float<T>(early.residual + activate(sum + early.bias, epilogue));
    if (there) y[int64_t{n} * features + feature] = value;
    if (squares == nullptr) return;
    float square = there ? to_float(value) * to_float(value) : 0.0f;  // as it is stored
#pragma unroll
    for (int offset = kSquares / 2; offset > 0; offset /= 2)
      square += __shfl_xor_sync(~0u, square, offset);
    if (there && output % kSquares == 0)
      squares[n * ((features + kSquares - 1) / kSquares) + feature / kSquares] = square;
  }
};

template <typename T>
struct SwiGlu {
  static constexpr bool kPaired = true;
  struct Early {
    float gate, up;  // of the bias
  };
  const T* bias;
  T* y;
  int num_features;  // of y

  template <int OUTPUTS>
  __device__ __forceinline__ TileRows rows(int tile) const {
    const int64_t first = int64_t{tile} * OUTPUTS;
    return {first, first + computed_again(num_features)};
  }

  template <int OUTPUTS>
  __device__ __forceinline__ Early fetch(int tile, int, int output) const {
    const int feature = tile * OUTPUTS + output, features = computed_again(num_features);
    if (bias == nullptr || feature >= features) return {};
    return {to_float(bias[feature]), to_float(bias[features + feature])};
  }

  template <int OUTPUTS>
  __device__ __forceinline__ void store(int tile, int n, int output, bool there, float gate,
                                        float up, const Early& early) const {
    const int feature = tile * OUTPUTS + output, features = computed_again(num_features);
    gate += early.gate, up += early.up;
    if (there && feature < features)
      y[int64_t{n} * features + feature] = from_float<T>(gate / (1.0f + expf(-gate)) * up);
  }
};

}  // namespace

void linear(int dtype, const GemvInput& x, const GemvWeight& weight, Epilogue epilogue,
            const void* bias, const void* residual, int64_t residual_stride, void* y,
            float* squares, cudaStream_t stream) {
  if (epilogue == Epilogue::swiglu) {
    with_form<true>(dtype, weight, [&](auto form, const auto& held) {
      using T = typename decltype(form)::Type;
      const int features = static_cast<int>(weight.rows / 2);
      const SwiGlu<T> swiglu{static_cast<const T*>(bias), static_cast<T*>(y), features};
      launch_gemv<decltype(form)>(activations<T>(x), held, swiglu, features, stream);
    });
    return;
  }
  with_form<false>(dtype, weight, [&](auto form, const auto& held) {
    using T = typename decltype(form)::Type;
    const Plain<T> plain{static_cast<const T*>(bias),
                         static_cast<const T*>(residual),
                         residual_stride,
                         static_cast<T*>(y),
                         squares,
                         static_cast<int>(weight.rows),
                         epilogue};
    launch_gemv<decltype(form)>(activations<T>(x), held, plain, weight.rows, stream);
  });
}

}  // namespace internvl::cuda
