// silu(gate) * up, on the CPU: kernels/swiglu.py.
#pragma once

#include "vec.h"

namespace internvl::ISA {

// gate_up: rows of 2 * cols, [gate | up]. y: (rows, cols), contiguous.
template <typename T>
void swiglu(Rows<const T> gate_up, T* y, int64_t rows, int64_t cols, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *gate = gate_up[r], *up = gate + cols;
    T* out = y + r * cols;
    for_each_vec(cols, [&](int64_t c, auto count) {
      const Vec g = load(gate + c, count);
      store(g / (1.0f + exp(-g)) * load(up + c, count), out + c, count);
    });
  }
}

// d: (rows, 2 * cols), contiguous: the gradient of gate_up.
template <typename T>
void swiglu_backward(Rows<const T> grad, Rows<const T> gate_up, T* d, int64_t rows, int64_t cols,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *gate = gate_up[r], *up = gate + cols, *dy = grad[r];
    T* out = d + r * 2 * cols;
    for_each_vec(cols, [&](int64_t c, auto count) {
      const Vec g = load(gate + c, count), dv = load(dy + c, count);
      const Vec sigmoid = 1.0f / (1.0f + exp(-g));
      store(dv * load(up + c, count) * sigmoid * (1.0f + g * (1.0f - sigmoid)), out + c, count);
      store(dv * g * sigmoid, out + cols + c, count);
    });
  }
}

}  // namespace internvl::ISA
