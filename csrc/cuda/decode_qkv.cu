// The projections to q, k and v of a decoding step, rotated, with the write of k and v to the cache.
// What they compute: kernels/decode_qkv.py. How: gemv.cuh.
//
// A tile is as many rows of a head's first half as of its second, so that a thread has both values of
// a rotation. They are rotated as the fp32 sums they are and rounded once.

#include "gemv.cuh"

namespace internvl::cuda {
namespace {

template <typename T>
struct Qkv {
  static constexpr bool kPaired = true;
  struct Early {
    float first, second;  // of the bias
    float cos, sin;
    int64_t slot;
  };
  const T* bias;
  int heads, key_heads, dim;
  const T *cos, *sin;
  const int64_t* positions;
  int64_t positions_stride;
  const int64_t* slots;
  int64_t slots_stride;
  T* q;
  Heads<T> k_cache, v_cache;

  template <int OUTPUTS>
  __device__ __forceinline__ TileRows rows(int tile) const {
    const int tiles = dim / 2 / OUTPUTS;
    const int64_t first = int64_t{tile / tiles} * dim + tile % tiles * OUTPUTS;
    return {first, first + dim / 2};
  }

  template <int OUTPUTS>
  __device__ __forceinline__ Early fetch(int tile, int n, int output) const {
    const TileRows at = rows<OUTPUTS>(tile);
    const int64_t angle = positions[n * positions_stride] * (dim / 2) + at.first % dim + output;
    Early early{0.0f, 0.0f, to_float(cos[angle]), to_float(sin[angle]), slots[n * slots_stride]};
    if (bias) {
      early.first = to_float(bias[at.first + output]);
      early.second = to_float(bias[at.second + output]);
    }
    return early;
  }

  template <int OUTPUTS>
  __device__ __forceinline__ void store(int tile, int n, int output, bool there, float first,
                                        float second, const Early& early) const {
    if (!there) return;
    const TileRows at = rows<OUTPUTS>(tile);
    const int64_t head = at.first / dim, place = at.first % dim + output;
    first += early.first, second += early.second;
    T* to = v_cache.at(n, head - heads - key_heads, early.slot);
    if (head < heads + key_heads) {
      to = head < heads ? q + (n * heads + head) * dim
                        : k_cache.at(n, head - heads, early.slot);
      const float turned = second * early.cos + first * early.sin;
      first = first * early.cos - second * early.sin;
      second = turned;
    }
    to[place] = from_float<T>(first);
    to[place + dim / 2] = from_float<T>(second);
  }
};

template <typename T>
Heads<T> typed(Heads<void> x) {
  return {static_cast<T*>(x.data), x.batch_stride, x.head_stride, x.token_stride};
}

}  // namespace

void decode_qkv(int dtype, const GemvInput& x, const GemvWeight& weight, const void* bias,
                const QkvTarget& to, cudaStream_t stream) {
  with_form<true>(dtype, weight, [&](auto form, const auto& held) {
    using T = typename decltype(form)::Type;
    const Qkv<T> qkv{static_cast<const T*>(bias),
                     static_cast<int>(to.heads),
                     static_cast<int>(to.key_heads),
                     static_cast<int>(to.dim),
                     static_cast<const T*>(to.cos),
                     static_cast<const T*>(to.sin),
                     to.positions,
                     to.positions_stride,
                     to.slots,
                     to.slots_stride,
                     static_cast<T*>(to.q),
                     typed<T>(to.k_cache),
                     typed<T>(to.v_cache)};
    launch_gemv<decltype(form)>(activations<T>(x), held, qkv, weight.rows / 2, stream);
  });
}

}  // namespace internvl::cuda
