// Rows of x as bytes: x[c] = (byte - 128) * scale, but for a few outliers that are kept as they are.
//
// Models of this size have channels 1,000 times as large as the others; with a scale for those nothing
// would be left of the rest. A value is an outlier where it is above 8 times the mean magnitude of those
// that are none: 6.4 deviations of a normal distribution. So no scale is above 8 / 127 of that mean, unless
// more than kOutliers values are: then the limit is doubled until there are no more. Each row decides alone.
//
// A row whose magnitudes have no finite sum, with NaN or infinity, gives NaN.
#pragma once

#include "vec.h"

namespace internvl::ISA {

constexpr int kOutliers = 64;
constexpr int kZero = 128;  // the byte of 0

struct QuantizedRow {
  float scale;
  int32_t outliers;
  int32_t columns[kOutliers];
  float values[kOutliers];
};

inline int64_t rounded_columns(int64_t cols) { return (cols + 63) / 64 * 64; }

// Of the magnitudes of a row up to a limit.
struct Magnitudes {
  float sum, largest;
  int64_t above;  // how many are beyond the limit
};

inline Vec magnitude(Vec v) { return (Vec)((Bits)v & 0x7fffffffu); }

template <typename T>
Magnitudes magnitudes(const T* x, int64_t cols, float limit) {
  Sum sum;
  Vec largest[4] = {};
  IntVec above[4] = {};
  for_each_vec_in_chains(cols, [&](int64_t c, auto count, int chain) __attribute__((always_inline)) {
    const Vec a = magnitude(load(x + c, count));
    const Vec kept = a > limit ? Vec{} : a;  // NaN too
    above[chain] += a > limit;               // -1 where it is
    sum.chains[chain] += kept;
    largest[chain] = kept > largest[chain] ? kept : largest[chain];
  });
  Magnitudes found{sum.nearly(), 0.0f, 0};
  for (int chain = 0; chain < 4; ++chain)
    for (int i = 0; i < kWidth; ++i) {
      if (largest[chain][i] > found.largest) found.largest = largest[chain][i];
      found.above -= above[chain][i];
    }
  return found;
}

// The limit above which values are outliers; `found` is of the whole row, and then of the rest.
template <typename T>
float outlier_limit(const T* x, int64_t cols, Magnitudes& found) {
  constexpr float kMeans = 8.0f, kNone = __builtin_inff();
  float limit = kMeans * (found.sum / cols);
  if (!(found.largest > limit)) return kNone;
  for (int64_t before = -1; before != found.above;) {  // without them the mean is smaller
    limit = kMeans * (found.sum / (cols - found.above));
    before = found.above;
    found = magnitudes(x, cols, limit);
  }
  for (; found.above > kOutliers; found = magnitudes(x, cols, limit)) limit *= 2.0f;
  return limit;
}

// A bit for each lane of v above the limit.
inline uint32_t lanes_above(Vec v, float limit) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)v, (__m512)(Vec{} + limit), _CMP_GT_OQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)(Vec{} + limit), _CMP_GT_OQ));
#endif
}

// The low byte of each lane.
inline void store_bytes(Bits v, uint8_t* to) {
#ifdef __AVX512F__
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
  std::memcpy(to, &bytes, 16);
#else
  const __m256i quads = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  const int low = _mm256_extract_epi32(quads, 0), high = _mm256_extract_epi32(quads, 4);
  std::memcpy(to, &low, 4);
  std::memcpy(to + 4, &high, 4);
#endif
}

// Rounds a row to bytes, of which there is room for rounded_columns(cols).
template <typename T>
void quantize_row(const T* x, int64_t cols, uint8_t* to, QuantizedRow& row) {
  constexpr float kShift = 12582912.0f + kZero;  // adding 1.5 * 2**23 rounds to an integer
  Magnitudes found = magnitudes(x, cols, __builtin_inff());
  row.outliers = 0;
  std::memset(to + cols, kZero, rounded_columns(cols) - cols);
  if (!(found.sum < __builtin_inff())) {
    row.scale = __builtin_nanf("");
    std::memset(to, kZero, cols);
    return;
  }
  const float limit = outlier_limit(x, cols, found);
  if (found.largest < 1e-30f) found.largest = 1e-30f;  // its reciprocal must be finite
  row.scale = found.largest / 127.0f;
  const float inverse = 127.0f / found.largest;
  for_each_vec(cols, [&](int64_t c, auto count) {
    Vec v = load(x + c, count);
    for (uint32_t above = lanes_above(magnitude(v), limit); above; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      row.columns[row.outliers] = static_cast<int32_t>(c + lane);
      row.values[row.outliers++] = v[lane];
      v[lane] = 0.0f;
    }
    store_bytes((Bits)(v * inverse + kShift), to + c);
  });
}

}  // namespace internvl::ISA
