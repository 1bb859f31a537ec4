// What a linear layer does after its product; in the order of EPILOGUES in kernels/linear.py.
#pragma once

namespace internvl {

enum class Epilogue { none, gelu, swiglu };

}  // namespace internvl
