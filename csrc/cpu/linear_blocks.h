// How the product of a linear layer is cut into blocks, for every form in which its weight is held.
//
//   y (M, F) = residual + epilogue(x (M, C) @ weight.T + bias)
//
// A weight lies in panels of Form::kRows of its rows; x is packed in tiles of its rows (tiles.h). The order
// is that of Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication: a block of x stays
// in L2 while panels stream past it. Sums run over a chain of steps and are then added up: in fp32 one
// chain over 3,200 products has 2.5 times the error of eager PyTorch.
//
// No bit of a row depends on the other rows of the batch or on the number of threads.
//
// A Form has
//   typedef ... Product          Step<Product> multiplies
//   kRows                        rows of a panel, a multiple of kPanel
//   kBlockTiles                  tiles of x in a block
//   kInPlace                     whether Step's words are what lies in memory; else read() widens them,
//                                and multiply_few() multiplies a whole panel by up to kFewRows rows
//   pack(row, first, rows, tile, scratch)  packs rows `first` of x on, row `row` on of those at hand
//   read(panel, part, from, steps, scratch)  the words of steps of kPanel rows, part `part` of a panel
//   address(panel, from)                   where they lie, to ask for them in time
//   bytes(steps)                           that they take there
//   settle(sums, panel, row, rows)         makes the finished product of sums, in their place
#pragma once

#include <omp.h>

#include "linear_epilogue.h"
#include "tiles.h"

namespace internvl::ISA {

constexpr int64_t kTilesInL2 = 140 / kTileRows;   // tiles of x that stay in L2 together
constexpr int64_t kGroupRows = 16 * kPanel;       // of the weight, whose sums stay in L2 together
constexpr int64_t kPackedRows = 1024;             // rows of x packed at a time: bounds the workspace
constexpr int64_t kFewTiles = 6;                  // below this, reading the weights takes the time

// The sizes of one call, and how it is cut: blocks of tiles by groups of panels.
struct LinearPlan {
  int64_t rows, cols, features, sets;  // sets: 2 with SwiGLU, whose gate and up panels go together
  int64_t steps, chain;
  Split tiles, blocks, groups;

  int64_t width() const { return features / sets; }
  bool few() const { return tiles.parts < kFewTiles; }
};

template <typename Form>
LinearPlan plan_linear(int64_t rows, int64_t cols, int64_t features, int64_t sets, int threads) {
  using S = Step<typename Form::Product>;
  const int64_t steps = parts_of(cols, S::kDepth);
  LinearPlan plan{rows, cols, features, sets, steps, S::chain(steps), {}, {}, {}};
  if constexpr (!Form::kInPlace)
    if (rows <= Form::kFewRows) plan.chain = steps;  // multiply_few() cuts them
  plan.tiles = {rows, parts_of(rows, kTileRows)};
  plan.blocks = {plan.tiles.parts, parts_of(plan.tiles.parts, Form::kBlockTiles)};
  const int64_t panels = parts_of(features / sets, Form::kRows);
  // Few rows: the weights of a panel are read from end to end. Else every thread gets several groups.
  int64_t groups = plan.few() ? panels : parts_of(panels * sets * Form::kRows, kGroupRows);
  groups = parts_of(groups * plan.blocks.parts, 2 * threads) * 2 * threads / plan.blocks.parts;
  plan.groups = {panels, groups < 1 ? 1 : smaller(groups, panels)};
  return plan;
}

// The memory of one call, 64-byte aligned: x in tiles, then what each thread has for itself.
struct LinearMemory {
  char* start;
  int64_t tiles, sums, scratch;  // bytes
  int threads;

  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  LinearMemory(void* at, int64_t rows, int64_t steps, int64_t block_tiles, int64_t scratch_bytes,
               int threads)
      : start(static_cast<char*>(at)),
        tiles(aligned(4 * smaller(rows, kPackedRows) * steps)),
        sums(aligned(4 * smaller(rows, block_tiles * kTileRows) * kGroupRows)),
        scratch(aligned(scratch_bytes)),
        threads(threads) {}

