"""Functions of tensors that run from a capture: a CUDA graph, or a recording on the CPU.

Most of a decoding step, and much of a small encode, is Python and dispatch. Both are the same at
every call whose shapes are the same, so they are paid once: on a GPU the kernels that the function
launches become a graph, on the CPU the operators that it calls become straight-line code.

What a function must be for that, on either device:
- it computes from its tensors and from tensors that it holds (weights, caches); whatever else it
  reads is baked in, host integers above all;
- it reads no value of a tensor on the host, and no shape depends on one;
- run twice on the same inputs, it leaves what one run leaves: it is run once before its capture.

A capture reads the tensors that were there when it was made. New values in them are seen; other
tensors in their place (weights packed anew, moved or wrapped) are not: `Captured.keep` drops every
capture where `weights_of` a module has changed, and what lives no longer than one call of a model
needs neither.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CaptureError(RuntimeError):
    """A function cannot be captured."""


class HostReadError(CaptureError):
    """It read a value of a tensor on the host."""


class Captured:
    """A function of tensors, captured once for every key and every shape of its inputs.

    Args:
        function: (*tensors) -> a tensor, or a tuple, list or dict of them; see the head of the
            file.
        limit: captures that are kept; the one that was not used for longest goes first.
        replay: whether the CPU runs a recording of the operators too. Other devices, and the CPU
            without it, call the function.
    """

    def __init__(
        self, function: Callable[..., Any], limit: int = 16, *, replay: bool = False
    ) -> None:
        if limit < 1:
            raise ValueError(f"Captured: limit must be at least 1, got {limit}")
        self.function, self.limit, self.replay = function, limit, replay
        self._captures: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._pool: Any = None  # of the memory that the graphs share
        self._state: Hashable = None

    def __call__(self, *tensors: Tensor, key: Hashable = None) -> Any:
        """What function(*tensors) gives, without gradients.

        Args:
            tensors: on one device; a graph copies them into inputs of its own.
            key: whatever else a capture depends on.

        Returns:
            New tensors on the CPU. On a GPU the graph's own, which its next run overwrites.

        Raises:
            CaptureError: the function reads a value on the host, or does what else a graph cannot
                hold.
        """
        device = tensors[0].device.type
        if device != "cuda" and not (self.replay and device == "cpu"):
            return self._plain(*tensors)
        key = key, tuple((t.shape, t.dtype, t.device) for t in tensors)
        if key in self._captures:
            self._captures.move_to_end(key)
            return self._captures[key](*tensors)
        with torch.no_grad():
            capture = self._graph if device == "cuda" else self._recording
            self._captures[key], found = capture(tensors)
        while len(self._captures) > self.limit:
            self._captures.popitem(last=False)
        return found

    def __len__(self) -> int:
        return len(self._captures)

    def clear(self) -> None:
        """Drops every capture and the memory that they hold."""
        self._captures.clear()
        self._pool = None

    def keep(self, state: Hashable) -> None:
        """Drops every capture unless `state` (of `weights_of`) equals the one given before."""
        if state != self._state:
            self.clear()
        self._state = state

    @torch.no_grad()
    def _plain(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)

    def _recording(self, tensors: Sequence[Tensor]) -> tuple[Callable[..., Any], Any]:
        return record(self.function, *tensors)

    def _graph(self, tensors: Sequence[Tensor]) -> tuple[Callable[..., Any], Any]:
        with torch.cuda.device(tensors[0].device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = _Graph(self.function, tensors, self._pool)
            return graph, graph(*tensors)


class _Graph:
    """One CUDA graph, with the tensors that it reads and writes."""

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        # Before the capture: kernels are compiled and tuned, libraries take their workspaces.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                self.outputs = function(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"no CUDA graph can hold this function: {error}") from error

    def __call__(self, *tensors: Tensor) -> Any:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs


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
        if fixed and func.is_view:
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


def _reads_on_host(func: Any, args: tuple) -> bool:
    if func is torch.ops.aten.index.Tensor:  # whose shape depends on values for masks only
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return not HOST_READS.isdisjoint(func.tags)


def _names_in(code: str) -> list[str]:
    """The values that a line of code reads."""
    found = "".join(c if c.isalnum() else " " for c in code).split()
    return [name for name in found if name[0] == "v" and name[1:].isdigit()]


def weights_of(module: nn.Module) -> Hashable:
    """Where everything lies that a capture of a module reads, and what the module is made of.

    Equal before and after, a capture of the module still reads its weights: one that was replaced
    lies elsewhere, and what lies at the same address is what would be read now. Some milliseconds
    for a thousand modules: once a call of a model, not once a step.
    """
    return tuple(
        (
            type(each), each.training, len(each._forward_hooks), len(each._forward_pre_hooks),
            tuple(_address(x) for x in (*each._parameters.values(), *each._buffers.values())),
        )
        for each in module.modules()
    )  # fmt: skip


def _address(x: Any) -> Hashable:
    if x is None or x.is_meta:
        return None
    if hasattr(x, "__tensor_flatten__"):
        return tuple(_address(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    opaque = x.layout != torch.strided
    return id(x) if opaque else (x.data_ptr(), x.dtype, x.shape, x.device)
