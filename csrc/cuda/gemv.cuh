// Linear layers of 1 to 8 rows, as decoding has them: y = epilogue(x' w^T), x' = x or its RMSNorm.
//
// Bound by reading the weight once, F * C * bytes / bandwidth. So a grid is what fits the chip at once;
// a block takes every gridDim.x-th tile, its warps share the columns, and kDepth units of each are always
// on their way, across tiles too. The weight of the first tile is asked for before the kernel waits for
// the one that writes x (programmatic dependent launch), so launches and the first latency are hidden
// behind the kernel before. The matrix unit multiplies: 8 columns of b are 8 rows of x, whose cost is
// the same for 1 and for 8. x' lies in shared memory, normalised once a block.
//
// No atomics: the warps' sums are added in their order, and no bit of a row depends on the others.
// The statistic of RMSNorm comes as sums of squares of 16 columns each, which the kernel that made x
// stored; each block adds them in the same order.
// Compiled, and run on the host by tests/cuda_on_host; not yet measured on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "gemv_forms.cuh"
#include "operators.h"

namespace internvl::cuda {

constexpr int kGemvRows = 8;  // of x: the columns of b
constexpr int kGemvWarps = 8, kGemvThreads = 32 * kGemvWarps;
constexpr int kSharedElements = 32768;  // of x' at a time, 64 KiB: 4096 columns of 8 rows
constexpr int kSquares = 16;            // columns that share a sum of squares

template <typename T>
struct Activations {
  const T* rows;
  int64_t row_stride;
  int count, columns;
  const float* squares;  // (count, partials) of x; null: x is not normalised
  int partials;
  const T* norm_weight;
  float eps;
};

// How the launch cuts the work, the same for every block. A turn is one unit of each warp.
struct Schedule {
  int tiles;
  int blocks;        // of the grid: what fits the chip at once
  int turns;         // of a tile, a multiple of kDepth: x' has zeros behind its last column
  int turns_staged;  // whose columns of x' are in shared memory at a time
  int stride;        // elements from one row of x' there to the next
};

template <typename Form>
Schedule schedule(int64_t outputs, int columns, int count, int processors) {
  constexpr int kTurn = Form::kColumns * kGemvWarps, kGroup = kTurn * Form::kDepth;
  Schedule found;
  found.tiles = static_cast<int>((outputs + Form::kOutputs - 1) / Form::kOutputs);
  found.blocks = std::min(found.tiles, Form::kBlocks * processors);
  found.turns = (columns + kGroup - 1) / kGroup * Form::kDepth;
  found.turns_staged =
      std::min(found.turns, kSharedElements / count / kGroup * Form::kDepth);
  found.stride = found.turns_staged * kTurn + Form::kPad;
  return found;
}

template <typename Form>
constexpr int kSumsStride = Form::kSums + 1;  // of the sums of one row of x: off the banks of another

template <typename Form>  // a multiple of 16 bytes
constexpr int kSharedSums = kGemvWarps * kGemvRows * kSumsStride<Form>;

// 1 / rms of every row, by a warp each.
template <typename T>
__device__ __forceinline__ void reciprocals(const Activations<T>& x, float* rstd) {
  const int row = threadIdx.x / 32;
  if (row >= x.count) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < x.partials; i += 32)
    sum += x.squares[row * x.partials + i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) rstd[row] = rsqrtf(sum / x.columns + x.eps);
}

// Columns start to start + count of x' to shared memory, zeros behind the last.
template <typename T>
__device__ __forceinline__ void stage(const Activations<T>& x, const float* rstd, int start, int count,
                                      int stride, T* to) {
  constexpr int N = kPerLoad<T>;
#pragma unroll 1  // registers are full of weights on their way
  for (int row = 0; row < x.count; ++row) {
    const T* from = x.rows + row * x.row_stride + start;
#pragma unroll 1
    for (int c = threadIdx.x * N; c < count; c += kGemvThreads * N) {
      uint4 bits{};
      if (start + c < x.columns) bits = *reinterpret_cast<const uint4*>(from + c);
      if (x.squares && start + c < x.columns) {
        float gain[N];
        load(x.norm_weight + start + c, gain);
        T* values = reinterpret_cast<T*>(&bits);
#pragma unroll
        for (int i = 0; i < N; ++i) {  // rounded before the weight is applied, as the reference does
          const float normed = to_float(from_float<T>(to_float(values[i]) * rstd[row]));
          values[i] = from_float<T>(normed * gain[i]);
        }
      }
      *reinterpret_cast<uint4*>(to + row * stride + c) = bits;
    }
  }
}

