// The types that the operators' callers know: storage types and rows of a tensor. Holds no code that
// an instruction set would compile differently.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define INTERNVL_INLINE __host__ __device__ __forceinline__
#else
#define INTERNVL_INLINE [[gnu::always_inline]] inline
#endif

namespace internvl {

struct bf16 {
  uint16_t bits;
};

// A weight of 8 bits, or a value of x rounded to them: kernels/_int8.py.
struct Int8 {
  int8_t value;
};

// Row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride elements: a slice of a packed
// projection, or the first tokens of every sequence, is read where it lies. Its elements are adjacent.
template <typename T>
struct Rows {
  T* data;
  int64_t inner, outer_stride, inner_stride;

  INTERNVL_INLINE T* operator[](int64_t r) const {
    return data + r / inner * outer_stride + r % inner * inner_stride;
  }
};

}  // namespace internvl
