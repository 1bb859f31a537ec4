"""A recording on the CPU: the operators that a function calls, as straight-line code.

PyTorch's dispatcher tells a mode of every operator that runs below autograd; replaying calls the
same ones on the same weights, without the Python and the dispatch between them. Views of weights
and caches are taken once, and what nobody reads is left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CaptureError(RuntimeError):
    """A function cannot be captured."""


class HostReadError(CaptureError):
    """It read a value of a tensor on the host."""


def record(function: Callable[..., Any], *tensors: Tensor) -> tuple[Callable[..., Any], Any]:
    """Runs function(*tensors) once, and records the operators that PyTorch was asked for.

    Tensor subclasses that wrap others (packed weights) are recorded as what they do with them.

    Returns:
        A function of tensors like these, which calls the same operators in the same order, and
        what the function gave.

    Raises:
        HostReadError: the function reads a value on the host, or a shape depends on one.
    """
    recorder = _Recorder(tensors)
    with torch.no_grad(), recorder:
        found = function(*tensors)
    return recorder.replay(found), found


class _Recorder(TorchDispatchMode):
    """Writes down, as Python code, the operators that run.

    Names in the code: i0, i1 ... inputs; v0, v1 ... values that operators gave; k0, k1 ... what
    they were given beside (operators, weights, views of weights, dtypes).
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[tuple[str, str, list[str], bool]] = []
        self.constants: dict[str, Any] = {}
        self.inputs = [f"i{index}" for index in range(len(inputs))]
        self.names = dict(zip(map(id, inputs), self.inputs, strict=True))
        self.held: list[Any] = list(inputs)  # so that no id is given twice
        self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # then the subclass runs its operators, which are recorded
        if _reads_on_host(func, args):
            raise HostReadError(f"{func} reads a value of a tensor on the host")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        fixed = bool(given) and all(self._is_constant(x) for x in given)
        if fixed and func.is_view and _is_within(result, given):
            return result  # it stays a view of the same memory: a constant itself
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in self.names]
        arguments = [self._written(x) for x in args]
        arguments += [f"{name}={self._written(x)}" for name, x in kwargs.items()]
        call = f"{self._constant(func._op)}({', '.join(arguments)})"
        for tensor in new:
            self.names[id(tensor)] = f"v{self.values}"
            self.values += 1
            self.held.append(tensor)
        self.lines.append((self._target(result, new), call, [self.names[id(x)] for x in new],
                           func._schema.is_mutable))  # fmt: skip
        return result

    def replay(self, result: Any) -> Callable[..., Any]:
        """The code as a function: values are dropped after their last use."""
        body, alive = [f"return {self._written(result)}"], set(_names_in(self._written(result)))
        for target, call, new, writes in reversed(self.lines):
            if not writes and alive.isdisjoint(new):
                continue  # nobody reads it
            read = [name for name in _names_in(call) if name[0] == "v"]
            last = sorted({name for name in (*read, *new) if name not in alive})
            if last:
                body.append(f"del {', '.join(last)}")
            body.append(f"{target}{call}")
            alive.update(read)
        source = f"def replay({', '.join(self.inputs)}):\n    " + "\n    ".join(reversed(body))
        exec(compile(source, "<recorded operators>", "exec"), self.constants)
        run = self.constants.pop("replay")

        def below_autograd(*tensors: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd(), no_autocast(AUTOCAST):
                return run(*tensors)

        return below_autograd

    def _target(self, result: Any, new: list[Tensor]) -> str:
        if not new:
            return ""
        if isinstance(result, Tensor):
            return f"{self.names[id(result)]} = "
        names = [self.names.get(id(x), "_") for x in result]
        return f"{', '.join(names)}{',' if len(names) == 1 else ''} = "

    def _is_constant(self, x: Tensor) -> bool:
        return self.names.get(id(x), "k")[0] == "k"

    def _written(self, x: Any) -> str:
        if isinstance(x, Tensor) and id(x) in self.names:
            return self.names[id(x)]
        if x is None or type(x) in (bool, int, str):
            return repr(x)
        if type(x) is dict:
            return f"{{{', '.join(f'{key!r}: {self._written(x[key])}' for key in x)}}}"
        if isinstance(x, tuple | list):
            inner = "".join(f"{self._written(each)}, " for each in x)
            return f"({inner})" if isinstance(x, tuple) else f"[{inner}]"
        return self._constant(x)

    def _constant(self, x: Any) -> str:
        name = self.names.get(id(x))
        if name is None:
            name = self.names[id(x)] = f"k{len(self.constants)}"
            self.constants[name] = x
            self.held.append(x)
        return name


no_autocast = torch._C._ExcludeDispatchKeyGuard  # what was recorded was cast already
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
HOST_READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def _is_within(result: Any, given: list[Tensor]) -> bool:
    """Whether an operator gave views of the memory of what it was given, and no copy: `reshape`,
    which is called a view, gives either."""
    tensors = [*given, *(x for x in tree_leaves(result) if isinstance(x, Tensor))]
    if any(x.layout != torch.strided for x in tensors):
        return False
    storages = {x.untyped_storage().data_ptr() for x in given}
    return all(x.untyped_storage().data_ptr() in storages for x in tensors)


def _reads_on_host(func: Any, args: tuple) -> bool:
    if func is torch.ops.aten.index.Tensor:  # whose shape depends on values for masks only
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return not HOST_READS.isdisjoint(func.tags)


def _names_in(code: str) -> list[str]:
    """The values that a line of code reads."""
    found = "".join(c if c.isalnum() else " " for c in code).split()
    return [name for name in found if name[0] == "v" and name[1:].isdigit()]
