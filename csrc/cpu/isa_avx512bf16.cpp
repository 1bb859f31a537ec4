#define ISA avx512bf16
#include "isa.h"
