// What the callers of linear.h know of it.
#pragma once

#include <cstdint>

namespace internvl {

// What a linear layer does after its product; in the order of EPILOGUES in kernels/_epilogue.py.
enum class Epilogue { none, gelu, swiglu, gelu_tanh, gelu_quick };

// How a weight is packed: panels of `rows` of its rows, cut into steps of `depth` columns.
struct LinearPanel {
  int64_t rows, depth;
};

}  // namespace internvl
