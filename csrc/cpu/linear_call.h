// What the callers of linear.h know of it.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace internvl {

// What a linear layer does after its product; in the order of EPILOGUES in kernels/_epilogue.py.
enum class Epilogue { none, gelu, swiglu, gelu_tanh, gelu_quick };

// How a weight is packed: panels of `rows` of its rows, cut into steps of `depth` columns.
struct LinearPanel {
  int64_t rows, depth;
};

// A weight (features, cols) of 8 bits, as kernels/_int8.py lays it out.
struct Int8Weight {
  const Int8* packed;
  const float* scales;
  const int32_t* sums;
  int64_t cols, features;
};

// A linear layer over a weight in 4 bits: linear_int4.h.
template <typename T>
struct LinearInt4Call {
  Rows<const T> x;             // of cols values
  const uint8_t* packed;       // (panels, steps, 32, 4), of a weight (features, cols)
  const uint16_t* scales;      // (panels, groups, 32)
  const T* bias;               // of all features, or null
  Rows<const T> residual;      // its data is null for none
  T* y;                        // (rows, features), or half as wide with SwiGLU
  int64_t rows, cols, features, group;
  Epilogue epilogue;
};

}  // namespace internvl
