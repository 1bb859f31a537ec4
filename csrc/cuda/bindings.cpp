// The module internvl_engine._native_cuda. Addresses are device memory; `stream` is a cudaStream_t.
// dtype is 0 for float32, 1 for bfloat16, 2 for float16; tuples are explained in bindings_arguments.h.

#include "../bindings_arguments.h"
#include "operators.h"

namespace py = pybind11;

namespace {

using namespace internvl;

cudaStream_t stream_at(uintptr_t address) { return at<CUstream_st>(address); }

// Rows<void> has no operator[], so the addresses stay untyped until the launcher knows the type.
Rows<const void> rows(const py::tuple& from) {
  const Four four(from);
  return {at<const void>(four.values[0]), four.values[1], four.values[2], four.values[3]};
}

template <typename T>
Heads<T> heads(const py::tuple& from) {
  const Four four(from);
  return {at<T>(four.values[0]), four.values[1], four.values[2], four.values[3]};
}

// norm is 0 for RMSNorm, 1 for LayerNorm.
void norm(int dtype, int weight_dtype, int norm, const py::tuple& x, uintptr_t weight,
          uintptr_t bias, uintptr_t y, int64_t num_rows, int64_t cols, float eps,
          uintptr_t stream) {
  cuda::norm(static_cast<Norm>(norm), dtype, weight_dtype, rows(x), at<const void>(weight),
             at<const void>(bias), at<void>(y), num_rows, cols, eps, stream_at(stream));
}

void add_norm(int dtype, int weight_dtype, int norm, const py::tuple& x, const py::tuple& residual,
              uintptr_t scale, uintptr_t weight, uintptr_t bias, uintptr_t y,
              uintptr_t residual_out, int64_t num_rows, int64_t cols, float eps,
              uintptr_t stream) {
  cuda::add_norm(static_cast<Norm>(norm), dtype, weight_dtype, rows(x), rows(residual),
                 at<const void>(scale), at<const void>(weight), at<const void>(bias), at<void>(y),
                 at<void>(residual_out), num_rows, cols, eps, stream_at(stream));
}

void rotary(int dtype, const py::tuple& q, const py::tuple& k, const py::tuple& q_out,
            const py::tuple& k_out, uintptr_t cos, uintptr_t sin, uintptr_t positions,
            int64_t positions_stride, float sign, const py::tuple& extent, int64_t k_heads,
            uintptr_t stream) {
  cuda::rotary(dtype, heads<const void>(q), heads<const void>(k), heads<void>(q_out),
               heads<void>(k_out), at<const void>(cos), at<const void>(sin),
               at<const int64_t>(positions), positions_stride, sign, Four(extent).extent(), k_heads,
               stream_at(stream));
}

// x: (address, row stride, rows, columns, address of squares, partial sums a row, norm's weight).
cuda::GemvInput gemv_input(const py::tuple& x, float eps) {
  const Numbers<7> from(x);
  return {at<const void>(from[0]), from[1], static_cast<int>(from[2]), from[3],
          at<const float>(from[4]), from[5], at<const void>(from[6]), eps};
}

// weight: (form, address, rows, columns, address of scales, group).
cuda::GemvWeight gemv_weight(const py::tuple& weight) {
  const Numbers<6> from(weight);
  return {static_cast<int>(from[0]), at<const void>(from[1]), from[2], from[3],
          at<const void>(from[4]), static_cast<int>(from[5])};
}

void linear(int dtype, const py::tuple& x, float eps, const py::tuple& weight, int epilogue,
            uintptr_t bias, uintptr_t residual, int64_t residual_stride, uintptr_t y,
            uintptr_t squares, uintptr_t stream) {
  cuda::linear(dtype, gemv_input(x, eps), gemv_weight(weight),
               static_cast<cuda::Epilogue>(epilogue), at<const void>(bias),
               at<const void>(residual), residual_stride, at<void>(y), at<float>(squares),
               stream_at(stream));
}

// target: (heads, key heads, dim, cos, sin, positions, their stride, slots, their stride, q).
void decode_qkv(int dtype, const py::tuple& x, float eps, const py::tuple& weight, uintptr_t bias,
                const py::tuple& target, const py::tuple& k_cache, const py::tuple& v_cache,
                uintptr_t stream) {
  const Numbers<10> to(target);
  cuda::decode_qkv(dtype, gemv_input(x, eps), gemv_weight(weight), at<const void>(bias),
                   {to[0], to[1], to[2], at<const void>(to[3]), at<const void>(to[4]),
                    at<const int64_t>(to[5]), to[6], at<const int64_t>(to[7]), to[8],
                    at<void>(to[9]), heads<void>(k_cache), heads<void>(v_cache)},
                   stream_at(stream));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, module) {
  module.def("norm", &norm);
  module.def("add_norm", &add_norm);
  module.def("rotary", &rotary);
  module.def("linear", &linear);
  module.def("decode_qkv", &decode_qkv);
}
