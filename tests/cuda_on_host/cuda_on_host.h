// Runs CUDA kernels on the host, so that their arithmetic is tested without a GPU: g++ -x c++ with this
// folder before the others compiles csrc/cuda as ordinary C++. The threads of a block take turns as
// coroutines, which switch at barriers and at what a warp does together; blocks run one after the other.
//
// What it can show: wrong indices, wrong sums, a missing barrier (the turns may go backwards, see
// `backwards`), shared memory that nothing wrote (it holds NaN), activations that are read before the kernel
// waited for them (`on_wait` may put them there), launches that ask for too much.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::min;

// 16-bit floats

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float __bfloat162float(__nv_bfloat16 v) { return bits_as<float>(uint32_t{v.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = bits_as<uint32_t>(v);
  if (v != v) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fff;
  float size = rest * 0x1p-24f;  // below 2^-14
  if (rest >= 0x7c00)
    size = bits_as<float>(0x7f800000 | (rest & 0x3ff) << 13);
  else if (rest >= 0x400)
    size = bits_as<float>((rest << 13) + 0x38000000);
  return bits_as<float>(sign | bits_as<uint32_t>(size));
}

inline __half __float2half_rn(float v) {
  const uint32_t bits = bits_as<uint32_t>(v), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t rest = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  if (v != v)
    rest = 0x7e00;
  else if (size >= 0x477ff000)  // 65520 and more
    rest = 0x7c00;
  else if (size < 0x38800000)
    rest = static_cast<uint32_t>(std::nearbyint(std::fabs(v) * 0x1p24f));
  return {static_cast<uint16_t>(sign | rest)};
}

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i)
    found |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return found;
}

// Threads

namespace cuda_on_host {

inline bool backwards = false;         // the threads of a block take turns from the last to the first
inline std::function<void()> on_wait;  // called once a launch, when the first block waits for its inputs
inline int processors = 4;

class Block {
 public:
  static Block& now() {
    static Block block;
    return block;
  }

  void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    kernel_ = std::move(kernel);
    gridDim = grid, blockDim = block;
    waited_ = false;
    while (threads_.size() < block.x) start();
    count_ = static_cast<int>(block.x);
    shared_.resize(shared_bytes / sizeof(uint4) + 1);
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      std::memset(shared_.data(), 0xff, shared_.size() * sizeof(uint4));  // NaN
      left_ = count_, idle_ = 0;
      barrier_ = {}, warps_.assign((count_ + 31) / 32, {});
      for (auto& thread : threads_) thread->is_done = false;
      current_ = backwards ? count_ - 1 : 0;
      if (!_setjmp(return_)) resume();
    }
  }

  void synchronize() { meet(barrier_, count_, count_); }

  // Everybody's value of the warp, by lane.
  template <typename T>
  const T* exchange(const T& value) {
    static_assert(sizeof(T) <= kSlot);
    Warp& warp = warps_[threadIdx.x / 32];
    // Two sets in turn: who is late still reads the one before.
    char* slots = warp.slots[warp.meeting.count % 2];
    std::memcpy(slots + threadIdx.x % 32 * sizeof(T), &value, sizeof(T));
    meet(warp.meeting, min(32, count_), 32);
    return reinterpret_cast<const T*>(slots);
  }

  void wait_for_inputs() {
    synchronize();
    if (!waited_ && on_wait) on_wait();
    waited_ = true;
  }

  char* shared() { return reinterpret_cast<char*>(shared_.data()); }

 private:
  static constexpr int kSlot = 32;

  struct Meeting {
    int arrived = 0, count = 0;
  };
  struct Warp {
    Meeting meeting;
    alignas(16) char slots[2][32 * kSlot];
  };
  struct Thread {
    ucontext_t context;
    jmp_buf place;
    bool is_started = false, is_done = false;
    std::vector<char> stack = std::vector<char>(64 << 10);
  };

  void start() {
    threads_.push_back(std::make_unique<Thread>());
    Thread& thread = *threads_.back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, &Block::live, 0);
  }

  static void live() {
    while (true) {
      Block& block = now();
      block.kernel_();
      block.threads_[block.current_]->is_done = true;
      block.idle_ = 0;
      if (--block.left_ == 0) {
        if (!_setjmp(block.threads_[block.current_]->place)) _longjmp(block.return_, 1);
      } else {
        block.next(block.count_);
      }
    }
  }

  // Threads are asked within groups of `group`: a warp runs on until all of it waits for the others, as
  // far ahead of them as a chip might let it.
  void meet(Meeting& meeting, int expected, int group) {
    const int before = meeting.count;
    idle_ = 0;
    if (++meeting.arrived == expected) {
      meeting.arrived = 0, ++meeting.count;
      return;
    }
    while (meeting.count == before) next(group);
  }

  // Suspends the current thread and resumes another of its group; comes back when it is its turn.
  void next(int group) {
    if (++idle_ > 2 * count_) std::abort();  // somebody does not come to the barrier
    Thread& thread = *threads_[current_];
    const int first = current_ / group * group, size = min(group, count_ - first);
    do {
      current_ = first + (current_ - first + (backwards ? size - 1 : 1)) % size;
    } while (threads_[current_]->is_done && left_ > 0);
    if (!_setjmp(thread.place)) resume();
  }

  [[noreturn]] void resume() {
    Thread& thread = *threads_[current_];
    threadIdx.x = current_;
    if (thread.is_started) _longjmp(thread.place, 1);
    thread.is_started = true;
    setcontext(&thread.context);
    std::abort();
  }

  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<uint4> shared_;
  Meeting barrier_;
  int current_ = 0, count_ = 0, left_ = 0, idle_ = 0;
  bool waited_ = false;
  jmp_buf return_;
};

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::now().synchronize(); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return cuda_on_host::Block::now().exchange(value)[(threadIdx.x % 32) ^ mask];
}

