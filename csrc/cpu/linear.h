// Linear layers over packed weights, on the CPU. What it computes: kernels/packed.py.
//
//   y (M, F) = residual + epilogue(x (M, C) @ weight.T + bias)
//
// A weight is packed in panels of 32 rows: (F / 32, steps, 32) words, where a step is what one
// instruction multiplies in a lane: two bf16 values (vdpbf16ps) or one float. x is packed in tiles of at
// most 14 rows: (tile, steps, rows) words. 14 x 32 accumulators fill 28 of 32 registers; each step loads
// two vectors of weights and broadcasts 14 words of x. The order is that of Goto and van de Geijn,
// Anatomy of High-Performance Matrix Multiplication: 256 rows of x stay in L2 for 256 steps, while panels
// stream through L1. Sums run over 256 steps and are added up in blocks, as in fp32 a single chain over
// 3,200 products has 2.5 times the error of eager PyTorch. Which rows are in the batch and how many
// threads run changes no bit of a row's result.
//
// Included by isa_avx512_bf16.cpp; the instruction set is in the intrinsics, there is no portable form.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "linear_epilogue.h"
#include "scalar.h"

namespace internvl::ISA {

constexpr int64_t kTileRows = 14;       // rows of x a register tile holds
constexpr int64_t kBlockTiles = 18;     // tiles of x that stay in L2 together: 252 rows
constexpr int64_t kBlockSteps = 256;    // steps of one chain of sums: a panel's 32 KiB fit L1
constexpr int64_t kGroupPanels = 8;     // panels whose sums stay in L2 together
constexpr int64_t kSuperRows = 1024;    // rows of x packed at a time; bounds the workspace

// How a dtype is multiplied: a step is kDepth columns of C; Weight is what a lane of a panel holds.
template <typename T>
struct Step;

template <>
struct Step<bf16> {
  static constexpr int64_t kDepth = 2;
  using Weight = uint32_t;  // two bf16
  static __m512 weights(const Weight* from) { return _mm512_loadu_ps(from); }
  static __m512 multiply_add(__m512 sum, __m512 x, __m512 w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
};

template <>
struct Step<float> {
  static constexpr int64_t kDepth = 1;
  using Weight = float;
  static __m512 weights(const Weight* from) { return _mm512_loadu_ps(from); }
  static __m512 multiply_add(__m512 sum, __m512 x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
};

template <>
struct Step<fp16> {
  static constexpr int64_t kDepth = 1;
  using Weight = uint16_t;
  static __m512 weights(const Weight* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static __m512 multiply_add(__m512 sum, __m512 x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits `total` into `parts` of nearly the same size.
struct Split {
  int64_t total, parts;
  int64_t start(int64_t part) const {
    return part * (total / parts) + std::min(part, total % parts);
  }
  int64_t size(int64_t part) const { return total / parts + (part < total % parts); }
};

// Adds the product of `steps` steps of a tile of x (steps, ROWS) and a panel (steps, 32) to the sums
// (ROWS, 32), or writes it there if `first`. Asks for `next`, weights needed soon, on the way: all of
// their cache lines where STREAM (few rows: the weights come from memory), else a share.
template <typename T, int ROWS, bool STREAM>
void multiply_tile(const float* x, const typename Step<T>::Weight* panel, float* sums, int64_t steps,
                   bool first, const char* next) {
  using S = Step<T>;
  __m512 acc[ROWS][2];
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
    acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    _mm_prefetch(reinterpret_cast<const char*>(sums + r * kPanel), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(sums + r * kPanel + 16), _MM_HINT_T0);
  }
  constexpr int64_t kLine = 64, kRow = kPanel * sizeof(typename S::Weight);
  for (int64_t step = 0; step < steps; ++step) {
    const __m512 w0 = S::weights(panel), w1 = S::weights(panel + 16);
    if constexpr (STREAM) {
      for (int64_t at = 0; at < kRow; at += kLine) _mm_prefetch(next + at, _MM_HINT_T0);
      next += kRow;
    } else if (step % 4 == 0) {
      _mm_prefetch(next, _MM_HINT_T1);
      next += kLine;
    }
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
      const __m512 word = _mm512_set1_ps(x[r]);
      acc[r][0] = S::multiply_add(acc[r][0], word, w0);
      acc[r][1] = S::multiply_add(acc[r][1], word, w1);
    }
    x += ROWS;
    panel += kPanel;
  }
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* sum = sums + r * kPanel + half * 16;
      const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum);
      _mm512_storeu_ps(sum, _mm512_add_ps(before, acc[r][half]));
    }
  }
}