  uint32_t* packed_x() const { return reinterpret_cast<uint32_t*>(start); }
  char* of_thread(int thread) const { return start + tiles + thread * (sums + scratch); }
  int64_t bytes() const { return tiles + threads * (sums + scratch); }
  char* end() const { return start + bytes(); }
};

// Multiplies all tiles of a block with one panel, for one chain of steps from step `from` on. next: where
// the weights lie that come after it.
template <typename Form>
void multiply_panel(const LinearPlan& plan, const Form& form, int64_t block, const uint32_t* x,
                    int64_t panel, const char* next, typename Step<typename Form::Product>::Value* sums,
                    int64_t from, char* scratch) {
  using T = typename Form::Product;
  constexpr int64_t kAhead = 24;  // steps, 3 KiB of bf16: what memory delivers in its latency
  const int64_t steps = smaller(plan.chain, plan.steps - from);
  const int64_t first_tile = plan.blocks.start(block), first_row = plan.tiles.start(first_tile);
  const int64_t rows = plan.tiles.start(first_tile + plan.blocks.size(block)) - first_row;
  if constexpr (!Form::kInPlace)
    if (plan.rows <= Form::kFewRows)
      return form.multiply_few(x + first_row * plan.steps, rows, panel, sums);
  const char *soon = next, *end = next + form.bytes(steps);
  for (int part = 0; part < Form::kRows / kPanel; ++part) {
    const auto* words = form.read(panel, part, from, steps, scratch);
    for (int64_t t = first_tile; t < first_tile + plan.blocks.size(block); ++t) {
      const int64_t row = plan.tiles.start(t), count = plan.tiles.size(t);
      const uint32_t* tile = x + row * plan.steps + from * count;
      auto* tile_sums = sums + (row - first_row) * kPanel;
      if (Form::kInPlace && plan.few() && t == first_tile) {
        multiply_tile_of<T, true>(count)(tile, words, tile_sums, steps, from == 0,
                                         reinterpret_cast<const char*>(words + kAhead * kPanel));
      } else {
        multiply_tile_of<T, false>(count)(tile, words, tile_sums, steps, from == 0, soon);
        soon += plan.few() || soon >= end ? 0 : steps * 16;
      }
    }
    sums += rows * kPanel;
  }
}

// Rows `block` of the product with the panels of `group`, into the output.
template <typename Form, typename T>
void linear_task(const LinearPlan& plan, const Form& form, int64_t block, int64_t group,
                 const uint32_t* x, char* own, char* scratch, const Output<T>& out,
                 int64_t row_offset) {
  using Value = typename Step<typename Form::Product>::Value;
  auto* const sums = reinterpret_cast<Value*>(own);
  const int64_t first = plan.groups.start(group), count = plan.groups.size(group) * plan.sets;
  const int64_t up = plan.width() / Form::kRows;
  const auto panel_of = [&](int64_t i) { return first + i / plan.sets + (i % plan.sets) * up; };
  const int64_t first_row = plan.tiles.start(plan.blocks.start(block));
  const int64_t end_tile = plan.blocks.start(block) + plan.blocks.size(block);
  const int64_t rows = plan.tiles.start(end_tile) - first_row, size = rows * Form::kRows;
  for (int64_t from = 0; from < plan.steps; from += plan.chain)
    for (int64_t i = 0; i < count; ++i) {
      const bool last = from + plan.chain >= plan.steps;
      const char* next = i + 1 < count ? form.address(panel_of(i + 1), from)
                                       : form.address(panel_of(0), last ? from : from + plan.chain);
      Value* panel_sums = sums + i * size;
      multiply_panel(plan, form, block, x, panel_of(i), next, panel_sums, from, scratch);
      if (!last) continue;
      float* done = form.settle(panel_sums, panel_of(i), first_row, rows);
      if ((i + 1) % plan.sets) continue;
      for (int part = 0; part < Form::kRows / kPanel; ++part, done += rows * kPanel)
        finish_panel(out, done - (plan.sets - 1) * size, done, row_offset + first_row, rows,
                     (first + i / plan.sets) * Form::kRows + part * kPanel);
    }
}

// The whole product. rows, cols, features: M, C and F; F / 2 is a multiple of Form::kRows with SwiGLU.
template <typename Form, typename T>
void linear_product(const Form& form, const Output<T>& out, int64_t rows, int64_t cols,
                    int64_t features, const LinearMemory& memory) {
  const int64_t sets = out.epilogue == Epilogue::swiglu ? 2 : 1;
  uint32_t* tiles = memory.packed_x();
  for (int64_t offset = 0; offset < rows; offset += kPackedRows) {
    const auto plan = plan_linear<Form>(smaller(kPackedRows, rows - offset), cols, features, sets,
                                        memory.threads);
#pragma omp parallel num_threads(memory.threads)
    {
      char* own = memory.of_thread(omp_get_thread_num());
      char* scratch = own + memory.sums;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < plan.tiles.parts; ++t) {
        const int64_t row = plan.tiles.start(t);
        form.pack(row, offset + row, plan.tiles.size(t), tiles + row * plan.steps, scratch);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < plan.groups.parts * plan.blocks.parts; ++task)
        linear_task(plan, form, task % plan.blocks.parts, task / plan.blocks.parts, tiles, own,
                    scratch, out, offset);
    }
  }
}

}  // namespace internvl::ISA
