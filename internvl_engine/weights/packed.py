"""A weight in the layout that the CPU's matrix product reads (kernels/linear_packed.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .tensor import WeightTensor, swap


class PackedTensor(WeightTensor):
    """A weight (F, C) whose only copy is packed."""

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, shape: torch.Size) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=packed.dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: Tensor, shape: torch.Size) -> None:
        """packed: of `kernels.pack`. shape: (F, C)."""
        self.packed = packed

    def dense(self) -> Tensor:
        return kernels.unpack(self.packed, *self.shape)

    def write(self, values: Tensor) -> None:
        with torch.inference_mode(False):
            self.packed.data.copy_(kernels.pack(values))
        torch.autograd.graph.increment_version(self.packed)  # a graph that saved it must notice

    def linear(
        self, x: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None
    ) -> Tensor:
        return kernels.linear_packed(x, self.packed, self.shape[0], bias, epilogue, residual)

    def take(self, places: Tensor) -> Tensor:  # type: ignore[override]
        size = self.numel()
        if places.numel() and not bool(((places >= -size) & (places < size)).all()):
            raise IndexError(f"take: places must lie within the {size} values of the weight")
        if self.packed.dim() != 4:  # opaque
            return super().take(places)
        places = places % size
        rows, depth = self.packed.shape[2:]  # of panels, see kernels.pack
        row, column = places // self.shape[1], places % self.shape[1]
        return self.packed[row // rows, column // depth, row % rows, column % depth]

    def alias(self) -> "PackedTensor":
        return PackedTensor(self.packed, self.shape)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed form."""
        return kernels.packed_nbytes(self.packed)

    def __tensor_flatten__(self) -> tuple[list[str], torch.Size]:
        return ["packed"], self.shape

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], shape: torch.Size, outer_size: Any, outer_stride: Any
    ) -> "PackedTensor":
        return PackedTensor(inner["packed"], shape)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on beside the values."""
        return f"PackedTensor {tuple(self.shape)} {self.dtype} {tuple(self.packed.shape)}"


@torch.no_grad()
def pack(parameters: list[nn.Parameter]) -> PackedTensor | None:
    """Packs weights with the same number of columns, one at a time: no second copy of all is made.

    Returns:
        The weight of all their rows, of whose storage each is a part; None where there is only one,
        where they do not fill whole panels, or where one is held by somebody and stays plain.
    """
    rows = kernels.panel_rows(parameters[0].dtype)
    counts = [parameter.shape[0] for parameter in parameters]
    if len(parameters) == 1 or rows is None or any(count % rows for count in counts):
        for parameter in parameters:
            swap(parameter, PackedTensor(kernels.pack(parameter), parameter.shape))
        return None
    whole: Tensor | None = None
    panels = [count // rows for count in counts]
    for index, parameter in enumerate(parameters):
        packed = kernels.pack(parameter)
        if whole is None:
            whole = packed.new_empty(sum(panels), *packed.shape[1:])
        part = whole.narrow(0, sum(panels[:index]), panels[index]).copy_(packed)
        if not swap(parameter, PackedTensor(part, parameter.shape)):
            for before in parameters[:index]:  # without the memory of the others
                before.packed = before.packed.clone()  # type: ignore[attr-defined]
            return None
    assert whole is not None
    return PackedTensor(whole, torch.Size((sum(counts), parameters[0].shape[1])))
