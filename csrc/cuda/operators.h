// The CUDA launchers. Pointers are device memory, everything runs on `stream` of the current device.
// dtypes are 0 for float, 1 for bfloat16, 2 for half. They throw std::runtime_error where the launch
// fails. The caller checks that every row starts on 16 bytes and is a whole number of 16-byte loads
// (of 16 loads at most per warp: 16,384 columns of 16-bit elements).
#pragma once

#include <cuda_runtime_api.h>

#include "../heads.h"
#include "../norms.h"
#include "../rows.h"

namespace internvl::cuda {

// y = weight * round(x / rms(x)), of weight's type, or the LayerNorm of x, of its type; (rows, cols),
// contiguous. bias is LayerNorm's, of weight's type.
void norm(Norm norm, int dtype, int weight_dtype, Rows<const void> x, const void* weight,
          const void* bias, void* y, int64_t rows, int64_t cols, float eps, cudaStream_t stream);

// residual_out = residual + x * scale (scale may be null), y = norm(residual_out).
void add_norm(Norm norm, int dtype, int weight_dtype, Rows<const void> x, Rows<const void> residual,
              const void* scale, const void* weight, const void* bias, void* y, void* residual_out,
              int64_t rows, int64_t cols, float eps, cudaStream_t stream);

// Rotates q and k, which have n.heads and k_heads heads, by sign times the positions' angles.
void rotary(int dtype, Heads<const void> q, Heads<const void> k, Heads<void> q_out,
            Heads<void> k_out, const void* cos, const void* sin, const int64_t* positions,
            int64_t positions_stride, float sign, Extent n, int64_t k_heads, cudaStream_t stream);

// 1 to 8 rows of x, normalised while they are read where squares is there: x' = norm_weight *
// round(x / sqrt(the sum of the row's `partials` squares / columns + eps)).
struct GemvInput {
  const void* rows;
  int64_t row_stride;
  int count;
  int64_t columns;
  const float* squares;
  int64_t partials;
  const void* norm_weight;
  float eps;
};

// (rows, columns) in a form: 0 wide, of the dtype of x; 1 int8 and 2 int4, as kernels/_int8.py and
// _int4.py lay them out. columns: a multiple of 8.
struct GemvWeight {
  int form;
  const void* data;
  int64_t rows, columns;
  const void* scales;
  int group;
};

enum class Epilogue { none, gelu, swiglu, gelu_tanh, gelu_quick };  // as kernels/_gemv.py numbers them

// y = residual + epilogue(x' w^T + bias); bias, residual and squares may be null, squares gets
// (rows of x, ceil(columns of y / 16)) sums of y * y. dtype is not 0. With swiglu, int8 and int4 need
// a multiple of 64 rows, and there is neither residual nor squares.
void linear(int dtype, const GemvInput& x, const GemvWeight& weight, Epilogue epilogue,
            const void* bias, const void* residual, int64_t residual_stride, void* y,
            float* squares, cudaStream_t stream);

// Where the queries, keys and values of one new position of every row go: q (rows, heads, dim), and
// row n of the caches at slots[n * slots_stride], after the rotation of q and k by row
// positions[n * positions_stride] of cos and sin (.., dim / 2).
struct QkvTarget {
  int64_t heads, key_heads, dim;
  const void *cos, *sin;
  const int64_t* positions;
  int64_t positions_stride;
  const int64_t* slots;
  int64_t slots_stride;
  void* q;
  Heads<void> k_cache, v_cache;
};

// The projections of x' to q, k and v, rows of the weight in this order. dim: a multiple of 16, of 64
// for int8 and int4.
void decode_qkv(int dtype, const GemvInput& x, const GemvWeight& weight, const void* bias,
                const QkvTarget& target, cudaStream_t stream);

}  // namespace internvl::cuda