// What a thread's output needs beside its sums, read long before: in shared memory, since registers
// are full of weights on their way.
template <typename Form, typename Epilogue>
struct Early {
  float first_scale, second_scale;
  typename Epilogue::Early values;
};
template <typename Form>
constexpr int kTileOutputs = Form::kOutputs * kGemvRows;  // thread t has output t % kOutputs

// Asks for what is constant and comes from memory late: the norm's weight, bias and scales.
template <typename Form, typename Epilogue>
__device__ __forceinline__ void prefetch(const Activations<typename Form::Type>& x,
                                         const typename Form::Weight& weight,
                                         const Epilogue& epilogue) {
  if (x.squares)
#pragma unroll 1
    for (int c = threadIdx.x * 64; c < x.columns; c += kGemvThreads * 64)  // 128 bytes
      prefetch_to_l2(x.norm_weight + c);
  if (threadIdx.x >= Form::kOutputs) return;
  const TileRows rows = epilogue.template rows<Form::kOutputs>(blockIdx.x);
  for (const int64_t row : {rows.first + threadIdx.x, rows.second + threadIdx.x}) {
    if (row >= weight.rows) continue;
    if (Form::kScaled) prefetch_to_l2(weight.scales + row);
    if (epilogue.bias) prefetch_to_l2(epilogue.bias + row);
  }
}

template <typename Form, typename Epilogue>
__device__ __forceinline__ Early<Form, Epilogue> read_early(const typename Form::Weight& weight,
                                                            const Epilogue& epilogue, int tile) {
  const int thread = computed_again(threadIdx.x);
  const int n = thread / Form::kOutputs, output = thread % Form::kOutputs;
  const TileRows rows = epilogue.template rows<Form::kOutputs>(tile);
  return {Form::row_scale(weight, min(rows.first + output, weight.rows - 1)),
          Form::row_scale(weight, min(rows.second + output, weight.rows - 1)),
          epilogue.template fetch<Form::kOutputs>(tile, n, output)};
}

// Adds the warps' sums of the tile; the epilogue of each output gets its one, or its two.
template <typename Form, typename Epilogue>
__device__ __forceinline__ void finish(const typename Form::Sums& sums, float* shared,
                                       const Early<Form, Epilogue>* early,
                                       const Epilogue& epilogue, int tile, int count) {
  constexpr int kStride = kSumsStride<Form>, kOutputs = Form::kOutputs;
  const int warp = computed_again(threadIdx.x) / 32;
  Form::each(sums, [&](int row, int n, float value) {
    shared[(warp * kGemvRows + n) * kStride + row] = value;
  });
  __syncthreads();
  const int thread = computed_again(threadIdx.x);
  const int n = thread / kOutputs, output = thread % kOutputs;
  if (n < kGemvRows) {
    float first = 0.0f, second = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kGemvWarps; ++warp) {
      const float* from = shared + (warp * kGemvRows + n) * kStride + output;
      first += from[0];
      if constexpr (Epilogue::kPaired) second += from[kOutputs];
    }
    const Early<Form, Epilogue>& mine = early[thread];
    epilogue.template store<kOutputs>(tile, n, output, n < count, first * mine.first_scale,
                                      second * mine.second_scale, mine.values);
  }
  __syncthreads();  // before the next tile's sums
}

