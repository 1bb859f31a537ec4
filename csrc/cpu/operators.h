// The CPU operators as a table of functions, one table per instruction set and storage type.
#pragma once

#include "attention_call.h"
#include "linear_call.h"
#include "norm_call.h"
#include "../heads.h"
#include "../rows.h"

namespace internvl::cpu {

// What each computes and the shapes it takes: the header of its name.
template <typename T>
struct Operators {
  void (*norm)(const NormCall<T>& call, int threads);
  void (*norm_backward)(const NormBackwardCall<T>& call, float* sums, double* totals, int threads);
  void (*rotary)(Heads<const T> x, Heads<T> y, const T* cos, const T* sin, const int64_t* positions,
                 int64_t positions_stride, float sign, Extent n, int threads);
  void (*rotary_append)(Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> y,
                        Heads<T> k_cache, Heads<T> v_cache, const T* cos, const T* sin,
                        const int64_t* positions, int64_t positions_stride, const int64_t* slots,
                        int64_t slots_stride, Extent n, int64_t key_heads, int threads);
  void (*swiglu)(Rows<const T> gate_up, T* y, int64_t rows, int64_t cols, int threads);
  void (*swiglu_backward)(Rows<const T> grad, Rows<const T> gate_up, T* d, int64_t rows,
                          int64_t cols, int threads);
  LinearPanel (*linear_panel)();
  int64_t (*linear_workspace)(int64_t rows, int64_t cols, int threads);
  void (*linear)(Rows<const T> x, const T* packed, const T* bias, Rows<const T> residual, T* y,
                 int64_t rows, int64_t cols, int64_t features, Epilogue epilogue, void* workspace,
                 int threads);
  int64_t (*attention_workspace)(const AttentionCall<T>& call, int threads);
  void (*attention)(const AttentionCall<T>& call, char* workspace, int threads);
  void (*decode_attention)(Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out,
                           const int64_t* lengths, const uint8_t* key_padding_mask, Extent n,
                           int64_t key_heads, float scale, float* weights, int threads);
  bool (*read_mask)(Heads<const T> mask, Heads<uint8_t> seen, Extent n, int threads);
};

// Linear layers over weights of 8 and of 4 bits, which have instruction sets of their own.
template <typename T>
struct Int8Operators {
  int64_t (*workspace)(int64_t rows, int64_t cols, int threads);
  void (*linear)(Rows<const T> x, const Int8Weight& weight, const T* bias, Rows<const T> residual,
                 T* y, int64_t rows, Epilogue epilogue, void* workspace, int threads);
  int64_t (*workspace_int4)(int64_t rows, int64_t cols, int64_t group, int threads);
  void (*linear_int4)(Rows<const T> x, const Int4Weight& weight, const T* bias,
                      Rows<const T> residual, T* y, int64_t rows, Epilogue epilogue, void* workspace,
                      int threads);
};

// The name of the best instruction set that was compiled and that this processor has, or of the one
// named by the environment variable INTERNVL_ISA.
const char* instruction_set();

template <typename T>
const Operators<T>& best();  // of instruction_set(), chosen at the first call
template <typename T>
const Int8Operators<T>& best_int8();

}  // namespace internvl::cpu
