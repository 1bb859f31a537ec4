// Rotary position embedding, on the CPU: kernels/rotary.py and kernels/rotary_append.py.
#pragma once

#include "../heads.h"
#include "vec.h"

namespace internvl::ISA {

// One head of one token: element j turns with element j + half. `sign` is -1 for the inverse rotation.
template <typename T>
void rotate(const T* x, const T* cos, const T* sin, float sign, T* y, int64_t half) {
  for_each_vec(half, [&](int64_t j, auto count) {
    const Vec x1 = load(x + j, count), x2 = load(x + half + j, count);
    const Vec c = load(cos + j, count), s = load(sin + j, count) * sign;
    store(x1 * c - x2 * s, y + j, count);
    store(x2 * c + x1 * s, y + half + j, count);
  });
}

template <typename T>
void rotary(Heads<const T> x, Heads<T> y, const T* cos, const T* sin, const int64_t* positions,
            int64_t positions_stride, float sign, Extent n, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t t = 0; t < n.tokens; ++t) {
      const int64_t row = positions[b * positions_stride + t] * (n.dim / 2);
      for (int64_t h = 0; h < n.heads; ++h)
        rotate(x.at(b, h, t), cos + row, sin + row, sign, y.at(b, h, t), n.dim / 2);
    }
}

template <typename T>
void rotary_append(Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> y,
                   Heads<T> k_cache, Heads<T> v_cache, const T* cos, const T* sin,
                   const int64_t* positions, int64_t positions_stride, const int64_t* slots,
                   int64_t slots_stride, Extent n, int64_t key_heads, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t t = 0; t < n.tokens; ++t) {
      const int64_t row = positions[b * positions_stride + t] * (n.dim / 2);
      const int64_t slot = slots[b * slots_stride + t];
      for (int64_t h = 0; h < n.heads; ++h)
        rotate(q.at(b, h, t), cos + row, sin + row, 1.0f, y.at(b, h, t), n.dim / 2);
      for (int64_t h = 0; h < key_heads; ++h) {
        rotate(k.at(b, h, t), cos + row, sin + row, 1.0f, k_cache.at(b, h, slot), n.dim / 2);
        std::memcpy(v_cache.at(b, h, slot), v.at(b, h, t), n.dim * sizeof(T));
      }
    }
}

}  // namespace internvl::ISA
