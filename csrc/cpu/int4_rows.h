// Rows of x in 8 bits, packed in tiles for linear_int4.h.
//
// Every row and group of columns has a scale of its own, its largest value over 127. Models of this size
// have channels 1,000 times as large as the others, beside which nothing would be left of their groups: a
// value above kInt4Far times the mean magnitude of its group is taken out, and multiplied in fp32 when a
// panel is finished. Decided by that row alone.
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

// All lanes of v joined by `join`.
template <typename Join>
inline int32_t fold(IntVec v, Join join) {
  int32_t lanes[kWidth];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
  return lanes[0];
}

constexpr float kInt4Far = 16.0f;

// What was taken out of a row: the first kMost of it.
struct Int4Outliers {
  static constexpr int kMost = 32;
  int32_t count;
  int32_t columns[kMost];
  float values[kMost];
};

// The largest magnitude of some values, NaN where there is one, and the sum of all.
template <typename T>
inline float largest_of(const T* x, int64_t count, float* total) {
  IntVec most = {};  // of the bits without the sign, of which NaN's are the largest
  Sum sum;
  for_each_vec(count, [&](int64_t c, auto n) {
    const IntVec bits = (IntVec)load(x + c, n) & 0x7fffffff;
    most = bits > most ? bits : most;
    sum.chains[0] += (Vec)bits;
  });
  *total = sum.nearly();
  const int32_t bits = fold(most, [](int32_t a, int32_t b) { return a > b ? a : b; });
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}

// Rounds `count` values to 8 bits. Returns their scale: not finite where they are not.
template <typename T>
inline float round_group(const T* x, int64_t count, float largest, int8_t* to, int32_t* sum) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
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
  *sum = fold(sums, [](int32_t a, int32_t b) { return a + b; });
  return largest / 127.0f;
}

// The same of the group of a row that begins at column `from`, without its outliers.
template <typename T>
inline float quantize_group(const T* x, int64_t from, int64_t count, int8_t* to, int32_t* sum,
                            Int4Outliers& outliers) {
  float total, largest = largest_of(x + from, count, &total);
  if (!(largest * count > kInt4Far * total)) return round_group(x + from, count, largest, to, sum);
  float kept[128];
  for_each_vec(count, [&](int64_t c, auto n) { store(load(x + from + c, n), kept + c, n); });
  while (largest * count > kInt4Far * total && outliers.count < Int4Outliers::kMost) {
    int64_t c = 0;
    while (kept[c] != largest && kept[c] != -largest) ++c;
    outliers.columns[outliers.count] = static_cast<int32_t>(from + c);
    outliers.values[outliers.count++] = kept[c];
    kept[c] = 0.0f;
    largest = largest_of(kept, count, &total);
  }
  return round_group(kept, count, largest, to, sum);
}

// Packs `rows` rows of x, from row `first` on.
template <typename T>
void pack_int4_tile(Rows<const T> x, int64_t first, int64_t rows, const Int4Columns& columns,
                    uint32_t* tile, Int4Outliers* outliers) {
  constexpr int kWords = Int4Products::kWords;
  const T* row[kInt4Rows];
  for (int64_t r = 0; r < rows; ++r) {
    row[r] = x[first + r];
    outliers[r].count = 0;
  }
  for (int64_t g = 0; g < columns.groups(); ++g) {
    const int64_t from = g * columns.group, count = smaller(columns.group, columns.cols - from);
    const int64_t steps = columns.steps_of(g);
    uint32_t* words = tile + 2 * rows;
    for (int64_t r = 0; r < rows; ++r) {
      int8_t q[128 + kWidth] = {};
      int32_t sum;
      const float scale = quantize_group(row[r], from, count, q, &sum, outliers[r]);
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
