// The forms that a weight can have, for gemv.cuh: which 16 bytes a lane loads and how they become the
// operand a of multiply_add().
//
// The order of the columns in a product is free as long as a and b agree, and so is the order of the
// rows as long as the sums are put where they belong. So a lane takes what lies next to each other, and
// every form is read where the model holds it: nothing is laid out again for the GPU.
//
// A tile is the rows that one block computes at a time: kOutputs of them, or two groups of kOutputs
// where they are PAIRED (gate and up; the halves of a rotated head). A unit is the kColumns of a tile
// that a warp multiplies at once, kLane of them next to each other in a lane; kDepth units a warp are on their way: 64 to 80 bytes a thread.
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace internvl::cuda {

struct TileRows {
  int64_t first, second;
};

constexpr int kPanelRows = 32;  // of int8 and int4, see kernels/_int8.py and _int4.py

__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 4; }  // g of multiply_add
__device__ __forceinline__ int lane_quad() { return threadIdx.x % 4; }      // t

// A lane's part of b: V of its row of x, zeros where x has no such row.
template <typename V>
__device__ __forceinline__ V fragment(const void* from, bool there) {
  V found{};
  if (there) found = *static_cast<const V*>(from);
  return found;
}

// Rows of 16-bit floats, (rows, columns), row-major: a lane has 8 columns of two rows.
template <typename T, bool PAIRED>
struct Wide {
  using Type = T;
  static constexpr bool kScaled = false;  // rows have a scale
  static constexpr int kColumns = 32, kLane = 8, kDepth = 4, kPad = 32, kBlocks = 3;
  static constexpr int kOutputs = PAIRED ? 8 : 16, kSums = 16;

  struct Weight {
    const T* data;
    int64_t rows;
    int columns;
    const float* scales = nullptr;
  };
  struct Unit {
    uint4 first, second;
  };
  struct Sums {
    float values[4] = {};
  };
  const T *first, *second;

  __device__ __forceinline__ void seek(const Weight& weight, TileRows rows) {
    const int64_t last = weight.rows - 1;  // what comes behind it is computed and not stored
    first = weight.data + min(rows.first + lane_row(), last) * weight.columns + 8 * lane_quad();
    second = weight.data + min(rows.second + lane_row(), last) * weight.columns + 8 * lane_quad();
  }

  __device__ __forceinline__ Unit fetch(const Weight& weight, int unit) const {
    Unit found{};
    const int column = unit * kColumns;
    if (column + 8 * lane_quad() < weight.columns)
      found = {load_weights(first + column), load_weights(second + column)};
    return found;
  }

  __device__ __forceinline__ static void multiply(const Unit& unit, const T* x, bool there,
                                                  Sums& sums) {
    const uint4 b = fragment<uint4>(x, there);
    const uint4 &a = unit.first, &c = unit.second;
    multiply_add<T>(sums.values, a.x, c.x, a.y, c.y, b.x, b.y);
    multiply_add<T>(sums.values, a.z, c.z, a.w, c.w, b.z, b.w);
  }

  // Calls put(row of the tile, row of x, sum); those of the second group follow those of the first.
  template <typename Put>
  __device__ __forceinline__ static void each(const Sums& sums, Put put) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      put(lane_row() + 8 * (i / 2), 2 * lane_quad() + i % 2, sums.values[i]);
  }

  __device__ __forceinline__ static float row_scale(const Weight&, int64_t) { return 1.0f; }
};

// The first 16 bytes of a lane in the panel of a row, counted in 16 bytes: half the registers of a
// pointer. A step has 8 of them.
__device__ __forceinline__ uint32_t panel_vectors(int64_t row, int steps) {
  return (row / kPanelRows * steps + lane_quad()) * 8 + lane_row();
}

// What int8 and int4 share: a lane has rows 4g to 4g + 3 of a panel, in two tiles of multiply_add.
template <bool PAIRED>
struct Panels {
  static constexpr int kParts = PAIRED ? 2 : 1, kOutputs = kPanelRows, kSums = kParts * kPanelRows;

  struct Sums {
    float values[kParts][2][4] = {};
  };

  template <typename Put>
  __device__ __forceinline__ static void each(const Sums& sums, Put put) {
#pragma unroll
    for (int i = 0; i < 8 * kParts; ++i) {
      const int part = i / 8, tile = i / 4 % 2, half = i / 2 % 2;
      put(part * kPanelRows + 4 * lane_row() + 2 * tile + half, 2 * lane_quad() + i % 2,
          sums.values[part][tile][i % 4]);
    }
  }
};

// Two pairs of T.
struct Four {
  uint32_t low, high;
};

// Four signed bytes as T, exact. bfloat16 has 7 bits for what lies between 128 and 256, so the eighth is
// taken off: (128 + low bits) - (128 + sign bit) = byte.
template <typename T>
__device__ __forceinline__ Four widen_bytes(uint32_t bytes) {
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t shifted = bytes ^ 0x80808080;  // 1024 + byte + 128, less 1152
    return {subtract_pair<T>(__byte_perm(shifted, 0x64646464, 0x4140), 0x64806480),
            subtract_pair<T>(__byte_perm(shifted, 0x64646464, 0x4342), 0x64806480)};
  } else {
    const uint32_t low = __byte_perm(bytes, 0, 0x4140), high = __byte_perm(bytes, 0, 0x4342);
    return {subtract_pair<T>((low & 0x007f007f) | 0x43004300, (low & 0x00800080) | 0x43004300),
            subtract_pair<T>((high & 0x007f007f) | 0x43004300, (high & 0x00800080) | 0x43004300)};
  }
}

