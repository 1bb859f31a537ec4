#define ISA avx512vnni
#include "isa_int8.h"
