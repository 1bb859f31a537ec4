// The arguments of one attention on the CPU, as the bindings fill them.
#pragma once

#include "../heads.h"

namespace internvl {

// Which keys a row may see: kernels/attention.py.
enum class Mask { full = 0, causal = 1, prefix = 2, block = 3 };

// Row r of the batch of q reads keys and values of image r / repeats where `interleave`, else of image
// r % images; head h those of head h / (heads / key_heads).
template <typename T>
struct AttentionCall {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;  // (images * repeats, heads, queries), or null

  const T *q_weight, *k_weight;  // (heads * dim) each, of the norms of q and k, or null for none
  float eps;
  float* rstd;  // with norms, (2, images, keys): the statistics of q and k, written here

  Mask mask;
  int64_t prefix;
  const uint8_t* key_padding_mask;  // (images, keys), 0 for padding, that nobody sees, or null
  Heads<const uint8_t> seen;  // (rows of q, heads, queries, keys), 0 where hidden, or null data

  int64_t images, repeats, heads, key_heads, queries, keys, dim;
  bool interleave;
  float scale;
};

}  // namespace internvl
