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

}  // namespace

PYBIND11_MODULE(_native_cuda, module) {
  module.def("norm", &norm);
  module.def("add_norm", &add_norm);
  module.def("rotary", &rotary);
}