// csrc/cuda/instructions.cuh

namespace internvl::cuda {

inline void store_16_bytes(const void* from, void* to) { std::memcpy(to, from, 16); }
inline uint4 load_weights(const void* from) { return *static_cast<const uint4*>(from); }
inline void prefetch_to_l2(const void*) {}
inline void wait_for_inputs() { cuda_on_host::Block::now().wait_for_inputs(); }
inline void start_next_kernel() {}
inline int computed_again(int value) { return value; }
inline char* dynamic_shared_memory() { return cuda_on_host::Block::now().shared(); }

template <typename T>
float half_of(uint32_t pair, int index) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * index);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float({bits});
  else
    return __bfloat162float({bits});
}

template <typename T>
uint32_t subtract_pair(uint32_t a, uint32_t b) {
  uint32_t found = 0;
  for (int i = 0; i < 2; ++i) {
    const float difference = half_of<T>(a, i) - half_of<T>(b, i);
    uint16_t bits;
    if constexpr (std::is_same_v<T, __half>)
      bits = __float2half_rn(difference).bits;
    else
      bits = __float2bfloat16_rn(difference).bits;
    found |= uint32_t{bits} << 16 * i;
  }
  return found;
}

template <typename T>
void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto* lanes = cuda_on_host::Block::now().exchange(Operands{{a0, a1, a2, a3}, {b0, b1}});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2, later = k / 8;
      const float a = half_of<T>(lanes[4 * g + lane].a[2 * later + half], k % 2);
      c[i] += a * half_of<T>(lanes[4 * column + lane].b[later], k % 2);
    }
  }
}

}  // namespace internvl::cuda

// The runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_host {
inline cudaError_t last_error = cudaSuccess;
inline int most_shared = 48 << 10;
}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_host::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_host::processors : 9;
}
template <typename Kernel>
void cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  cuda_on_host::most_shared = bytes;
}
template <typename... Parameters, typename... Arguments>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                        const Arguments&... arguments) {
  constexpr size_t kChip = 163 << 10;  // an A100's, the smallest
  const size_t most = std::exchange(cuda_on_host::most_shared, 48 << 10);
  const bool fits = config->dynamicSmemBytes <= min(most, kChip);
  if (!fits || config->gridDim.x == 0 || config->blockDim.x > 1024) {
    cuda_on_host::last_error = cudaErrorInvalidValue;
    return;
  }
  cuda_on_host::Block::now().run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                 [=] { kernel(arguments...); });
}
