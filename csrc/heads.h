// Tensors of shape (batch, heads, tokens, dim) with any strides but the last, which is 1.
#pragma once

#include "rows.h"

namespace internvl {

struct Extent {
  int64_t batch, heads, tokens, dim;
};

template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, head_stride, token_stride;

  INTERNVL_INLINE T* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch_stride + h * head_stride + t * token_stride;
  }
};

}  // namespace internvl
