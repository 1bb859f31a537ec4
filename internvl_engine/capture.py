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
from torch.utils.weak import WeakTensorKeyDictionary

from .recording import CaptureError, HostReadError, record

__all__ = ["CaptureError", "Captured", "HostReadError", "record", "weights_of"]


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
    """One CUDA graph, with the tensors that it reads and writes.

    Parameters are left to their modules, which could not change their form otherwise.
    """

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        # Before the capture: kernels are compiled and tuned, libraries take their workspaces.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), _Reads(self.inputs) as reads:
            function(*self.inputs)
        self.read = list(reads.kept.values())  # the graph has their addresses only
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


class _Reads(TorchDispatchMode):
    """Keeps what a function reads beside its inputs, parameters and what it makes itself."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}
        self.known = WeakTensorKeyDictionary(dict.fromkeys(inputs, True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs)):
            if type(x) is Tensor and x not in self.known:
                self.kept[id(x)] = x
        for x in tree_leaves(result):
            if type(x) is Tensor and id(x) not in self.kept:
                self.known[x] = True
        return result


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
