"""What the weight of a linear layer can be, below the fused modules that multiply with it.

    plain    an ordinary tensor (F, C)
    merged   plain weights of neighbours (q, k, v) that lie one below the other in one storage
    packed   the layout that the CPU's matrix product reads, in a tensor subclass

Every weight exists once and is an `nn.Parameter` of its Linear in every form: counts, freezing,
optimizers and adapters see it. A form that is not plain is a `WeightTensor`, which has `linear(x,
bias, epilogue, residual)`, `dense()`, `write(values)` and `nbytes`, and says what its inner tensors
are. Another one (int8, int4, fp8) is another subclass; nothing above this room asks which it is.
Packed weights of neighbours are parts of one storage too, where they fill whole panels.
"""

from .linears import Linears, find_linear, has_own_forward, is_hooked, is_plain_linear
from .merged import Merged, merge
from .packed import PackedTensor, pack
from .tensor import WeightTensor, linear, make_plain

__all__ = [
    "Linears",
    "Merged",
    "PackedTensor",
    "WeightTensor",
    "find_linear",
    "has_own_forward",
    "is_hooked",
    "is_plain_linear",
    "linear",
    "make_plain",
    "merge",
    "pack",
]
