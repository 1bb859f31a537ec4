// Linear layers over packed weights, on the CPU. What they compute: kernels/linear_packed.py.
//
// A weight is packed in panels of kPanel of its rows: (F / kPanel, steps, kPanel) words, absent rows 0.
#pragma once

#include "linear_blocks.h"

namespace internvl::ISA {

// The rows of a panel and the columns of a step: weights are packed so, by kernels/linear_packed.py.
template <typename T>
LinearPanel linear_panel() {
  return {kPanel, Step<T>::kDepth};
}

// A weight of the dtype of x, as linear_blocks.h takes it.
template <typename T>
struct Dense {
  typedef T Product;
  typedef typename Step<T>::Word Word;
  static constexpr int kRows = kPanel;
  static constexpr int64_t kBlockTiles = kTilesInL2;
  static constexpr bool kInPlace = true;

  Rows<const T> x;
  int64_t cols, steps;
  const Word* weights;

  void pack(int64_t, int64_t first, int64_t rows, uint32_t* tile, char*) const {
    pack_tile(x, first, rows, cols, tile);
  }
  const Word* read(int64_t panel, int, int64_t from, int64_t, char*) const {
    return weights + (panel * steps + from) * kPanel;
  }
  const char* address(int64_t panel, int64_t from) const {
    return reinterpret_cast<const char*>(read(panel, 0, from, 0, nullptr));
  }
  static int64_t bytes(int64_t steps) { return steps * kPanel * sizeof(Word); }
  float* settle(float* sums, int64_t, int64_t, int64_t) const { return sums; }
};

template <typename T>
LinearMemory linear_memory(void* at, int64_t rows, int64_t cols, int threads) {
  return {at, rows, parts_of(cols, Step<T>::kDepth), Dense<T>::kBlockTiles, 0, threads};
}

// Bytes of scratch memory that linear() needs.
template <typename T>
int64_t linear_workspace(int64_t rows, int64_t cols, int threads) {
  return linear_memory<T>(nullptr, rows, cols, threads).bytes();
}

// x: rows of `cols`. packed: of a weight (features, cols). y: (rows, features), or half as wide
// with SwiGLU, where features / 2 is a multiple of kPanel. bias and residual.data may be null.
template <typename T>
void linear(Rows<const T> x, const T* packed, const T* bias, Rows<const T> residual, T* y,
            int64_t rows, int64_t cols, int64_t features, Epilogue epilogue, void* workspace,
            int threads) {
  const int64_t width = epilogue == Epilogue::swiglu ? features / 2 : features;
  const Dense<T> form{x, cols, parts_of(cols, Step<T>::kDepth),
                      reinterpret_cast<const typename Step<T>::Word*>(packed)};
  linear_product(form, Output<T>{bias, residual, y, width, epilogue}, rows, cols, features,
                 linear_memory<T>(workspace, rows, cols, threads));
}

}  // namespace internvl::ISA