template <typename Form, typename Epilogue>
__global__ void __launch_bounds__(kGemvThreads, Form::kBlocks)
    gemv_kernel(Activations<typename Form::Type> x, typename Form::Weight weight,
                Epilogue epilogue, Schedule work) {
  using T = typename Form::Type;
  constexpr int kDepth = Form::kDepth, kOutputs = Form::kOutputs;
  constexpr int kTurn = Form::kColumns * kGemvWarps;
  __shared__ float rstd[kGemvRows];
  __shared__ Early<Form, Epilogue> early[kTileOutputs<Form>];
  float* shared_sums = reinterpret_cast<float*>(dynamic_shared_memory());
  T* staged = reinterpret_cast<T*>(shared_sums + kSharedSums<Form>);
  const int warp = threadIdx.x / 32;
  const T* lane =
      staged + lane_row() * work.stride + warp * Form::kColumns + lane_quad() * Form::kLane;

  start_next_kernel();
  Form form;
  typename Form::Unit queue[kDepth];
  form.seek(weight, epilogue.template rows<kOutputs>(blockIdx.x));
#pragma unroll
  for (int d = 0; d < kDepth; ++d) queue[d] = form.fetch(weight, d * kGemvWarps + warp);
  prefetch<Form>(x, weight, epilogue);
  wait_for_inputs();
  if (x.squares) reciprocals(x, rstd);

  bool is_staged = false;
  for (int tile = blockIdx.x; tile < work.tiles; tile += work.blocks) {
    if (threadIdx.x < x.count * kOutputs)
      early[threadIdx.x] = read_early<Form>(weight, epilogue, tile);
    typename Form::Sums sums;
    for (int turn = 0, place = 0; turn < work.turns; turn += kDepth, place += kDepth) {
      if (place == work.turns_staged) place = 0;
      if (place == 0 && !(is_staged && work.turns == work.turns_staged)) {
        __syncthreads();  // rstd is there, and the chunk before was read
        stage(x, rstd, turn * kTurn, work.turns_staged * kTurn, work.stride, staged);
        __syncthreads();
        is_staged = true;
      }
      const bool is_last = turn + kDepth == work.turns;
      const int next_tile = computed_again(tile) + work.blocks;
      const bool ends = is_last && next_tile >= work.tiles;
      if (is_last && !ends) form.seek(weight, epilogue.template rows<kOutputs>(next_tile));
      const int next = is_last ? 0 : turn + kDepth;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const T* from = lane + (place + d) * kTurn;
        Form::multiply(queue[d], from, lane_row() < x.count, sums);
        if (!ends) queue[d] = form.fetch(weight, (next + d) * kGemvWarps + warp);
      }
    }
    finish<Form>(sums, shared_sums, early, epilogue, tile, x.count);
  }
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Launches the kernel for `outputs` outputs of each row; two rows of the weight each where paired.
template <typename Form, typename Epilogue>
void launch_gemv(const Activations<typename Form::Type>& x, const typename Form::Weight& weight,
                 const Epilogue& epilogue, int64_t outputs, cudaStream_t stream) {
  const Schedule work = schedule<Form>(outputs, x.columns, x.count,
                                       device_attribute(cudaDevAttrMultiProcessorCount));
  const auto kernel = &gemv_kernel<Form, Epilogue>;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(work.blocks));
  config.blockDim = dim3(kGemvThreads);
  config.dynamicSmemBytes = x.count * work.stride * sizeof(typename Form::Type) +
                            kSharedSums<Form> * sizeof(float);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  if (config.dynamicSmemBytes > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(config.dynamicSmemBytes));
  cudaLaunchKernelEx(&config, kernel, x, weight, epilogue, work);
  check_launch("gemv");
}

template <typename T>
Activations<T> activations(const GemvInput& x) {
  return {static_cast<const T*>(x.rows),
          x.row_stride,
          x.count,
          static_cast<int>(x.columns),
          x.squares,
          static_cast<int>(x.partials),
          static_cast<const T*>(x.norm_weight),
          x.eps};
}

// Calls body(Form{}, weight of that form).
template <bool PAIRED, typename Body>
void with_form(int dtype, const GemvWeight& from, Body body) {
  const auto with = [&](auto type) {
    using T = decltype(type);
    const int columns = static_cast<int>(from.columns);
    if (from.form == 0) {
      const typename Wide<T, PAIRED>::Weight weight{static_cast<const T*>(from.data), from.rows,
                                                    columns};
      body(Wide<T, PAIRED>{}, weight);
    } else if (from.form == 1) {
      const typename Int8<T, PAIRED>::Weight weight{static_cast<const int8_t*>(from.data),
                                                    from.rows, columns, (columns + 3) / 4,
                                                    static_cast<const float*>(from.scales)};
      body(Int8<T, PAIRED>{}, weight);
    } else {
      const typename Int4<T, PAIRED>::Weight weight{
          static_cast<const uint8_t*>(from.data), from.rows,
          columns,                                (columns + 7) / 8,
          static_cast<const uint2*>(from.scales), (columns + from.group - 1) / from.group,
          from.group / 64};
      body(Int4<T, PAIRED>{}, weight);
    }
  };
  if (dtype == 1)
    with(__nv_bfloat16{});
  else
    with(__half{});
}

}  // namespace internvl::cuda
