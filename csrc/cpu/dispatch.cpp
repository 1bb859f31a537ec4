// Chooses among the instruction sets at run time.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "operators.h"

#define INTERNVL_DECLARE(isa)              \
  namespace internvl::isa {                \
  template <typename T>                    \
  const cpu::Operators<T>& operators();    \
  }

INTERNVL_DECLARE(portable)
#ifdef INTERNVL_X86
INTERNVL_DECLARE(avx512bf16)
INTERNVL_DECLARE(avx512)
INTERNVL_DECLARE(avx2)
#endif

namespace internvl::cpu {
namespace {

bool supports(const std::string& isa) {
#ifdef INTERNVL_X86
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512") return avx512;
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "portable";
}

std::string choose() {
  const char* asked = std::getenv("INTERNVL_ISA");  // empty is as unset
  std::string here;
  for (const char* isa : {"avx512bf16", "avx512", "avx2", "portable"}) {
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
    if (isa == "avx512") return avx512::operators<T>();
    if (isa == "avx2") return avx2::operators<T>();
#endif
    return portable::operators<T>();
  }();
  return chosen;
}

template const Operators<float>& best<float>();
template const Operators<bf16>& best<bf16>();

}  // namespace internvl::cpu
