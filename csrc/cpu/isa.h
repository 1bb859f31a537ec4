// Every CPU operator, compiled for the instruction set that ISA names. One isa_<set>.cpp per set
// includes this; the flags are in CMakeLists.txt.

#include "attention.h"
#include "decode_attention.h"
#include "linear.h"
#include "norm.h"
#include "norm_backward.h"
#include "operators.h"
#include "read_mask.h"
#include "rotary.h"
#include "swiglu.h"

namespace internvl::ISA {

template <typename T>
const cpu::Operators<T>& operators() {
  static constexpr cpu::Operators<T> table = {
      norm<T>, norm_backward<T>, rotary<T>, rotary_append<T>, swiglu<T>, swiglu_backward<T>,
      linear_panel<T>, linear_workspace<T>, linear<T>,
      attention_workspace<T>, attention<T>, decode_attention<T>, read_mask<T>,
  };
  return table;
}

template const cpu::Operators<float>& operators();
template const cpu::Operators<bf16>& operators();

}  // namespace internvl::ISA
