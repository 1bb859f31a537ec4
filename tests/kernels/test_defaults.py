"""PyTorch's default dtype and device change no bit: every buffer states its own."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from operator_examples import WITHOUT_GRADIENT, WRITE, examples, has_packed_weight

from internvl_engine import kernels

ROOT = Path(__file__).parents[2]
CONSTRUCTORS = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand",
    "randn", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


def as_leaves(operator, dtype) -> list:
    """The operator's example in this dtype, with gradients where it has some."""
    found = []
    for x in examples()[operator]:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = x.to(dtype) if x.dtype == torch.float32 and not has_packed_weight(operator) else x
            x = x.detach().clone().requires_grad_(operator not in WITHOUT_GRADIENT)
        found.append(x)
    return found


def outputs(operator, arguments) -> list[torch.Tensor]:
    """What it returns, the gradients of the first of that, and what it wrote to."""
    call = getattr(torch.ops.internvl, operator).default
    if operator in WRITE:
        arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        return [call(*arguments), *arguments[-2:]]
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    found = call(*arguments)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    if not leaves:
        return found
    grads = torch.autograd.grad(found[0].float().square().sum(), leaves, allow_unused=True)
    return [*found, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("operator", sorted(examples()))
def test_every_backend_gives_the_same_bits(operator, setting):
    for backend in set(kernels.backends(operator)["CPU"]) - {"triton"}:  # slow; see below
        for dtype in (torch.float32, torch.bfloat16):
            arguments = as_leaves(operator, dtype)
            with kernels.prefer(operator, backend):
                expected = outputs(operator, arguments)
                with SETTINGS[setting]():
                    found = outputs(operator, arguments)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == theirs.dtype, (backend, dtype)
                assert torch.equal(ours, theirs), (backend, dtype)


def test_every_buffer_states_its_dtype_and_device():
    """In what runs on a GPU too; new parameters of a model follow the caller's defaults."""
    wrong = []
    for path in (*(ROOT / "kernels").rglob("*.py"), *(ROOT / "internvl_engine").rglob("*.py")):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        parameters = [n for n in nodes if ast.unparse(n.func).endswith("nn.Parameter")]
        new = {id(inner) for n in parameters for inner in ast.walk(n)}
        for node in nodes:
            if id(node) not in new and ast.unparse(node.func).startswith("torch."):
                stated = {keyword.arg for keyword in node.keywords}
                if node.func.attr in CONSTRUCTORS and not stated >= {"dtype", "device"}:
                    wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong
