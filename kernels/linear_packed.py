"""Linear layers whose weight is held in the layout that the CPU's matrix product reads.

    y = residual + epilogue(x @ weight.T + bias)

F.linear strides through a row-major weight, or reorders it, at every call; packing does that once.
The packed tensor is the only copy of the weight, takes the same bytes (whole blocks: +0.03 % for
the 49,954 rows of QLLaMA's vocabulary, 0 for the other weights of the model) and gives the dense
one back bit-equal. Two layouts, chosen when a weight is packed:

    native  csrc/cpu/linear.h: float32, and bfloat16 where there are bf16 dot products. An ordinary
            tensor. The order of a row's sums depends neither on the batch nor on the threads.
    onednn  bfloat16 and float16 where oneDNN is faster (AMX) or the only one. An opaque tensor.

x is (M, C), weight (F, C); (C, F) is (3200, 9600), (3200, 3200), (3200, 12800) and (12800, 3200) in
a layer of the vision tower, with M = 257 rows an image, and (4096, 4096), (4096, 22016) and
(11008, 4096) in QLLaMA. 2 * M * C * F operations; below about 12 rows bound by reading the weight.

The epilogue sees the fp32 sums; the result is rounded once, where eager rounds up to three times.
Source of the oneDNN calls: what Inductor's freezing uses, torch/_inductor/mkldnn_lowerings.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_engine import reference

from ._library import NATIVE_TYPES, address, define, native, serve_too
from ._rows import as_rows
from .linear import (
    EPILOGUES,
    activate,
    check_operands,
    inputs_needing_gradient,
    linear_backward_blas,
    output_shape,
)

_PANEL = 32  # rows of a weight that the widest native layout keeps together


def _layout(weight: Tensor) -> str | None:
    if weight.device.type != "cpu" or weight.layout != torch.strided or weight.dim() != 2:
        return None
    isa = "portable" if native is None else native.instruction_set()
    if weight.dtype == torch.float32:  # in oneDNN's one chain of sums, 2.5 times the error of MKL
        return None if isa == "portable" else "native"
    has_onednn = torch.backends.mkldnn.is_available() and weight.numel() > 0
    if weight.dtype == torch.bfloat16:
        if isa == "avx512bf16" and not torch.cpu._is_amx_tile_supported():
            return "native"
        return "onednn" if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    if weight.dtype == torch.float16:
        return "onednn" if has_onednn and torch.ops.mkldnn._is_mkldnn_fp16_supported() else None
    return None


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has a packed layout for such a weight: (F, C), dense, on the CPU."""
    return _layout(weight) is not None


