// Linear layers over weights of 8 bits, on the CPU. What they compute, and the layout: kernels/linear_int8.py.
#pragma once

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include "int8_bytes.h"
#else
#include "int8_widened.h"
#endif

namespace internvl::ISA {

// The form of a call, and the memory that it needs.
template <typename T>
LinearMemory int8_memory(void* at, int64_t rows, int64_t cols, int threads) {
  using Form = Int8Form<T>;
  const int64_t steps = parts_of(cols, Step<typename Form::Product>::kDepth);
  return {at, rows, steps, Form::kBlockTiles, Form::scratch(cols), threads};
}

// Bytes of scratch memory that linear_int8() needs.
template <typename T>
int64_t linear_int8_workspace(int64_t rows, int64_t cols, int threads) {
  return int8_memory<T>(nullptr, rows, cols, threads).bytes() + Int8Form<T>::shared(rows);
}

// bias, residual, y, epilogue, workspace: as of linear() in linear.h.
template <typename T>
void linear_int8(Rows<const T> x, const Int8Weight& weight, const T* bias, Rows<const T> residual,
                 T* y, int64_t rows, Epilogue epilogue, void* workspace, int threads) {
  const auto memory = int8_memory<T>(workspace, rows, weight.cols, threads);
  const Int8Form<T> form(x, weight, memory.end());
  const int64_t width = epilogue == Epilogue::swiglu ? weight.features / 2 : weight.features;
  linear_product(form, Output<T>{bias, residual, y, width, epilogue}, rows, weight.cols,
                 weight.features, memory);
}

}  // namespace internvl::ISA
