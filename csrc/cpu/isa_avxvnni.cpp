#define ISA avxvnni
#include "isa_int8.h"
