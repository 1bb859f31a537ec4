// What has no spelling in C++: PTX of single instructions. Without nvcc the same names come from
// tests/cuda_on_host, which computes them, so that a kernel's arithmetic is tested without a GPU.
#pragma once

#ifndef __CUDACC__
#include <cuda_on_host.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace internvl::cuda {

// nvcc 13.0 splits the store of a struct into words in rotary.cu, so the instruction is spelled out.
__device__ __forceinline__ void store_16_bytes(const void* from, void* to) {
  const uint4 bits = *static_cast<const uint4*>(from);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// 16 bytes that one block reads once and no kernel in flight writes: weights. They leave the first-level
// cache to the activations, and may be asked for before wait_for_inputs().
__device__ __forceinline__ uint4 load_weights(const void* from) {
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(from)));
  return bits;
}

__device__ __forceinline__ void prefetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

// Programmatic dependent launch: a kernel starts while the one before it still runs, and waits here until
// that has ended and what it wrote can be read. A no-op before sm_90.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, once every block of this one has said so.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// c += a b on the matrix unit, over a warp: a (16, 16) and b (16, 8) of T, c (16, 8) of float. With g
// the lane / 4 and t the lane % 4: a holds rows g, g + 8 (then again) of columns 2t, 2t + 1 (then 8
// further), b rows 2t, 2t + 1 (then 8 further) of column g, c rows g, g + 8 of columns 2t, 2t + 1.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// a - b of the two T in each.
template <typename T>
__device__ __forceinline__ uint32_t subtract_pair(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair difference = __hsub2(*reinterpret_cast<Pair*>(&a), *reinterpret_cast<Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&difference);
}

// value, of which the compiler does not know that it is the same in every turn of a loop: it computes
// what follows from it there, and keeps no register for it.
__device__ __forceinline__ int computed_again(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The shared memory that the launch asked for.
__device__ __forceinline__ char* dynamic_shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

}  // namespace internvl::cuda
#endif