// The low halves of four bytes, n, as n - 8 in T: 1024 + n or 128 + n, less 1032 or 136.
template <typename T>
__device__ __forceinline__ Four widen_halves(uint32_t bytes) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  constexpr uint32_t kOffset = kHalf ? 0x64646464 : 0x43434343;
  constexpr uint32_t kLess = kHalf ? 0x64086408 : 0x43084308;
  const uint32_t low = bytes & 0x0f0f0f0f;
  return {subtract_pair<T>(__byte_perm(low, kOffset, 0x4140), kLess),
          subtract_pair<T>(__byte_perm(low, kOffset, 0x4342), kLess)};
}

// (P, S, 32, 4) signed bytes: 32 rows and 4 columns are 128 bytes, so a warp loads 512 in a row.
template <typename T, bool PAIRED>
struct Int8 : Panels<PAIRED> {
  using Type = T;
  using Panels<PAIRED>::kParts;
  using Sums = typename Panels<PAIRED>::Sums;
  static constexpr bool kScaled = true;
  static constexpr int kColumns = 16, kLane = 4, kDepth = 16 / kParts, kPad = 16, kBlocks = 2;

  struct Weight {
    const int8_t* data;
    int64_t rows;
    int columns, steps;
    const float* scales;  // of each row
  };
  struct Unit {
    uint4 words[kParts];
  };
  uint32_t panels[kParts];

  __device__ __forceinline__ void seek(const Weight& weight, TileRows rows) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      panels[part] = panel_vectors(part ? rows.second : rows.first, weight.steps);
  }

  __device__ __forceinline__ Unit fetch(const Weight& weight, int unit) const {
    Unit found{};
    if (4 * unit + lane_quad() < weight.steps)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        found.words[part] = load_weights(weight.data + 16 * (panels[part] + int64_t{32 * unit}));
    return found;
  }

  __device__ __forceinline__ static void multiply(const Unit& unit, const T* x, bool there,
                                                  Sums& sums) {
    const uint2 b = fragment<uint2>(x, there);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint4& words = unit.words[part];
      Four a = widen_bytes<T>(words.x), c = widen_bytes<T>(words.y);
      multiply_add<T>(sums.values[part][0], a.low, c.low, a.high, c.high, b.x, b.y);
      a = widen_bytes<T>(words.z), c = widen_bytes<T>(words.w);
      multiply_add<T>(sums.values[part][1], a.low, c.low, a.high, c.high, b.x, b.y);
    }
  }

  __device__ __forceinline__ static float row_scale(const Weight& weight, int64_t row) {
    return weight.scales[row];
  }
};

// (P, S, 32, 4) bytes: byte j of a row has columns j and 4 + j of its 8 in its halves. A unit has one
// scale a row; its products are summed before they are scaled.
template <typename T, bool PAIRED>
struct Int4 : Panels<PAIRED> {
  using Type = T;
  using Panels<PAIRED>::kParts;
  using Sums = typename Panels<PAIRED>::Sums;
  static constexpr bool kScaled = false;
  static constexpr int kColumns = 32, kLane = 8, kDepth = 6 / kParts, kPad = 32, kBlocks = 2;

  struct Weight {
    const uint8_t* data;
    int64_t rows;
    int columns, steps;
    const uint2* scales;  // half (P, groups, 32), of four rows each
    int groups;
    int group_shift;  // units to groups: 1 for 64 columns, 2 for 128
  };
  struct Unit {
    uint4 words[kParts];
    uint2 scales[kParts];
  };
  uint32_t panels[kParts], scales[kParts];  // of four rows each

  __device__ __forceinline__ void seek(const Weight& weight, TileRows rows) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int64_t row = part ? rows.second : rows.first;
      panels[part] = panel_vectors(row, weight.steps);
      scales[part] = row / kPanelRows * weight.groups * (kPanelRows / 4) + lane_row();
    }
  }

  __device__ __forceinline__ Unit fetch(const Weight& weight, int unit) const {
    Unit found{};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (4 * unit + lane_quad() < weight.steps)
        found.words[part] = load_weights(weight.data + 16 * (panels[part] + int64_t{32 * unit}));
      if (4 * unit < weight.steps)
        found.scales[part] = weight.scales[scales[part] + (unit >> weight.group_shift) * 8];
    }
    return found;
  }

  __device__ __forceinline__ static void multiply(const Unit& unit, const T* x, bool there,
                                                  Sums& sums) {
    const uint4 b = fragment<uint4>(x, there);
#pragma unroll
    for (int i = 0; i < 2 * kParts; ++i) {  // tiles, one after the other: registers are short
      const int part = i / 2, tile = i % 2;
      const uint4& words = unit.words[part];
      float products[4] = {};
      add(products, tile ? words.z : words.x, tile ? words.w : words.y, b);
      const uint32_t pair = tile ? unit.scales[part].y : unit.scales[part].x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint16_t bits = j / 2 ? pair >> 16 : pair & 0xffff;
        sums.values[part][tile][j] += __half2float(__ushort_as_half(bits)) * products[j];
      }
    }
  }

  __device__ __forceinline__ static void add(float (&sums)[4], uint32_t row, uint32_t next,
                                             uint4 b) {
    Four a = widen_halves<T>(row), c = widen_halves<T>(next);
    multiply_add<T>(sums, a.low, c.low, a.high, c.high, b.x, b.y);
    a = widen_halves<T>(row >> 4), c = widen_halves<T>(next >> 4);
    multiply_add<T>(sums, a.low, c.low, a.high, c.high, b.z, b.w);
  }

  __device__ __forceinline__ static float row_scale(const Weight&, int64_t) { return 1.0f; }
};

}  // namespace internvl::cuda
