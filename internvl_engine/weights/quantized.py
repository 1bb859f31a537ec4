"""A weight in fewer bits: what the forms of int8, int4 and fp8 share.

The form is the weight: what it was made from is gone, so `train()`, `.to(dtype)`, copies and
pickling keep it, where they give a packed weight its plain form. It is a constant: no gradient of
it, gradients through it to x and bias. Its dtype is the one that it computes with.

Reading gives the values that the bits stand for. Writing (`copy_`, `load_state_dict`, in-place
operators, also through views) rounds the whole weight again, to the nearest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tensor import WeightTensor, linear

aten = torch.ops.aten
COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)
PANEL_ROWS = 32  # of the packed forms of int8 and int4
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantizedTensor(WeightTensor):
    """A weight (F, C) that is its inner tensors, `packed` and what INNER names beside it."""

    FORM: str
    INNER: tuple[str, ...]
    ROWS = 1  # multiples of which are ranges of every inner tensor
    is_reversible = False

    packed: Tensor

    @staticmethod
    def __new__(cls, *parts: Any) -> Any:
        *inner, shape, dtype = parts
        return Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=inner[0].device, requires_grad=False
        )

    def __init__(self, *parts: Any) -> None:
        """
        Args:
            parts: the inner tensors in the order of INNER, the shape (F, C), and the dtype.

        Raises:
            ValueError: inner tensors that are no weight of that shape.
        """
        *inner, shape, dtype = parts
        if dtype not in COMPUTED_IN:
            raise ValueError(f"{type(self).__name__}: dtype must be one of float32, bfloat16 and "
                             f"float16, got {dtype}")  # fmt: skip
        for name, value in zip(self.INNER, inner, strict=True):
            setattr(self, name, value)
        found = {name: (tuple(x.shape), x.dtype) for name, x in self.inner_tensors().items()}
        layouts = self.inner_layouts(tuple(shape))
        if found not in layouts:
            raise ValueError(
                f"{type(self).__name__}: a weight {tuple(shape)} is {layouts[0]}, got {found}"
            )

    @classmethod
    def inner_layouts(cls, shape: tuple[int, ...]) -> list[Layout]:
        """The shapes and dtypes that the inner tensors of a weight (F, C) may have; the first are
        those that `quantize` gives without options."""
        raise NotImplementedError

    @classmethod
    def inner_layout(cls, shape: tuple[int, ...], **options: Any) -> Layout:
        """The shapes and dtypes of the inner tensors that `quantize` gives."""
        return cls.inner_layouts(shape)[0]

    @classmethod
    def quantize(cls, weight: Tensor, **options: Any) -> Any:
        """The nearest values that the form has; of the dtype of the weight.

        Args:
            weight: (F, C), floating, any strides.
            options: of the form.
        """
        with torch.inference_mode(False), torch.no_grad():
            inner = cls._quantize(weight.detach(), **options)
        return cls(*inner, weight.shape, weight.dtype)

    @classmethod
    def _quantize(cls, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """Of `quantize`, with which the form is made again."""
        return {}

    def inner_tensors(self) -> dict[str, Tensor]:
        """The inner tensors by their names."""
        return {name: getattr(self, name) for name in self.INNER}

    def with_inner(self, inner: list[Tensor], rows: int | None = None) -> Any:
        """Another weight of the same columns and dtype; `rows` None is as many."""
        return type(self)(*inner, (self.shape[0] if rows is None else rows, self.shape[1]),
                          self.dtype)  # fmt: skip

    def gathered(self, places: Tensor) -> Any:
        """The rows at some places (n,) as a weight in this form, in memory of its own."""
        raise NotImplementedError

    def rows(self, places: Tensor) -> Tensor:
        """The values of rows: places of any shape to (*places, C).

        Raises:
            IndexError: a place that is negative or no row; on a GPU the device asserts.
        """
        flat = places.reshape(-1)
        # Panels have rows beyond those of the weight, and negative places would count from the
        # end: PyTorch's own check, which reads no value back from a device and can be compiled.
        no_offsets = flat.new_zeros(1).expand(self.shape[0])
        flat = flat + no_offsets.index_select(0, flat)
        values = self.gathered(flat).dense() if flat.numel() else self.new_values(0)
        return values.view(*places.shape, self.shape[1])

    def new_values(self, rows: int) -> Tensor:
        return self.packed.new_empty((rows, self.shape[1]), dtype=self.dtype)

    def take(self, places: Tensor) -> Tensor:  # type: ignore[override]
        size, columns = self.numel(), self.shape[1]
        if places.numel() and not bool(((places >= -size) & (places < size)).all()):
            raise IndexError(f"take: places must lie within the {size} values of the weight")
        places = places % size
        rows, inverse = torch.unique(places // columns, return_inverse=True)
        return self.rows(rows)[inverse, places % columns]

    def write(self, values: Tensor) -> None:
        self.take_over(type(self).quantize(values, **self.options))

    def take_over(self, other: "QuantizedTensor") -> None:
        """Takes the bits of a weight of the same form and layout."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in other.inner_tensors().items():
                mine = getattr(self, name)
                mine.data.copy_(value)
                torch.autograd.graph.increment_version(mine)  # a graph that saved it must notice

    def alias(self) -> Any:
        return self.with_inner(list(self.inner_tensors().values()))

    def copied(self) -> Any:
        """The same weight in memory of its own."""
        return self.with_inner([x.detach().clone() for x in self.inner_tensors().values()])

    def converted(self, dtype: torch.dtype | None, device: Any) -> Any:
        """The weight on another device, or that computes in another dtype; the bits stay."""
        inner = (x if device is None else x.to(device) for x in self.inner_tensors().values())
        return type(self)(*inner, self.shape, dtype or self.dtype)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the inner tensors."""
        return sum(x.nbytes for x in self.inner_tensors().values())

    def requires_grad_(self, requires_grad: bool = True) -> Any:  # type: ignore[override]
        """Only False.

        Raises:
            RuntimeError: True; a step of an optimizer would be lost in the rounding.
        """
        if requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: a quantized weight is a constant and has no gradient; "
                "train an adapter (LoRA) beside it, or make it wide with undo()"
            )
        return self

    def _plain_copy(self) -> Tensor:
        copied = self.copied()
        return nn.Parameter(copied, False) if isinstance(self, nn.Parameter) else copied

    def __reduce_ex__(self, protocol: Any) -> tuple:
        inner = [x.detach() for x in self.copied().inner_tensors().values()]
        # PyTorch (2.13) does not read a float8 tensor that was pickled by itself.
        inner = [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in inner]
        is_parameter = isinstance(self, nn.Parameter)
        return _restored, (type(self), inner, tuple(self.shape), self.dtype, is_parameter)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.INNER), (tuple(self.shape), self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> Any:
        return cls(*(inner[name] for name in cls.INNER), *context)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on beside the values."""
        return f"{type(self).__name__} {tuple(self.shape)} {self.dtype} {tuple(self.packed.shape)}"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Of any nn.Linear, whoever calls it: below this level a product is several operators.
        kwargs = kwargs or {}
        if func is F.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, weight = named["input"], named["weight"]
            if isinstance(weight, QuantizedTensor) and not isinstance(x, QuantizedTensor):
                return linear(x, weight, named.get("bias"))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is aten.embedding.default and isinstance(first, QuantizedTensor):
            return first.rows(args[1])
        if func is aten._to_copy.default and isinstance(first, QuantizedTensor):
            if kwargs.get("dtype") in (None, *COMPUTED_IN):
                return first.converted(kwargs.get("dtype"), kwargs.get("device"))
        if func is aten.copy_.default and isinstance(first, QuantizedTensor):
            if type(args[1]) is type(first) and _alike(first, args[1]):
                first.take_over(args[1])
                return first
        return super().__torch_dispatch__(func, types, args, kwargs)


def rows_of_panels(x: Tensor, places: Tensor) -> Tensor:
    """Rows of an inner tensor (P, S, 32, ...) of panels, as panels of their own."""
    found = x[places // PANEL_ROWS, :, places % PANEL_ROWS]  # (n, S, ...)
    missing = -len(places) % PANEL_ROWS
    found = F.pad(found, (0, 0) * (found.dim() - 1) + (0, missing))
    return found.unflatten(0, (-1, PANEL_ROWS)).transpose(1, 2).contiguous()


def _alike(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    pairs = zip(one.inner_tensors().values(), other.inner_tensors().values(), strict=True)
    return one.shape == other.shape and all(a.shape == b.shape for a, b in pairs)


def _restored(
    kind: Any, inner: list[Tensor], shape: tuple, dtype: torch.dtype, is_parameter: bool
) -> Tensor:
    dtypes = (dtype for _, dtype in kind.inner_layouts(shape)[0].values())
    weight = kind(*(x.view(d) for x, d in zip(inner, dtypes, strict=True)), shape, dtype)
    return nn.Parameter(weight, False) if is_parameter else weight
