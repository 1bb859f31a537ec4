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

// A weight (features, cols) of 4 bits, as kernels/_int4.py lays it out.
struct Int4Weight {
  const uint8_t* packed;
  const uint16_t* scales;
  int64_t cols, features, group;
};

}  // namespace internvl