class PackedWeight:
    """The weight of a linear layer, packed; the dense tensor can go, this is the only copy needed.

    While one weight is packed, its dense and its packed form exist: pack one at a time and drop the
    dense one before the next. Copies and pickles by way of the dense tensor. It is a constant: what
    it is multiplied with gets a gradient, the weight does not.
    """

    def __init__(self, weight: Tensor) -> None:
        """Packs weight (F, C).

        Raises:
            ValueError: there is no packed layout for it on this machine; ask `can_pack` first.
        """
        layout = _layout(weight)
        if layout is None:
            raise ValueError(
                f"PackedWeight: no packed layout here for a {weight.dtype} weight of shape "
                f"{tuple(weight.shape)} on {weight.device}; use linear() with the dense weight"
            )
        self.shape = weight.shape
        self.dtype = weight.dtype
        # oneDNN is not told for how many rows: without, the layout is as fast for 1 to 1028.
        pack = _pack if layout == "native" else torch.ops.mkldnn._reorder_linear_weight
        self.data: Tensor = pack(weight.detach())

    def dense(self) -> Tensor:
        """The weight (F, C) as it came, bit for bit, in memory of its own."""
        return _unpack(self.data, *self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layout."""
        if self.data.layout == torch.strided:
            return self.data.nbytes
        return torch.ops.mkldnn._nbytes(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        return PackedWeight(self.dense())

    def __reduce__(self) -> tuple[type["PackedWeight"], tuple[Tensor]]:
        return PackedWeight, (self.dense(),)

    def __repr__(self) -> str:
        return f"PackedWeight({tuple(self.shape)}, {self.dtype})"


def _pack(weight: Tensor) -> Tensor:
    assert native is not None
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    dtype, (features, channels) = NATIVE_TYPES[weight.dtype], weight.shape
    packed = torch.empty(native.packed_elements(dtype, features, channels), dtype=weight.dtype)
    native.pack_linear(
        dtype, weight.data_ptr(), weight.stride(0), packed.data_ptr(), features, channels,
        torch.get_num_threads(),
    )  # fmt: skip
    return packed


def _unpack(packed: Tensor, features: int, channels: int) -> Tensor:
    if packed.layout != torch.strided:
        return packed.to_dense()
    assert native is not None
    weight = torch.empty(features, channels, dtype=packed.dtype)
    native.unpack_linear(
        NATIVE_TYPES[packed.dtype], packed.data_ptr(), weight.data_ptr(), features, channels,
        torch.get_num_threads(),
    )  # fmt: skip
    return weight


def linear_packed_reference(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Unpacks the weight and computes with it."""
    return reference.linear(x, _unpack(packed, features, x.shape[-1]), bias, epilogue, residual)


def linear_packed_native(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/linear.h."""
    dtype = NATIVE_TYPES.get(packed.dtype)
    if packed.layout != torch.strided or dtype is None or packed.dtype != x.dtype:
        return NotImplemented
    if x.shape[-1] == 0:  # a sum of nothing, which the loops over C never reach
        return NotImplemented
    shape = output_shape(x, features, epilogue)
    if epilogue == "swiglu" and shape[-1] % _PANEL:  # gate and up lie apart within a panel
        y = activate(linear_packed_native(x, packed, features, bias), epilogue)
        return y if residual is None else residual + y
    if residual is not None and residual.dtype != x.dtype:
        return residual + linear_packed_native(x, packed, features, bias, epilogue)
    y = torch.empty(shape, dtype=x.dtype)
    rows, threads = y.numel() // max(shape[-1], 1), torch.get_num_threads()
    x_rows, bias = as_rows(x), None if bias is None else bias.contiguous()
    residual_rows = None if residual is None else as_rows(residual)
    workspace = torch.empty(
        native.linear_workspace(dtype, rows, x.shape[-1], threads), dtype=torch.uint8
    )
    native.linear(
        dtype, x_rows.pointer(), packed.data_ptr(), address(bias),
        (0, 1, 0, 0) if residual_rows is None else residual_rows.pointer(), y.data_ptr(), rows,
        x.shape[-1], features, EPILOGUES.index(epilogue), workspace.data_ptr(), threads,
    )  # fmt: skip
    return y


def linear_packed_onednn(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls oneDNN, the epilogue as its post-operation but for SwiGLU, which joins two columns."""
    if packed.layout == torch.strided:
        return NotImplemented
    onednn = torch.ops.mkldnn._linear_pointwise
    if epilogue == "none" and residual is not None and residual.dtype == x.dtype:
        return onednn.binary(x, residual, packed, bias, "add")
    if epilogue == "swiglu":
        y = activate(onednn(x, packed, bias, "none", [], ""), epilogue)
    else:
        y = onednn(x, packed, bias, epilogue, [], "none")  # algorithm "none" is the exact, erf GELU
    return y if residual is None else residual + y


def _linear_packed_fake(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(output_shape(x, features, epilogue), dtype=dtype)


def linear_packed_backward_reference(
    grad: Tensor, x: Tensor, packed: Tensor, features: int, bias: Tensor | None, epilogue: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and bias, with the weight unpacked for the time of the call."""
    dx, _, dbias = linear_backward_blas(
        grad,
        x,
        _unpack(packed, features, x.shape[-1]),
        bias,
        epilogue,
        wanted=(wanted[0], False, wanted[1]),
    )
    return dx, dbias


def _linear_packed_backward_fake(
    grad: Tensor, x: Tensor, packed: Tensor, features: int, bias: Tensor | None, epilogue: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dbias = bias.shape if wanted[1] and bias is not None else 0
    return x.new_empty(x.shape if wanted[0] else 0), x.new_empty(dbias)


def _save(ctx, inputs, output) -> None:
    x, packed, ctx.features, bias, ctx.epilogue, residual = inputs
    ctx.save_for_backward(x, packed, bias)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad: Tensor):
    needs = inputs_needing_gradient(ctx, 6)
    wanted = [needs[0], needs[3]]
    x, packed, bias = ctx.saved_tensors
    dx, dbias = _linear_packed_backward(grad, x, packed, ctx.features, bias, ctx.epilogue, wanted)
    dresidual = grad.to(ctx.residual_dtype) if needs[5] else None
    gradients = (dx if needs[0] else None, None, None, dbias if needs[3] else None, None, dresidual)
    return gradients[: len(ctx.needs_input_grad)]


_linear_packed = define(
    "linear_packed(Tensor x, Tensor packed, int features, Tensor? bias=None, "
    "str epilogue='none', Tensor? residual=None) -> Tensor",
    reference=linear_packed_reference,
    fake=_linear_packed_fake,
    cpu={"native": linear_packed_native, "onednn": linear_packed_onednn},
    backward=(_backward, _save),
)

_linear_packed_backward = define(
    "linear_packed_backward(Tensor grad, Tensor x, Tensor packed, int features, Tensor? bias, "
    "str epilogue, bool[2] wanted) -> (Tensor, Tensor)",
    reference=linear_packed_backward_reference,
    fake=_linear_packed_backward_fake,
)

# An opaque oneDNN tensor has a dispatch key of its own, which comes before that of the CPU.
serve_too("linear_packed", "MkldnnCPU")


def linear_packed(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a packed weight; see `linear` for the meaning.

    Args:
        x: (..., C), any strides, the dtype of the weight. Under autocast it is cast to that dtype,
            and the result to autocast's.
        weight: packed, (F, C).
        bias: (F,), the dtype of the weight, or None.
        epilogue: "none", "gelu" (exact, with erf) or "swiglu" (weight rows are [gate; up]).
        residual: the shape of the output, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown epilogue.
    """
    check_operands("linear_packed", x, weight.shape, weight.dtype, bias, epilogue, residual)
    features = weight.shape[0]
    if torch.is_autocast_enabled("cpu"):
        x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        y = _linear_packed(x, weight.data, features, bias, epilogue)
        y = y.to(torch.get_autocast_dtype("cpu"))
        return y if residual is None else residual + y
    return _linear_packed(x, weight.data, features, bias, epilogue, residual)
