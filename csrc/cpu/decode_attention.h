// One query per row against the KV cache, on the CPU. What it computes: kernels/decode_attention.py.
//
// A task is one head of one row of the batch; keys and values are read once, where they lie.
#pragma once

#include <omp.h>

#include "vec.h"

namespace internvl::ISA {

constexpr int64_t kKeysPerSum = 64;  // of values in one chain of sums
constexpr int kChannelVecs = 4;      // whose sums stay in registers

// Scores of `length` keys, as exponents of two; returns the largest.
template <typename T>
float score_keys(const T* q, const T* k, int64_t k_stride, const uint8_t* real, int64_t length,
                 int64_t dim, float scale, float* scores) {
  float top = -__builtin_inff();
  for (int64_t key = 0; key < length; ++key) {
    Sum products;
    for_each_vec_in_chains(dim, [&](int64_t c, auto count, int chain) {
      products.chains[chain] += load(q + c, count) * load(k + key * k_stride + c, count);
    });
    const float score = products.nearly() * scale;
    scores[key] = real && !real[key] ? -__builtin_inff() : score;
    top = scores[key] > top ? scores[key] : top;
  }
  return top;
}

// Adds the values of all keys, each times its weight, into `out` divided by `total`: VECS vectors of
// channels, the last of `count` elements.
template <int VECS, typename T, typename Count>
void weigh_channels(const float* weights, const T* v, int64_t v_stride, int64_t length, float total,
                    Count count, T* out) {
  Vec sums[VECS] = {};
  for (int64_t first = 0; first < length; first += kKeysPerSum) {
    const int64_t end = first + kKeysPerSum < length ? first + kKeysPerSum : length;
    Vec chain[VECS] = {};
    for (int64_t key = first; key < end; ++key) {
      const T* row = v + key * v_stride;
      for (int i = 0; i + 1 < VECS; ++i) chain[i] += weights[key] * load(row + i * kWidth);
      chain[VECS - 1] += weights[key] * load(row + (VECS - 1) * kWidth, count);
    }
    for (int i = 0; i < VECS; ++i) sums[i] += chain[i];
  }
  for (int i = 0; i + 1 < VECS; ++i) store(sums[i] / total, out + i * kWidth);
  store(sums[VECS - 1] / total, out + (VECS - 1) * kWidth, count);
}

// q, out: (batch, heads, 1, dim). k, v: (batch, key_heads, tokens, dim), of which row b has lengths[b],
// at least 1, or all where lengths is null; query head h reads key head h / (heads / key_heads), which
// its neighbours find in the cache. key_padding_mask: (batch, tokens), 0 for padding, that nobody sees,
// or null. weights: (threads, tokens).
template <typename T>
void decode_attention(Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out,
                      const int64_t* lengths, const uint8_t* key_padding_mask, Extent n,
                      int64_t key_heads, float scale, float* weights, int threads) {
  constexpr float kLog2E = 1.44269504088896f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < n.batch * n.heads; ++task) {
    const int64_t b = task / n.heads, h = task % n.heads, length = lengths ? lengths[b] : n.tokens;
    const int64_t key_head = h / (n.heads / key_heads);
    float* weight = weights + omp_get_thread_num() * n.tokens;
    const float top = score_keys(q.at(b, h, 0), k.at(b, key_head, 0), k.token_stride,
                                 key_padding_mask ? key_padding_mask + b * n.tokens : nullptr, length,
                                 n.dim, scale * kLog2E, weight);
    const float largest = top == -__builtin_inff() ? 0.0f : top;  // of no key: all weights are 0
    Sum sum;
    for_each_vec(length, [&](int64_t key, auto count) {
      const Vec p = exp2(load(weight + key, count) - largest);
      store(p, weight + key, count);
      sum.chains[0] += load(weight + key, count);  // without what lies behind the last key
    });
    const float all = static_cast<float>(sum.total()), total = all == 0.0f ? 1.0f : all;
    int64_t c = 0;
    const T* values = v.at(b, key_head, 0);
    T* to = out.at(b, h, 0);
    for (; c + kChannelVecs * kWidth <= n.dim; c += kChannelVecs * kWidth)
      weigh_channels<kChannelVecs>(weight, values + c, v.token_stride, length, total, Full{}, to + c);
    for_each_vec(n.dim - c, [&](int64_t rest, auto count) {
      weigh_channels<1>(weight, values + c + rest, v.token_stride, length, total, count,
                        to + c + rest);
    });
  }
}

}  // namespace internvl::ISA
