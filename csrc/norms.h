// Which norm: kernels/_norms.py numbers them so.
#pragma once

namespace internvl {

enum class Norm { rms, layer };

}  // namespace internvl
