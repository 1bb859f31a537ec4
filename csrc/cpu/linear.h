// Linear layers over packed weights, on the CPU. What they compute: kernels/linear_packed.py.
//
//   y (M, F) = residual + epilogue(x (M, C) @ weight.T + bias)
//
// A weight is packed in panels of kPanel of its rows: (F / kPanel, steps, kPanel) words, absent rows 0; x
// in tiles of its rows (tiles.h). The order is that of Goto and van de Geijn, Anatomy of High-Performance Matrix
// Multiplication: a block of x stays in L2 while panels stream past it. Sums run over a chain of steps
// and are then added up: in fp32 one chain over 3,200 products has 2.5 times the error of eager PyTorch.
//
// No bit of a row depends on the other rows of the batch or on the number of threads.
#pragma once

#include <omp.h>

#include "linear_epilogue.h"
#include "tiles.h"

namespace internvl::ISA {

constexpr int64_t kBlockTiles = 140 / kTileRows;  // tiles of x that stay in L2 together
constexpr int64_t kGroupPanels = 16;              // panels whose sums stay in L2 together
constexpr int64_t kPackedRows = 1024;             // rows of x packed at a time: bounds the workspace
constexpr int64_t kFewTiles = 6;                  // below this, reading the weights takes the time

// The rows of a panel and the columns of a step: weights are packed so, by kernels/linear_packed.py.
template <typename T>
LinearPanel linear_panel() {
  return {kPanel, Step<T>::kDepth};
}

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
  constexpr int64_t kAhead = 24;  // steps, 3 KiB of bf16: what memory delivers in its latency
  const int64_t steps = smaller(plan.chain, plan.steps - from);
  const int64_t first_tile = plan.blocks.start(block), first_row = plan.tiles.start(first_tile);
  const char* soon = reinterpret_cast<const char*>(next);
  for (int64_t t = first_tile; t < first_tile + plan.blocks.size(block); ++t) {
    const int64_t row = plan.tiles.start(t), rows = plan.tiles.size(t);
    const uint32_t* tile = x + row * plan.steps + from * rows;
    float* tile_sums = sums + (row - first_row) * kPanel;
    if (plan.few() && t == first_tile) {
      multiply_tile_of<T, true>(rows)(tile, panel, tile_sums, steps, from == 0,
                    reinterpret_cast<const char*>(panel + kAhead * kPanel));
    } else {
      multiply_tile_of<T, false>(rows)(tile, panel, tile_sums, steps, from == 0, soon);
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

// x: rows of `cols`. packed: of a weight (features, cols). y: (rows, features), or half as wide
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
