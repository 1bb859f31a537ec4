// Reads an additive mask as a boolean one, on the CPU: kernels/attention_with_mask.py.
#pragma once

#include "../heads.h"
#include "vec.h"

namespace internvl::ISA {

// seen: 1 where the mask is 0, else 0. Returns whether all else is below half the lowest value, as what
// hides a key is; a sum with that is that.
template <typename T>
bool read_mask(Heads<const T> mask, Heads<uint8_t> seen, Extent n, int threads) {
  constexpr float kHides = -1.7e38f;
  int others = 0;
#pragma omp parallel for collapse(3) num_threads(threads) schedule(static) reduction(| : others)
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t h = 0; h < n.heads; ++h)
      for (int64_t s = 0; s < n.tokens; ++s) {
        const T* row = mask.at(b, h, s);
        uint8_t* to = seen.at(b, h, s);
        IntVec odd = {};
        for_each_vec(n.dim, [&](int64_t c, auto count) {
          const Vec value = load(row + c, count);  // 0 behind the row
          const IntVec is_zero = value == 0.0f;
          odd |= ~(is_zero | (value <= kHides));
          uint8_t bytes[kWidth];
          for (int i = 0; i < kWidth; ++i) bytes[i] = static_cast<uint8_t>(is_zero[i] & 1);
          std::memcpy(to + c, bytes, n.dim - c < kWidth ? n.dim - c : kWidth);
        });
        for (int i = 0; i < kWidth; ++i) others |= odd[i];
      }
  return others == 0;
}

}  // namespace internvl::ISA
