// Rows of x in 8 bits, packed in tiles for linear_int4.h.
//
// Every row and group of columns has a scale of its own, its largest value over 127: what a few channels
// of a thousand times the usual size cost stays in their groups. Decided by that row alone.
#pragma once

#include "int4_step.h"

namespace internvl::ISA {

// How columns are cut. A tile holds for each group: the scales of its rows, what corrects their sums for
// weights n that mean n - 8, then (steps, kWords, rows) words of x.
struct Int4Columns {
  int64_t cols, group;

  int64_t groups() const { return parts_of(cols, group); }
  int64_t group_steps() const { return group / kInt4Step; }
  int64_t steps() const { return parts_of(cols, kInt4Step); }
  int64_t steps_of(int64_t index) const {
    return smaller(group_steps(), steps() - index * group_steps());
  }
  // Words of one row before group `index`; of all groups they are row_words().
  int64_t words_before(int64_t index) const {
    return 2 * index + smaller(index * group_steps(), steps()) * Int4Products::kWords;
  }
  int64_t row_words() const { return words_before(groups()); }
};

// Rounds `count` values of a row to 8 bits. Returns their scale: not finite where they are not.
template <typename T>
inline float quantize_group(const T* x, int64_t count, int8_t* to, int32_t* sum) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  IntVec most = {};  // of the bits without the sign, of which NaN's are the largest
  for_each_vec(count, [&](int64_t c, auto n) {
    const IntVec bits = (IntVec)load(x + c, n) & 0x7fffffff;
    most = bits > most ? bits : most;
  });
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = bits > most[i] ? bits : most[i];
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
  constexpr int32_t kShift = 0x4b400000;  // 1.5 * 2**23: adding it rounds to an integer
  IntVec sums = {};
  for_each_vec(count, [&](int64_t c, auto n) {
    const Vec shifted = load(x + c, n) * inverse + 12582912.0f;
    const IntVec rounded = (IntVec)shifted - kShift;
    sums += rounded;
    const Bytes bytes = __builtin_convertvector(rounded, Bytes);
    std::memcpy(to + c, &bytes, sizeof bytes);
  });
  *sum = 0;
  for (int i = 0; i < kWidth; ++i) *sum += sums[i];
  return largest / 127.0f;
}

// Packs `rows` rows of x, from row `first` on.
template <typename T>
void pack_int4_tile(Rows<const T> x, int64_t first, int64_t rows, const Int4Columns& columns,
                    uint32_t* tile) {
  constexpr int kWords = Int4Products::kWords;
  const T* row[kInt4Rows];
  for (int64_t r = 0; r < rows; ++r) row[r] = x[first + r];
  for (int64_t g = 0; g < columns.groups(); ++g) {
    const int64_t from = g * columns.group, count = smaller(columns.group, columns.cols - from);
    const int64_t steps = columns.steps_of(g);
    uint32_t* words = tile + 2 * rows;
    for (int64_t r = 0; r < rows; ++r) {
      int8_t q[128 + kWidth] = {};
      int32_t sum;
      const float scale = quantize_group(row[r] + from, count, q, &sum);
      const int32_t offset = -8 * sum;
      std::memcpy(tile + r, &scale, sizeof scale);
      std::memcpy(tile + rows + r, &offset, sizeof offset);
      for (int64_t s = 0; s < steps; ++s)
        for (int k = 0; k < kWords; ++k)
          words[(s * kWords + k) * rows + r] = int4_word(q + s * kInt4Step, k);
    }
    tile = words + steps * kWords * rows;
  }
}

}  // namespace internvl::ISA
