// Linear layers over packed weights, on the CPU. What they compute: kernels/linear_packed.py.
//
//   y (M, F) = residual + epilogue(x (M, C) @ weight.T + bias)
//
// A weight is packed in panels of kPanel of its rows: (F / kPanel, steps, kPanel) words. A step is what
// one instruction multiplies in a lane: two bf16 values (vdpbf16ps), else one value. x is packed in tiles
// of at most kTileRows rows: (tile, steps, rows) words. The sums of a tile and a panel fill the registers;
// each step loads two vectors of weights and broadcasts the tile's words. The order is that of Goto and
// van de Geijn, Anatomy of High-Performance Matrix Multiplication: a block of x stays in L2 while panels
// stream past it. Sums run over a chain of steps and are then added up: in fp32 one chain over 3,200
// products has 2.5 times the error of eager PyTorch.
//
// No bit of a row depends on the other rows of the batch or on the number of threads.
#pragma once

#include <omp.h>

#include "linear_epilogue.h"
#include "vec.h"

namespace internvl::ISA {

constexpr int kPanel = 2 * kWidth;
#ifdef __AVX512F__
constexpr int kTileRows = 14;  // 28 of 32 registers hold sums
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif
constexpr int64_t kBlockTiles = 140 / kTileRows;  // tiles of x that stay in L2 together
constexpr int64_t kGroupPanels = 16;              // panels whose sums stay in L2 together
constexpr int64_t kPackedRows = 1024;             // rows of x packed at a time: bounds the workspace
constexpr int64_t kFewTiles = 6;                  // below this, reading the weights takes the time

// How T is multiplied: kDepth columns of C a step, Word what a panel holds of them, chain() the steps of
// one chain of sums, which a block of x and of a panel spans. MKL has shorter ones where C is small.
template <typename T>
struct Step {
  static constexpr int kDepth = 1;
  static int64_t chain(int64_t steps) { return steps > 1024 ? 256 : 32; }
  typedef T Word;
  static Vec weights(const Word* from) { return load(from); }
  static uint32_t pack(const T* from) {
    const float wide = widen(*from);
    uint32_t word;
    std::memcpy(&word, &wide, sizeof word);
    return word;
  }
  static Vec multiply_add(Vec sum, Vec x, Vec w) { return sum + x * w; }

  static float widen(float value) { return value; }
  static float widen(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
};

#ifdef __AVX512BF16__
template <>
struct Step<bf16> {
  static constexpr int kDepth = 2;
  static int64_t chain(int64_t) { return 320; }
  struct Word {
    bf16 pair[2];
  };
  static Vec weights(const Word* from) { return load(reinterpret_cast<const float*>(from)); }
  static uint32_t pack(const bf16* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
  }
  static Vec multiply_add(Vec sum, Vec x, Vec w) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

inline int64_t parts_of(int64_t total, int64_t size) { return (total + size - 1) / size; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// `total` things in `parts` of nearly the same size.
struct Split {
  int64_t total, parts;

  int64_t start(int64_t part) const {
    return part * (total / parts) + smaller(part, total % parts);
  }
  int64_t size(int64_t part) const { return total / parts + (part < total % parts); }
};

// Elements of T that a packed weight takes.
template <typename T>
int64_t packed_elements(int64_t features, int64_t cols) {
  constexpr int64_t kDepth = Step<T>::kDepth;
  return parts_of(features, kPanel) * kPanel * parts_of(cols, kDepth) * kDepth;
}

// Packs weight (features, cols), rows `stride` apart, by panels; absent rows and columns are 0.
template <typename T>
void pack_linear(const T* weight, int64_t stride, T* packed, int64_t features, int64_t cols,
                 int threads) {
  using S = Step<T>;
  const int64_t steps = parts_of(cols, S::kDepth);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t panel = 0; panel < parts_of(features, kPanel); ++panel) {
    T* to = packed + panel * steps * kPanel * S::kDepth;
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t row = panel * kPanel; row < (panel + 1) * kPanel; ++row)
        for (int64_t c = step * S::kDepth; c < (step + 1) * S::kDepth; ++c)
          *to++ = row < features && c < cols ? weight[row * stride + c] : T{};
  }
}

// The inverse: weight (features, cols), contiguous.
template <typename T>
void unpack_linear(const T* packed, T* weight, int64_t features, int64_t cols, int threads) {
  using S = Step<T>;
  const int64_t steps = parts_of(cols, S::kDepth);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < features; ++row) {
    const T* from = packed + ((row / kPanel) * steps * kPanel + row % kPanel) * S::kDepth;
    for (int64_t c = 0; c < cols; ++c)
      weight[row * cols + c] = from[(c / S::kDepth) * kPanel * S::kDepth + c % S::kDepth];
  }
}

// Packs `rows` rows of x, from row `first` on: (steps, rows) words.
template <typename T>
void pack_tile(Rows<const T> x, int64_t first, int64_t rows, int64_t cols, uint32_t* tile) {
  using S = Step<T>;
  const int64_t whole = cols / S::kDepth;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x[first + r];
    uint32_t* to = tile + r;
    for (int64_t step = 0; step < whole; ++step) to[step * rows] = S::pack(from + step * S::kDepth);
    if (whole * S::kDepth < cols) {
      const T last[S::kDepth] = {from[cols - 1]};
      to[whole * rows] = S::pack(last);
    }
  }
}

