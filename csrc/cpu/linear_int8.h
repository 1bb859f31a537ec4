// Linear layers over weights of 8 bits, on the CPU. What they compute, and the layout: kernels/linear_int8.py.
//
// With instructions that multiply bytes (AVX512-VNNI, AVX-VNNI) every row of x is rounded to bytes while it
// is packed, by a scale of its own; its few largest values are taken out first and multiplied in fp32.
// Without, panels are widened to fp32 in cache and x is not rounded.
#pragma once

#include "linear_blocks.h"
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include "quantize_rows.h"
#endif

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

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

static_assert(kPanel == kInt8Rows, "a panel fills the registers");

template <typename T>
struct Int8Form {
  typedef Int8 Product;
  typedef Step<Int8>::Word Word;
  static constexpr int kRows = kInt8Rows;
  static constexpr bool kInPlace = true;

  Rows<const T> x;
  Int8Panels weight;
  QuantizedRow* quantized;  // of the rows at hand

  Int8Form(Rows<const T> x, const Int8Weight& weight, void* shared)
      : x(x), weight{weight}, quantized(static_cast<QuantizedRow*>(shared)) {}
  static int64_t scratch(int64_t cols) { return kTileRows * rounded_columns(cols); }
  static int64_t shared(int64_t rows) { return smaller(rows, kPackedRows) * sizeof(QuantizedRow); }

  void pack(int64_t row, int64_t first, int64_t rows, uint32_t* tile, char* scratch) const {
    const int64_t stride = rounded_columns(weight.cols);
    auto* bytes = reinterpret_cast<uint8_t*>(scratch);
    for (int64_t r = 0; r < rows; ++r)
      quantize_row(x[first + r], weight.cols, bytes + r * stride, quantized[row + r]);
    const Rows<const Int8> from{reinterpret_cast<const Int8*>(bytes), rows, 0, stride};
    pack_tile(from, 0, rows, weight.steps() * kInt8Columns, tile);
  }
  const Word* read(int64_t panel, int64_t from, int64_t, char*) const {
    return reinterpret_cast<const Word*>(weight.step(panel, from));
  }
  const char* address(int64_t panel, int64_t from) const {
    return reinterpret_cast<const char*>(weight.step(panel, from));
  }
  static int64_t bytes(int64_t steps) { return steps * kPanel * sizeof(Word); }
  static int64_t stride(int64_t) { return 0; }

  // Of the sums of bytes: (sum - 128 * the weights' sum) * the scale of x, the products of what was
  // taken out of the row, and then the scale of the weights.
  float* settle(int32_t* sums, int64_t panel, int64_t row, int64_t rows) const {
    const int64_t col = panel * kRows;
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      const QuantizedRow& q = quantized[row + r];
      weight.for_each_vec_of_panel(col, [&](int64_t c, auto count) {
        const IntVec offset = load(weight.sums + col + c, count) * kZero;
        Vec v = __builtin_convertvector(load(sums + c) - offset, Vec) * q.scale;
        for (int32_t i = 0; i < q.outliers; ++i) v += q.values[i] * widened(panel, q.columns[i], c);
        store(v * load(weight.scales + col + c, count), reinterpret_cast<float*>(sums + c));
      });
    }
    return reinterpret_cast<float*>(sums - rows * kPanel);
  }

  // kWidth rows of a column of the weight, from row c of the panel on.
  Vec widened(int64_t panel, int32_t column, int64_t c) const {
    const Int8* step = weight.step(panel, column / kInt8Columns) + c * kInt8Columns;
    const IntVec words = load(reinterpret_cast<const int32_t*>(step));
    const int bits = 8 * (column % kInt8Columns);
    return __builtin_convertvector((IntVec)((Bits)words << (24 - bits)) >> 24, Vec);
  }
};

#else

template <typename T>
struct Int8Form {
  typedef float Product;
  static constexpr int kRows = kInt8Rows;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kLongestChain = 256;

  Rows<const T> x;
  Int8Panels weight;

  Int8Form(Rows<const T> x, const Int8Weight& weight, void*) : x(x), weight{weight} {}
  static int64_t scratch(int64_t) { return kLongestChain * kInt8Rows * sizeof(float); }
  static int64_t shared(int64_t) { return 0; }

  void pack(int64_t, int64_t first, int64_t rows, uint32_t* tile, char*) const {
    pack_tile(x, first, rows, weight.cols, tile);
  }
  const char* address(int64_t panel, int64_t from) const {
    return reinterpret_cast<const char*>(weight.step(panel, from / kInt8Columns));
  }
  static int64_t bytes(int64_t steps) { return steps * kInt8Rows; }
  static int64_t stride(int64_t steps) { return parts_of(steps, kInt8Columns) * kInt8Columns * kPanel; }

  // Columns [from, from + count) of a panel in fp32, kPanel rows after kPanel rows.
  const float* read(int64_t panel, int64_t from, int64_t count, char* scratch) const {
    constexpr int64_t kAhead = 3072;  // bytes
    const Int8* step = weight.step(panel, from / kInt8Columns);
    auto* const to = reinterpret_cast<float*>(scratch);
    for (int64_t column = 0; column < count; column += kInt8Columns) {
      __builtin_prefetch(step + kAhead);
      __builtin_prefetch(step + kAhead + 64);
#pragma GCC unroll 8
      for (int r = 0; r < kInt8Rows; r += kWidth, step += kWidth * kInt8Columns) {
        const IntVec words = load(reinterpret_cast<const int32_t*>(step));
        float* at = to + r / kPanel * stride(count) + column * kPanel + r % kPanel;
#pragma GCC unroll 4
        for (int i = 0; i < kInt8Columns; ++i) {
          const IntVec q = (IntVec)((Bits)words << (24 - 8 * i)) >> 24;
          store(__builtin_convertvector(q, Vec), at + i * kPanel);
        }
      }
    }
    return to;
  }

  // Sums of the weights' bytes times their scales.
  float* settle(float* sums, int64_t panel, int64_t, int64_t rows) const {
    float* at = sums;
    for (int64_t col = panel * kRows; col < (panel + 1) * kRows; col += kPanel)
      for (int64_t r = 0; r < rows; ++r, at += kPanel)
        weight.for_each_vec_of_panel(col, [&](int64_t c, auto count) {
          store(load(at + c) * load(weight.scales + col + c, count), at + c);
        });
    return sums;
  }
};

#endif

// The form of a call, and the memory that it needs.
template <typename T>
LinearMemory int8_memory(void* at, int64_t rows, int64_t cols, int threads) {
  using Form = Int8Form<T>;
  const int64_t steps = parts_of(cols, Step<typename Form::Product>::kDepth);
  return {at, rows, steps, Form::scratch(cols), threads};
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
