// csrc/cuda's linears of a few rows as a library for ctypes, with the arguments of bindings.cpp.

#include "../../csrc/cuda/decode_qkv.cu"
#include "../../csrc/cuda/linear.cu"

namespace {

using namespace internvl;

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

cuda::GemvInput input(const int64_t* x, float eps) {
  return {at<const void>(x[0]), x[1], static_cast<int>(x[2]), x[3],
          at<const float>(x[4]), x[5], at<const void>(x[6]), eps};
}

cuda::GemvWeight weight(const int64_t* w) {
  return {static_cast<int>(w[0]), at<const void>(w[1]), w[2], w[3], at<const void>(w[4]),
          static_cast<int>(w[5])};
}

Heads<void> heads(const int64_t* x) { return {at<void>(x[0]), x[1], x[2], x[3]}; }

template <typename Run>
const char* reported(Run run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

// copies: (to, from, bytes) of what appears when the kernel waits for its inputs, or null.
void configure(int processors, bool backwards, const int64_t* copy) {
  cuda_on_host::processors = processors;
  cuda_on_host::backwards = backwards;
  cuda_on_host::on_wait = nullptr;
  if (copy == nullptr) return;
  cuda_on_host::on_wait = [to = at<void>(copy[0]), from = at<const void>(copy[1]),
                           bytes = copy[2]] { std::memcpy(to, from, bytes); };
}

const char* linear(int dtype, const int64_t* x, float eps, const int64_t* w, int epilogue,
                   int64_t bias, int64_t residual, int64_t residual_stride, int64_t y,
                   int64_t squares) {
  return reported([&] {
    cuda::linear(dtype, input(x, eps), weight(w), static_cast<cuda::Epilogue>(epilogue),
                 at<const void>(bias), at<const void>(residual), residual_stride, at<void>(y),
                 at<float>(squares), nullptr);
  });
}

const char* decode_qkv(int dtype, const int64_t* x, float eps, const int64_t* w, int64_t bias,
                       const int64_t* to, const int64_t* k_cache, const int64_t* v_cache) {
  return reported([&] {
    const cuda::QkvTarget target{to[0],
                                 to[1],
                                 to[2],
                                 at<const void>(to[3]),
                                 at<const void>(to[4]),
                                 at<const int64_t>(to[5]),
                                 to[6],
                                 at<const int64_t>(to[7]),
                                 to[8],
                                 at<void>(to[9]),
                                 heads(k_cache),
                                 heads(v_cache)};
    cuda::decode_qkv(dtype, input(x, eps), weight(w), at<const void>(bias), target, nullptr);
  });
}

}  // extern "C"