// Adds the product of `steps` steps of a tile of x (steps, ROWS) and a panel to sums (ROWS, kPanel), or
// writes it there if `first`. On the way it asks for the weights at `next`: a cache line every four
// steps or, where STREAM, as many as it reads.
template <typename T, int ROWS, bool STREAM>
void multiply_tile(const uint32_t* x, const typename Step<T>::Word* panel, float* sums, int64_t steps,
                   bool first, const char* next) {
  using S = Step<T>;
  constexpr int kStepBytes = kPanel * sizeof(typename S::Word);
  Vec acc[ROWS][2];
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
    acc[r][0] = acc[r][1] = Vec{};
    __builtin_prefetch(sums + r * kPanel, 1);
    __builtin_prefetch(sums + r * kPanel + kWidth, 1);
  }
  const auto one_step = [&](int64_t step) __attribute__((always_inline)) {
    const Vec w0 = S::weights(panel + step * kPanel);
    const Vec w1 = S::weights(panel + step * kPanel + kWidth);
    if (STREAM) {
      __builtin_prefetch(next + step * kStepBytes);
      if (kStepBytes > 64) __builtin_prefetch(next + step * kStepBytes + 64);
    }
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
      const Vec word = (Vec)(x[step * ROWS + r] + Bits{});
      acc[r][0] = S::multiply_add(acc[r][0], word, w0);
      acc[r][1] = S::multiply_add(acc[r][1], word, w1);
    }
  };
  int64_t step = 0;
  for (; step + 4 <= steps; step += 4) {
    if (!STREAM) __builtin_prefetch(next + step * 16, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) one_step(step + i);
  }
  for (; step < steps; ++step) one_step(step);
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) {
      float* sum = sums + r * kPanel + half * kWidth;
      store(first ? acc[r][half] : load(sum) + acc[r][half], sum);
    }
}

#ifdef __AVX512F__
#define INTERNVL_TILES(stream)                                                                   \
  nullptr, multiply_tile<T, 1, stream>, multiply_tile<T, 2, stream>, multiply_tile<T, 3, stream>, \
      multiply_tile<T, 4, stream>, multiply_tile<T, 5, stream>, multiply_tile<T, 6, stream>,      \
      multiply_tile<T, 7, stream>, multiply_tile<T, 8, stream>, multiply_tile<T, 9, stream>,      \
      multiply_tile<T, 10, stream>, multiply_tile<T, 11, stream>, multiply_tile<T, 12, stream>,   \
      multiply_tile<T, 13, stream>, multiply_tile<T, 14, stream>
#else
#define INTERNVL_TILES(stream)                                                                   \
  nullptr, multiply_tile<T, 1, stream>, multiply_tile<T, 2, stream>, multiply_tile<T, 3, stream>, \
      multiply_tile<T, 4, stream>, multiply_tile<T, 5, stream>, multiply_tile<T, 6, stream>
#endif

// The sizes of one call, and how it is cut: blocks of tiles by groups of panels.
struct LinearPlan {
  int64_t rows, cols, features, sets;  // sets: 2 with SwiGLU, whose gate and up panels go together
  int64_t steps, chain;
  Split tiles, blocks, groups;

  int64_t width() const { return features / sets; }
  bool few() const { return tiles.parts < kFewTiles; }
};

template <typename T>
LinearPlan plan_linear(int64_t rows, int64_t cols, int64_t features, int64_t sets, int threads) {
  const int64_t steps = parts_of(cols, Step<T>::kDepth);
  LinearPlan plan{rows, cols, features, sets, steps, Step<T>::chain(steps), {}, {}, {}};
  plan.tiles = {rows, parts_of(rows, kTileRows)};
  plan.blocks = {plan.tiles.parts, parts_of(plan.tiles.parts, kBlockTiles)};
  const int64_t panels = parts_of(features / sets, kPanel);
  // Few rows: the weights of a panel are read from end to end. Else every thread gets several groups.
  int64_t groups = plan.few() ? panels : parts_of(panels * sets, kGroupPanels);
  groups = parts_of(groups * plan.blocks.parts, 2 * threads) * 2 * threads / plan.blocks.parts;
  plan.groups = {panels, groups < 1 ? 1 : smaller(groups, panels)};
  return plan;
}

