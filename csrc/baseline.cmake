# Takes from CMAKE_CXX_FLAGS what ties code to one machine or changes its arithmetic: the kernels are
# compiled once per instruction set and chosen at run time, so with CXXFLAGS=-march=native even the
# portable ones would stop on another processor. -mtune stays: it changes no instruction set.
string(REGEX REPLACE
  "(^| +)(-m(arch|cpu)=[^ ]*|-m(no-)?(avx|fma|f16c|sse|ssse|bmi|amx|xop|gfni|lzcnt|popcnt|vaes|vpclmul|adx)[^ ]*|-ffast-math|-Ofast)"
  "" CMAKE_CXX_FLAGS "${CMAKE_CXX_FLAGS}")
