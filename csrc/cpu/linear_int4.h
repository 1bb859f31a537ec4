// Linear layers over weights in 4 bits, on the CPU. What they compute: kernels/linear_int4.py.
//
//   y (M, F) = residual + epilogue(x (M, C) @ weight.T + bias)
//
// x is rounded to 8 bits (int4_rows.h). The sum of a group's products is an exact integer; groups follow
// each other in fp32, each times the product of both scales. Any number of rows takes this one path, so no
// bit of a row depends on the other rows of the batch or on the number of threads. Few rows are bound by
// reading the weights; many have twice the products an instruction that bf16 has.
#pragma once

#include <omp.h>

#include "int4_rows.h"
#include "linear_epilogue.h"

namespace internvl::ISA {

constexpr int64_t kInt4Chain = 64;           // steps of a panel, 8 KiB, that all tiles of a block take
constexpr int64_t kInt4Ahead = 32;           // steps, 4 KiB: what memory delivers in its latency
constexpr int64_t kInt4BlockWords = 150000;  // of x, which stay in L2
constexpr int64_t kInt4GroupPanels = 16;     // panels that a block of x meets while it is there
constexpr int64_t kInt4FewPanels = 4;        // that a thread takes at a time where there is one block
constexpr int64_t kInt4PackedRows = 1024;    // rows of x packed at a time: bounds the workspace

// Adds the product of a tile of x and a panel to sums (ROWS, kInt4Panel), for groups [first, last).
// x: the tile from group `first` on. On the way, LINES cache lines a step are asked for from `soon` on.
template <int ROWS, int LINES>
void multiply_int4(const Int4Columns& columns, const uint32_t* x, const uint8_t* panel,
                   const uint16_t* scales, float* sums, int64_t first, int64_t last,
                   const uint8_t* soon) {
  using P = Int4Products;
  constexpr int64_t kHalf = 4 * kWidth;  // bytes of a vector
  for (int64_t col = 0; col < kInt4Panel; col += 2 * kWidth) {
    const uint32_t* words = x;
    const uint8_t* weights = panel + first * columns.group_steps() * kInt4Bytes + 4 * col;
    for (int64_t g = first; g < last; ++g) {
      const uint32_t *row_scales = words, *offsets = words + ROWS;
      words += 2 * ROWS;
      IntVec total[ROWS][2];
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) total[r][0] = total[r][1] = (IntVec)(offsets[r] + Bits{});
      for (int64_t left = columns.steps_of(g); left > 0; left -= P::kSpan) {
        P sum[ROWS][2];
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
          for (int half = 0; half < 2; ++half) sum[r][half].begin(total[r][half]);
        for (int64_t s = smaller(left, P::kSpan); s > 0; --s) {
          if (LINES > 0 && col == 0) {
            __builtin_prefetch(soon, 0, LINES > 1 ? 3 : 2);
            if (LINES > 1) __builtin_prefetch(soon + 64);
            soon += LINES * 64;
          }
#pragma GCC unroll 4
          for (int k = 0; k < P::kWords; ++k) {
            const IntVec w0 = int4_part(load_int(weights), k);
            const IntVec w1 = int4_part(load_int(weights + kHalf), k);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r) {
              const IntVec word = (IntVec)(words[k * ROWS + r] + Bits{});
              sum[r][0].add(w0, word);
              sum[r][1].add(w1, word);
            }
          }
          weights += kInt4Bytes;
          words += P::kWords * ROWS;
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
          for (int half = 0; half < 2; ++half) total[r][half] = sum[r][half].total();
      }
      const uint16_t* scale = scales + g * kInt4Panel + col;
      if (LINES > 1) __builtin_prefetch(scale + kInt4Ahead * kInt4Panel);  // in the end the next panel's
      const Vec scale0 = load_half(scale), scale1 = load_half(scale + kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const Vec row_scale = (Vec)(row_scales[r] + Bits{});
        float* to = sums + r * kInt4Panel + col;
        const Vec product0 = __builtin_convertvector(total[r][0], Vec);
        const Vec product1 = __builtin_convertvector(total[r][1], Vec);
        store(load(to) + product0 * (scale0 * row_scale), to);
        store(load(to + kWidth) + product1 * (scale1 * row_scale), to + kWidth);
      }
    }
  }
}

