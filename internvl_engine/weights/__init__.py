"""What the weight of a linear layer can be, below the fused modules that multiply with it.

    plain       an ordinary tensor (F, C)
    merged      plain weights of neighbours (q, k, v) that lie one below the other in one storage
    packed      the layout that the CPU's matrix product reads, in a tensor subclass
    quantized   int8, int4 or fp8, the same on every machine; see quantized.py

Every weight exists once and is an `nn.Parameter` of its Linear in every form: counts, freezing,
optimizers and adapters see it. A form that is not plain is a `WeightTensor`, which has `linear(x,
bias, epilogue, residual)`, `dense()`, `write(values)` and `nbytes`, and says what its inner tensors
are. Nothing above this room asks which it is. Weights of neighbours in one form are parts of one
storage too, where they fill whole panels.
"""

from .fp8 import Fp8Tensor
from .holding import KINDS, assemble, put, quantized_entries, watch
from .int4 import Int4Tensor
from .int8 import Int8Tensor
from .linears import LINEARS, Linears, find_linear, has_own_forward, is_hooked, is_plain_linear
from .merged import Merged, merge
from .packed import PackedTensor, pack
from .quantized import QuantizedTensor
from .tensor import WeightTensor, linear, make_plain

__all__ = [
    "KINDS",
    "LINEARS",
    "Fp8Tensor",
    "Int4Tensor",
    "Int8Tensor",
    "Linears",
    "Merged",
    "PackedTensor",
    "QuantizedTensor",
    "WeightTensor",
    "assemble",
    "find_linear",
    "has_own_forward",
    "is_hooked",
    "is_plain_linear",
    "linear",
    "make_plain",
    "merge",
    "pack",
    "put",
    "quantized_entries",
    "watch",
]