// Multiplies all tiles of a block with one panel, for one chain of steps from step `from` on.
template <typename T>
void multiply_panel(const LinearPlan& plan, int64_t block, const uint32_t* x,
                    const typename Step<T>::Word* panel, const typename Step<T>::Word* next,
                    float* sums, int64_t from) {
  using Multiply = void (*)(const uint32_t*, const typename Step<T>::Word*, float*, int64_t, bool,
                            const char*);
  static constexpr Multiply kShared[] = {INTERNVL_TILES(false)};
  static constexpr Multiply kStream[] = {INTERNVL_TILES(true)};
  constexpr int64_t kAhead = 24;  // steps, 3 KiB of bf16: what memory delivers in its latency
  const int64_t steps = smaller(plan.chain, plan.steps - from);
  const int64_t first_tile = plan.blocks.start(block), first_row = plan.tiles.start(first_tile);
  const char* soon = reinterpret_cast<const char*>(next);
  for (int64_t t = first_tile; t < first_tile + plan.blocks.size(block); ++t) {
    const int64_t row = plan.tiles.start(t), rows = plan.tiles.size(t);
    const uint32_t* tile = x + row * plan.steps + from * rows;
    float* tile_sums = sums + (row - first_row) * kPanel;
    if (plan.few() && t == first_tile) {
      kStream[rows](tile, panel, tile_sums, steps, from == 0,
                    reinterpret_cast<const char*>(panel + kAhead * kPanel));
    } else {
      kShared[rows](tile, panel, tile_sums, steps, from == 0, soon);
      soon += plan.few() ? 0 : steps * 16;
    }
  }
}

// Rows `block` of the product with the panels of `group`, into the output.
template <typename T>
void linear_task(const LinearPlan& plan, int64_t block, int64_t group, const uint32_t* x,
                 const T* packed, float* sums, const Output<T>& out, int64_t row_offset) {
  const auto* weights = reinterpret_cast<const typename Step<T>::Word*>(packed);
  const int64_t first = plan.groups.start(group), panels = plan.groups.size(group);
  const int64_t up = plan.width() / kPanel, count = panels * plan.sets;
  const auto panel_at = [&](int64_t i, int64_t from) {
    const int64_t panel = first + i / plan.sets + (i % plan.sets) * up;
    return weights + (panel * plan.steps + from) * kPanel;
  };
  const int64_t first_row = plan.tiles.start(plan.blocks.start(block));
  const int64_t end_tile = plan.blocks.start(block) + plan.blocks.size(block);
  const int64_t rows = plan.tiles.start(end_tile) - first_row;
  for (int64_t from = 0; from < plan.steps; from += plan.chain)
    for (int64_t i = 0; i < count; ++i) {
      const bool last = from + plan.chain >= plan.steps;
      const auto* next = i + 1 < count ? panel_at(i + 1, from)
                                       : panel_at(0, last ? from : from + plan.chain);
      multiply_panel<T>(plan, block, x, panel_at(i, from), next, sums + i * rows * kPanel, from);
    }
  for (int64_t i = 0; i < panels; ++i) {
    const float* panel_sums = sums + i * plan.sets * rows * kPanel;
    finish_panel(out, panel_sums, panel_sums + rows * kPanel, row_offset + first_row, rows,
                 (first + i) * kPanel);
  }
}

// Bytes of scratch memory that linear() needs.
template <typename T>
int64_t linear_workspace(int64_t rows, int64_t cols, int threads) {
  const int64_t x = smaller(rows, kPackedRows) * parts_of(cols, Step<T>::kDepth);
  const int64_t sums = smaller(rows, kBlockTiles * kTileRows) * kGroupPanels * kPanel;
  return 4 * (x + threads * sums);
}

// x: rows of `cols`. packed: by pack_linear, from (features, cols). y: (rows, features), or half as wide
// with SwiGLU, where features / 2 is a multiple of kPanel. bias and residual.data may be null.
template <typename T>
void linear(Rows<const T> x, const T* packed, const T* bias, Rows<const T> residual, T* y,
            int64_t rows, int64_t cols, int64_t features, Epilogue epilogue, void* workspace,
            int threads) {
  const int64_t sets = epilogue == Epilogue::swiglu ? 2 : 1;
  uint32_t* tiles = static_cast<uint32_t*>(workspace);
  const Output<T> out{bias, residual, y, features / sets, epilogue};
  for (int64_t offset = 0; offset < rows; offset += kPackedRows) {
    const auto plan =
        plan_linear<T>(smaller(kPackedRows, rows - offset), cols, features, sets, threads);
    float* sums = reinterpret_cast<float*>(tiles + smaller(rows, kPackedRows) * plan.steps);
    const int64_t share = smaller(rows, kBlockTiles * kTileRows) * kGroupPanels * kPanel;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < plan.tiles.parts; ++t)
        pack_tile(x, offset + plan.tiles.start(t), plan.tiles.size(t), cols,
                  tiles + plan.tiles.start(t) * plan.steps);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < plan.groups.parts * plan.blocks.parts; ++task)
        linear_task(plan, task % plan.blocks.parts, task / plan.blocks.parts, tiles, packed,
                    sums + omp_get_thread_num() * share, out, offset);
    }
  }
}

}  // namespace internvl::ISA
