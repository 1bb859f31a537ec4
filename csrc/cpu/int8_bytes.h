// Linear layers over weights of 8 bits by instructions that multiply bytes: rows of x are rounded to bytes
// while they are packed, each by a scale of its own. Its few largest values are taken out first, and
// multiplied in fp32 when a panel is finished.
#pragma once

#include "int8_panels.h"
#include "quantize_rows.h"

namespace internvl::ISA {

static_assert(kPanel == kInt8Rows, "a panel fills the registers");

template <typename T>
struct Int8Form {
  typedef Int8 Product;
  typedef Step<Int8>::Word Word;
  static constexpr int kRows = kInt8Rows;
  static constexpr int64_t kBlockTiles = kTilesInL2;
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
  const Word* read(int64_t panel, int, int64_t from, int64_t, char*) const {
    return reinterpret_cast<const Word*>(weight.step(panel, from));
  }
  const char* address(int64_t panel, int64_t from) const {
    return reinterpret_cast<const char*>(weight.step(panel, from));
  }
  static int64_t bytes(int64_t steps) { return steps * kPanel * sizeof(Word); }

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

}  // namespace internvl::ISA
