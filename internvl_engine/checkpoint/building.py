"""Builds a model without memory: its parameters are on the meta device until they are loaded.

Buffers that are saved come from the checkpoint too. Those that are not (the inverse frequencies of
a rotary embedding, position ids) exist only if the constructor computes them: where a class has
some, it is built a second time on the CPU, with parameters that go to the meta device as soon as
they are registered, and lends its buffers.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .placement import Placement


def build(model_class: Any, config: Any) -> Any:
    """A model of a class whose weights are on the meta device, and its other buffers on the CPU."""
    with torch.device("meta"):
        model = model_class(config)
    if not any(buffer.is_meta for _, _, buffer in unsaved_buffers(model)):
        return model
    with torch.device("cpu"), _parameters_on_meta():
        twin = model_class(config)
    for path, module in twin.named_modules():
        target = model.get_submodule(path)
        for name in module._non_persistent_buffers_set:
            target._buffers[name] = module._buffers[name]
        # transformers 4's rotary embedding has a second name for its frequencies, of no buffer.
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(target, name, value)
    return model


def unsaved_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Module, name and tensor of every buffer that a state dict leaves out."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield module, name, buffer


def place_buffers(model: nn.Module, placement: Placement) -> None:
    """Puts what no file holds on the device of the weights beside it."""
    paths = {module: path for path, module in model.named_modules()}
    for module, name, buffer in unsaved_buffers(model):
        device, _ = placement.of(f"{paths[module]}.{name}")
        module._buffers[name] = buffer.to(device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers lose their memory at once."""
    thread = threading.get_ident()

    def forget(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(forget)
    try:
        yield
    finally:
        handle.remove()