// multiply_int4 for tiles of `rows` rows.
using MultiplyInt4 = void (*)(const Int4Columns&, const uint32_t*, const uint8_t*, const uint16_t*,
                              float*, int64_t, int64_t, const uint8_t*);
template <int LINES>
MultiplyInt4 multiply_int4_of(int64_t rows) {
#define INTERNVL_ROWS(n) multiply_int4<n, LINES>
  static constexpr MultiplyInt4 kBy[] = {
      nullptr,          INTERNVL_ROWS(1), INTERNVL_ROWS(2), INTERNVL_ROWS(3), INTERNVL_ROWS(4),
      INTERNVL_ROWS(5), INTERNVL_ROWS(6),
  };
  static_assert(kInt4Rows <= 6, "one for each number of rows of a tile");
#undef INTERNVL_ROWS
  return kBy[rows];
}

// How a call is cut: blocks of tiles by groups of panels.
struct Int4Plan {
  Int4Columns columns;
  int64_t sets, panels;  // sets: 2 with SwiGLU, whose gate and up panels go together
  Split tiles, blocks, groups;

  Int4Plan(Int4Columns cut, int64_t rows, int64_t features, int64_t sets, int threads)
      : columns(cut), sets(sets), panels(parts_of(features / sets, kInt4Panel)) {
    tiles = {rows, parts_of(rows, kInt4Rows)};
    const int64_t words = tiles.size(0) * columns.row_words();
    const int64_t together = kInt4BlockWords > words ? kInt4BlockWords / words : 1;
    blocks = {tiles.parts, parts_of(tiles.parts, together)};
    // One block: a few panels at a time, as threads become free; what is asked for ahead at the end of
    // the last one is another thread's. Else every thread gets several groups.
    int64_t count = parts_of(panels * sets, blocks.parts == 1 ? kInt4FewPanels : kInt4GroupPanels);
    count = parts_of(count * blocks.parts, 2 * threads) * 2 * threads / blocks.parts;
    groups = {panels, count < 1 ? 1 : smaller(count, panels)};
  }
  int64_t first_row(int64_t block) const { return tiles.start(blocks.start(block)); }
};

// The product of the rows of a block and one panel, to sums (rows, kInt4Panel).
inline void multiply_int4_panel(const Int4Plan& plan, int64_t block, const uint32_t* x,
                                const uint8_t* panel, const uint16_t* scales, float* sums) {
  const Int4Columns& columns = plan.columns;
  const bool alone = plan.blocks.size(block) == 1;  // a tile: nothing of the panel is read again
  const int64_t groups = columns.groups();
  const int64_t chain = alone ? groups : kInt4Chain / columns.group_steps();
  const int64_t begin = plan.blocks.start(block), end = begin + plan.blocks.size(block);
  const int64_t first_row = plan.tiles.start(begin), rows = plan.tiles.start(end) - first_row;
  std::memset(sums, 0, rows * kInt4Panel * sizeof *sums);
  for (int64_t first = 0; first < groups; first += chain) {
    const int64_t ahead = alone ? kInt4Ahead : chain * columns.group_steps();
    const uint8_t* next = panel + (first * columns.group_steps() + ahead) * kInt4Bytes;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = plan.tiles.start(t), size = plan.tiles.size(t);
      const uint32_t* tile = x + row * columns.row_words() + size * columns.words_before(first);
      // One tile asks for the weights of the next chain, or each of two for half of them: while the
      // processor waits for them at once, it multiplies nothing.
      const auto multiply = alone           ? multiply_int4_of<2>(size)
                            : t - begin < 2 ? multiply_int4_of<1>(size)
                                            : multiply_int4_of<0>(size);
      multiply(columns, tile, panel, scales, sums + (row - first_row) * kInt4Panel, first,
               smaller(first + chain, groups), next + (t - begin) * kInt4Chain * 64);
    }
  }
}

// Adds the products of what was taken out of a row to its sums.
inline void add_int4_outliers(const Int4Columns& columns, const Int4Outliers& outliers,
                              const uint8_t* panel, const uint16_t* scales, float* sums) {
  for (int32_t i = 0; i < outliers.count; ++i) {
    const int64_t column = outliers.columns[i], within = column % kInt4Step;
    const uint8_t* step = panel + column / kInt4Step * kInt4Bytes;
    const uint16_t* scale = scales + column / columns.group * kInt4Panel;
    for (int64_t c = 0; c < kInt4Panel; c += kWidth) {
      const IntVec halves = (IntVec)((Bits)load_int(step + 4 * c) >> (within % 4 * 8 + within / 4 * 4));
      const Vec levels = __builtin_convertvector((halves & 15) - 8, Vec);
      store(load(sums + c) + levels * (load_half(scale + c) * outliers.values[i]), sums + c);
    }
  }
}

