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

}  // namespace internvl::cuda
