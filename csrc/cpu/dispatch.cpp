// Chooses among the instruction sets at run time.

#ifdef INTERNVL_X86
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "operators.h"

#define INTERNVL_DECLARE(isa)                  \
  namespace internvl::isa {                    \
  template <typename T>                        \
  const cpu::Operators<T>& operators();        \
  template <typename T>                        \
  const cpu::Int8Operators<T>& int8_operators(); \
  }

INTERNVL_DECLARE(portable)
#ifdef INTERNVL_X86
INTERNVL_DECLARE(avx512bf16)
INTERNVL_DECLARE(avx512vnni)
INTERNVL_DECLARE(avx512)
INTERNVL_DECLARE(avxvnni)
INTERNVL_DECLARE(avx2)
#endif

namespace internvl::cpu {
namespace {

#ifdef INTERNVL_X86
// Leaf 7.1, EAX bit 4; gcc 12 and clang 15 know the name in no __builtin_cpu_supports.
bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

bool supports(const std::string& isa) {
#ifdef INTERNVL_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");  // wherever there is bf16
  if (isa == "avx512bf16") return vnni && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512vnni") return vnni;
  if (isa == "avx512") return avx512;
  if (isa == "avxvnni") return avx2 && has_avxvnni();
  if (isa == "avx2") return avx2;
#endif
  return isa == "portable";
}

std::string choose() {
  const char* asked = std::getenv("INTERNVL_ISA");  // empty is as unset
  std::string here;
  for (const char* isa : {"avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "portable"}) {
    if (!supports(isa)) continue;
    if (!asked || !*asked || asked == std::string(isa)) return isa;
    here += here.empty() ? isa : std::string(", ") + isa;
  }
  throw std::invalid_argument(std::string("INTERNVL_ISA=") + asked +
                              ": this processor and this build have " + here);
}

}  // namespace

const char* instruction_set() {
  static const std::string isa = choose();
  return isa.c_str();
}

template <typename T>
const Operators<T>& best() {
  static const Operators<T>& chosen = []() -> const Operators<T>& {
    [[maybe_unused]] const std::string isa = instruction_set();
#ifdef INTERNVL_X86
    if (isa == "avx512bf16") return avx512bf16::operators<T>();
    if (isa == "avx512vnni" || isa == "avx512") return avx512::operators<T>();
    if (isa == "avxvnni" || isa == "avx2") return avx2::operators<T>();
#endif
    return portable::operators<T>();
  }();
  return chosen;
}

template <typename T>
const Int8Operators<T>& best_int8() {
  static const Int8Operators<T>& chosen = []() -> const Int8Operators<T>& {
    [[maybe_unused]] const std::string isa = instruction_set();
#ifdef INTERNVL_X86
    if (isa == "avx512bf16" || isa == "avx512vnni") return avx512vnni::int8_operators<T>();
    if (isa == "avx512") return avx512::int8_operators<T>();
    if (isa == "avxvnni") return avxvnni::int8_operators<T>();
    if (isa == "avx2") return avx2::int8_operators<T>();
#endif
    return portable::int8_operators<T>();
  }();
  return chosen;
}

template const Operators<float>& best<float>();
template const Operators<bf16>& best<bf16>();
template const Int8Operators<float>& best_int8<float>();
template const Int8Operators<bf16>& best_int8<bf16>();

}  // namespace internvl::cpu
