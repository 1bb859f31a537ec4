// Rotary position embedding of queries and keys. What it computes: kernels/rotary.py.
//
// A block per token; a thread rotates 16 bytes of a head's first half with 16 of its second, for q and
// for k. cos and sin of the token are read by every head, from the first-level cache. Bound by memory.
// Compiled; not yet measured on a GPU.

#include "operators.h"
#include "vec.cuh"

namespace internvl::cuda {
namespace {

template <typename T>
__device__ __forceinline__ void rotate(const T* x, T* y, const float (&cos)[kPerLoad<T>],
                                       const float (&sin)[kPerLoad<T>], int64_t half) {
  constexpr int N = kPerLoad<T>;
  float first[N], second[N], y1[N], y2[N];
  load(x, first);
  load(x + half, second);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    y1[i] = first[i] * cos[i] - second[i] * sin[i];
    y2[i] = second[i] * cos[i] + first[i] * sin[i];
  }
  store(y1, y);
  store(y2, y + half);
}

constexpr int kThreads = 256;  // 32 heads of 64 bf16 pairs are 256 vectors

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(Heads<const T> q, Heads<const T> k, Heads<T> q_out, Heads<T> k_out, const T* cos,
                  const T* sin, const int64_t* positions, int64_t positions_stride, float sign,
                  Extent n, int64_t k_heads) {
  constexpr int N = kPerLoad<T>;
  const int64_t b = blockIdx.x / n.tokens, t = blockIdx.x % n.tokens, half = n.dim / 2;
  const int64_t row = positions[b * positions_stride + t] * half, per_head = half / N;
  const int64_t heads = n.heads > k_heads ? n.heads : k_heads;
  for (int64_t i = threadIdx.x; i < heads * per_head; i += blockDim.x) {
    const int64_t h = i / per_head, j = i % per_head * N;
    float c[N], s[N];
    load(cos + row + j, c);
    load(sin + row + j, s);
#pragma unroll
    for (int e = 0; e < N; ++e) s[e] *= sign;
    if (h < n.heads) rotate<T>(q.at(b, h, t) + j, q_out.at(b, h, t) + j, c, s, half);
    if (h < k_heads) rotate<T>(k.at(b, h, t) + j, k_out.at(b, h, t) + j, c, s, half);
  }
}

template <typename T, typename From>
Heads<T> typed(Heads<From> x) {
  return {static_cast<T*>(x.data), x.batch_stride, x.head_stride, x.token_stride};
}

}  // namespace

void rotary(int dtype, Heads<const void> q, Heads<const void> k, Heads<void> q_out,
            Heads<void> k_out, const void* cos, const void* sin, const int64_t* positions,
            int64_t positions_stride, float sign, Extent n, int64_t k_heads, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    rotary_kernel<T><<<grid(n.batch * n.tokens), kThreads, 0, stream>>>(
        typed<const T>(q), typed<const T>(k), typed<T>(q_out), typed<T>(k_out),
        static_cast<const T*>(cos), static_cast<const T*>(sin), positions, positions_stride, sign,
        n, k_heads);
  });
  check_launch("rotary");
}

}  // namespace internvl::cuda
