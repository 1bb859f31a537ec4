// Weights of 8 bits in panels: (P, S, 32, 4), see kernels/_int8.py.
#pragma once

#include "linear_blocks.h"

namespace internvl::ISA {

constexpr int kInt8Rows = 32;    // of a panel
constexpr int kInt8Columns = 4;  // of a step

struct Int8Panels : Int8Weight {
  int64_t steps() const { return parts_of(cols, kInt8Columns); }
  const Int8* step(int64_t panel, int64_t step) const {
    return packed + (panel * steps() + step) * kInt8Rows * kInt8Columns;
  }

  // Calls body(offset, count) for the vectors of rows [row, row + kPanel) of the weight that there are.
  template <typename Body>
  void for_each_vec_of_panel(int64_t row, Body body) const {
    for_each_vec(smaller(kPanel, features - row), body);
  }
};

}  // namespace internvl::ISA
