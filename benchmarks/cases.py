"""What is timed: cases, each with its providers, ours and everybody else's.

A bench_<op>.py, encoder.py and layers.py yield cases; timing.py checks and times them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from internvl_engine import kernels
from internvl_engine.kernels import _library

Run = Callable[[], Tensor | Sequence[Tensor]]
Setting = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        run: computes it once.
        setting: entered around every call, as `prefer` is.
        same: whether it computes what "eager" does. False for a yardstick, such as the bare product
            of a layer: it is timed, but neither checked nor rated.
        error: how far from eager's its result may be, |result - eager| / |eager|, where it
            computes with quantized weights; None is the case's own limit.
    """

    run: Run
    setting: Setting = nullcontext
    same: bool = True
    error: float | None = None


@dataclass(frozen=True)
class Case:
    """One operator or model on one shape.

    Attributes:
        operator: its name.
        label: what the shape is in the model, as "vision 448 px, forward".
        shape: of the main input.
        dtype: of the main input.
        providers: by name; "eager" is what the others are checked against. `forward` and
            `backward` give the usual ones.
        bytes: read and written at least, by any implementation.
        flops: floating-point operations; 0 where they never bound it.
        images: that one call takes; 0 where that is not what it takes.
        tokens: that one call makes, one after the other; 0 where it makes none.
        varies: (what, how much) where cases differ in one quantity: a picture shows how cost grows.
        baseline: the provider to which the others' speed is related.
        tolerance: how far from eager's a right result may be, in units of the dtype's eps: two
            results that each round several times; a wrong one is off by 1e-1 or more.
    """

    operator: str
    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    providers: dict[str, Provider]
    bytes: int
    flops: int = 0
    images: int = 0
    baseline: str = "eager"
    tolerance: float = 8.0
    tokens: int = 0
    varies: tuple[str, float] | None = None


@dataclass(frozen=True)
class Finding:
    """What is measured once, such as memory, and not in turns with others.

    Attributes:
        operator: what was done.
        label: to what.
        values: by name, seconds or bytes.
        text: for people, of several lines.
    """

    operator: str
    label: str
    values: dict[str, float]
    text: str


def ours(operator: str, run: Run) -> dict[str, Provider]:
    """One provider for each backend of ours that serves run() on the device in use.

    Args:
        operator: whose backends; "<name>_backward" where run() is only the backward pass.
        run: calls it.
    """
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    return {
        f"ours ({name})": Provider(run, partial(kernels.prefer, operator, name))
        for name in kernels.backends(operator)[device]
        if name != "reference"
        and not (device == "CPU" and name == "triton")  # interpreted
        and _serves(operator, device, name, run)
    }


def _serves(operator: str, device: str, backend: str, run: Run) -> bool:
    """Whether a backend computes run() itself: one that passes it on would time another's kernel.

    A backend that breaks serves it: the check before timing reports it.
    """
    order = _library._ORDER[operator][device]
    before = list(order)
    order[:] = [entry for entry in order if entry[0] == backend]
    try:
        run()
    except Exception as error:  # noqa: BLE001
        return "the reference serves every call" not in str(error)
    finally:
        order[:] = before
    return True


def rival(
    name: str, run: Run, setting: Setting = nullcontext, same: bool = True,
    error: float | None = None,
) -> dict[str, Provider]:  # fmt: skip
    """A provider of somebody else's; none, and a line that says why, where it does not run here."""
    try:
        with setting():
            run()
    except Exception as problem:  # noqa: BLE001  must not end a run whose other rows are good
        return absent(name, problem)
    return {name: Provider(run, setting, same, error)}


def absent(name: str, problem: Exception) -> dict[str, Provider]:
    """No provider, and a line that says why."""
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    print(f"  {name} does not run here: {reason}", file=sys.stderr)
    return {}


def compiled(run: Callable, *args) -> dict[str, Provider]:
    """The provider "torch.compile" of `run(*args)`."""
    return rival("torch.compile", partial(compile_anew(run), *args))


def compile_anew(function: Callable) -> Callable:
    """torch.compile for one shape. Forgets earlier ones: the ninth of a function hits a limit."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def installed(module: str, name: str) -> Any:
    """Something of a package that not everybody has; None where it is absent."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def forward(
    operator: str, function: Callable, reference: Callable, *args: Tensor,
    others: Mapping[str, Callable],
) -> dict[str, Provider]:  # fmt: skip
    """Everybody on function(*args): our backends, eager, the others, and eager compiled."""
    found = {
        **ours(operator, partial(function, *args)),
        "eager": Provider(partial(reference, *args)),
    }
    for name, other in others.items():
        found |= rival(name, partial(other, *args))
    return found | compiled(reference, *args)


def backward(
    operator: str, function: Callable, reference: Callable, *leaves: Tensor,
    others: Mapping[str, Callable],
) -> dict[str, Provider]:  # fmt: skip
    """Everybody on the gradient of function(*leaves) alone."""
    found = {
        **ours(f"{operator}_backward", gradient_of(function, *leaves)),
        "eager": Provider(gradient_of(reference, *leaves)),
    }
    for name, other in others.items():
        found |= rival(name, gradient_of(other, *leaves))
    # The graph is kept and replayed: its buffers must stay.
    kept = partial(torch._functorch.config.patch, donated_buffer=False)
    run = gradient_of(compile_anew(reference), *leaves)
    return found | rival("torch.compile", run, kept)


def gradient_of(function: Callable, *leaves: Tensor) -> Run:
    """Only the backward of function(*leaves), replayed on a graph that the first call builds."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    @cache
    def graph() -> tuple[tuple[Tensor, ...], list[Tensor]]:
        with torch.enable_grad():
            outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator(outputs[0].device).manual_seed(0)
        grads = [
            torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
            for y in outputs
        ]
        return outputs, grads

    def run() -> tuple[Tensor, ...]:
        outputs, grads = graph()
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return run