// Rows `block` of the product with the panels of `group`, into the output.
template <typename T>
void linear_int4_task(const Int4Weight& weight, const Output<T>& out, const Int4Plan& plan, int64_t block,
                      int64_t group, const uint32_t* x, const Int4Outliers* outliers, float* sums,
                      int64_t row_offset) {
  const int64_t panel_bytes = plan.columns.steps() * kInt4Bytes;
  const int64_t panel_scales = plan.columns.groups() * kInt4Panel;
  const int64_t first_row = plan.first_row(block), rows = plan.first_row(block + 1) - first_row;
  float* ups = sums + rows * kInt4Panel;
  for (int64_t i = 0; i < plan.groups.size(group); ++i) {
    const int64_t first = plan.groups.start(group) + i;
    for (int64_t set = 0; set < plan.sets; ++set) {
      const uint8_t* panel = weight.packed + (first + set * plan.panels) * panel_bytes;
      const uint16_t* scales = weight.scales + (first + set * plan.panels) * panel_scales;
      float* to = set ? ups : sums;
      multiply_int4_panel(plan, block, x, panel, scales, to);
      for (int64_t r = 0; r < rows; ++r)
        add_int4_outliers(plan.columns, outliers[first_row + r], panel, scales, to + r * kInt4Panel);
    }
    finish_panel<kInt4Panel>(out, sums, ups, row_offset + first_row, rows, first * kInt4Panel);
  }
}

// The memory of one call, in words of 32 bits: x in tiles, its outliers, the sums of each thread.
struct Int4Memory {
  int64_t x, outliers, sums;

  Int4Memory(const Int4Columns& columns, int64_t rows)
      : x(smaller(rows, kInt4PackedRows) * columns.row_words()),
        outliers(smaller(rows, kInt4PackedRows) * sizeof(Int4Outliers) / 4) {
    const int64_t tiles = parts_of(kInt4BlockWords, columns.row_words() * kInt4Rows);
    sums = smaller(rows, (tiles + 1) * kInt4Rows) * kInt4Panel * 2;
  }
};

// Bytes of scratch memory that linear_int4() needs.
inline int64_t linear_int4_workspace(int64_t rows, int64_t cols, int64_t group, int threads) {
  const Int4Memory memory({cols, group}, rows);
  return 4 * (memory.x + memory.outliers + threads * memory.sums);
}

// bias, residual, y, epilogue, workspace: as of linear() in linear.h; F / 2 is whole panels with SwiGLU.
template <typename T>
void linear_int4(Rows<const T> x, const Int4Weight& weight, const T* bias, Rows<const T> residual, T* y,
                 int64_t rows, Epilogue epilogue, void* workspace, int threads) {
  const int64_t sets = epilogue == Epilogue::swiglu ? 2 : 1;
  const Output<T> out{bias, residual, y, weight.features / sets, epilogue};
  const Int4Columns columns{weight.cols, weight.group};
  const Int4Memory memory(columns, rows);
  uint32_t* tiles = static_cast<uint32_t*>(workspace);
  auto* outliers = reinterpret_cast<Int4Outliers*>(tiles + memory.x);
  float* sums = reinterpret_cast<float*>(tiles + memory.x + memory.outliers);
  for (int64_t offset = 0; offset < rows; offset += kInt4PackedRows) {
    const int64_t count = smaller(kInt4PackedRows, rows - offset);
    const Int4Plan plan(columns, count, weight.features, sets, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < plan.tiles.parts; ++t) {
        const int64_t row = plan.tiles.start(t);
        pack_int4_tile(x, offset + row, plan.tiles.size(t), columns, tiles + row * columns.row_words(),
                       outliers + row);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < plan.groups.parts * plan.blocks.parts; ++task)
        linear_int4_task(weight, out, plan, task % plan.blocks.parts, task / plan.blocks.parts, tiles,
                         outliers, sums + omp_get_thread_num() * memory.sums, offset);
    }
  }
}

}  // namespace internvl::ISA
