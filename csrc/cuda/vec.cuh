// 16-byte loads and stores of float, half and bfloat16, and sums over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "instructions.cuh"

namespace internvl::cuda {

// As many elements as one 16-byte load of T brings.
template <typename T>
constexpr int kPerLoad = 16 / sizeof(T);

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  constexpr int M = N < kPerLoad<T> ? N : kPerLoad<T>;
#pragma unroll
  for (int start = 0; start < N; start += M) {
    const auto pack = *reinterpret_cast<const Pack<T, M>*>(from + start);
#pragma unroll
    for (int i = 0; i < M; ++i) to[start + i] = to_float(pack.values[i]);
  }
}

template <int N, typename T>
__device__ __forceinline__ void store(const float (&from)[N], T* to) {
  constexpr int M = N < kPerLoad<T> ? N : kPerLoad<T>;
#pragma unroll
  for (int start = 0; start < N; start += M) {
    Pack<T, M> pack;
#pragma unroll
    for (int i = 0; i < M; ++i) pack.values[i] = from_float<T>(from[start + i]);
    static_assert(sizeof pack == 16);
    store_16_bytes(&pack, to + start);
  }
}

// The sum over a block of whole warps, at most 32, in a fixed order; every thread gets it. A kernel's
// sums have SLOTs of their own: a warp may still read the last one.
template <int SLOT>
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float shares[32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? shares[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

// A grid of one block a row; CUDA has 2^31 - 1 along x.
inline unsigned grid(int64_t rows) {
  if (rows > INT32_MAX) throw std::runtime_error("more than 2^31 - 1 rows");
  return static_cast<unsigned>(rows);
}

// Calls body(T{}) with the storage type: 0 float, 1 bfloat16, 2 half.
template <typename Body>
void with_type(int dtype, Body body) {
  if (dtype == 0)
    body(float{});
  else if (dtype == 1)
    body(__nv_bfloat16{});
  else
    body(__half{});
}

// Rows are cut into kPerLoad<T>-wide vectors, kVectors a thread: two independent loads in flight.
constexpr int kVectors = 2;
constexpr int kMaxThreads = 1024;  // a kernel may use 64 registers: its launch bounds say so
template <typename T>
int threads_for(int64_t cols) {
  const int64_t per_thread = kVectors * kPerLoad<T>;
  const int64_t threads = (cols + per_thread - 1) / per_thread;
  return static_cast<int>((threads + 31) / 32 * 32);
}

}  // namespace internvl::cuda
