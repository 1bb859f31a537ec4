// The arguments of the norms: RMSNorm and LayerNorm, by themselves and after a residual add.
#pragma once

#include <cstdint>

#include "../norms.h"
#include "../rows.h"

namespace internvl {

// y = norm(x), or residual_out = residual + x * scale and y = norm(residual_out). Contiguous: y,
// residual_out (rows, cols).
template <typename T>
struct NormCall {
  Norm norm;
  Rows<const T> x, residual;  // residual.data is null for no add
  const T *scale, *weight, *bias;  // scale may be null, for 1; RMSNorm has no bias
  T *y, *residual_out;
  int64_t rows, cols;
  float eps;
};

// dx = the gradient of the norm's input x (`passed` added to it), dbranch = dx * scale.
template <typename T>
struct NormBackwardCall {
  Norm norm;
  Rows<const T> grad, passed;  // of y; of residual_out, its data null for no add
  Rows<const T> x, branch;     // the norm's input; what was scaled and added to it
  const T *scale, *weight;     // scale may be null; then branch and dbranch are not used
  T *dx, *dbranch;             // (rows, cols), contiguous
  int64_t rows, cols;
  float eps;

  // The sums over rows, in this order: dweight, of LayerNorm dbias, with a scale dscale.
  int vectors() const { return 1 + (norm == Norm::layer) + (scale != nullptr); }
};

}  // namespace internvl
