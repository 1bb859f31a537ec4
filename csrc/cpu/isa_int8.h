// The operators over weights of 8 and of 4 bits, compiled for the instruction set that ISA names.

#include "linear_int4.h"
#include "linear_int8.h"
#include "operators.h"

namespace internvl::ISA {

template <typename T>
const cpu::Int8Operators<T>& int8_operators() {
  static constexpr cpu::Int8Operators<T> table = {linear_int8_workspace<T>, linear_int8<T>,
                                                 linear_int4_workspace, linear_int4<T>};
  return table;
}

template const cpu::Int8Operators<float>& int8_operators();
template const cpu::Int8Operators<bf16>& int8_operators();

}  // namespace internvl::ISA
