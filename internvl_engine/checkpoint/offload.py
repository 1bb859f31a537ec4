"""The hooks of a spread model: inputs follow the weights, offloaded weights come and go.

Every block has hooks, and no module above the blocks does: QLLaMA's encoders call `forward_train`,
past any hook on the decoder itself, but whoever runs the model calls its blocks. Before a block
runs, its hook moves the inputs to its device and brings offloaded weights there; after it, the
weights go again, and blocks outside a stack of layers hand their output to the main device.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .placement import Placement, in_stack


def attach(model: nn.Module, placement: Placement, kept: Mapping[str, Tensor]) -> None:
    """Puts the hooks on the blocks.

    Args:
        kept: the offloaded parameters, on the CPU, by their names in the model.
    """
    for name in placement.blocks:
        block = model.get_submodule(name)
        device = placement.of(f"{name}.weight")[0]
        weights = {
            n.removeprefix(f"{name}."): t for n, t in kept.items() if n.startswith(f"{name}.")
        }
        output = None if in_stack(model, name) else placement.main
        hook = BlockHook(block, device, weights, output)
        block.register_forward_pre_hook(hook.before, with_kwargs=True)
        block.register_forward_hook(hook.after, always_call=True)
        if weights:
            # Torch marks the hook with an attribute, which a bound method does not take.
            block.register_state_dict_post_hook(partial(hook.give))
            block.register_load_state_dict_pre_hook(hook.refuse)


class Offloaded(nn.Parameter):
    """What stands for a weight that is elsewhere: shape and dtype, on the meta device.

    Multiplying by a plain meta tensor returns uninitialised memory on the CPU (torch 2.13), so
    that code which reaches past a block's forward into its parts would be silently wrong.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if any(isinstance(a, Tensor) and not a.is_meta for a in (*args, *kwargs.values())):
                raise RuntimeError(
                    "a weight is offloaded: call the block it belongs to (a layer, a pooler, an "
                    "embedding), not a part of it, or load the model without offloading"
                )
            result = func(*args, **kwargs)
            return result.as_subclass(cls) if isinstance(result, Tensor) else result


class BlockHook:
    """Brings one block's inputs and offloaded weights to its device, and takes the latter away.

    Args:
        block: the module.
        device: where it runs.
        weights: its offloaded parameters by name; on the meta device while it does not run.
        output: the device its output is handed to; None leaves it.
    """

    def __init__(
        self,
        block: nn.Module,
        device: torch.device,
        weights: Mapping[str, Tensor],
        output: torch.device | None,
    ) -> None:
        self.device, self.output = device, output
        self.weights = dict(weights)
        self.slots = []
        for name, tensor in weights.items():
            owner, _, leaf = name.rpartition(".")
            module = block.get_submodule(owner)
            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            placeholder = Offloaded(blank, requires_grad=False)
            module._parameters[leaf] = placeholder
            self.slots.append((module, leaf, tensor, placeholder))

    def before(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for module, leaf, tensor, _ in self.slots:
            module._parameters[leaf] = nn.Parameter(tensor.to(self.device), requires_grad=False)
        return _move(args, self.device), _move(kwargs, self.device)

    def after(self, block: nn.Module, args: tuple, output: Any) -> Any:
        for module, leaf, _, placeholder in self.slots:
            module._parameters[leaf] = placeholder
        return output if self.output is None else _move(output, self.output)

    def give(self, block: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
        """Puts the offloaded weights into a state dict, in place of their placeholders."""
        state.update({prefix + name: tensor for name, tensor in self.weights.items()})

    def refuse(self, block: nn.Module, state: dict, prefix: str, *_: Any) -> None:
        """Torch would load into placeholders, that is, not at all."""
        raise RuntimeError(
            f"{prefix.rstrip('.')} is offloaded and cannot take a state dict; load the model "
            "without offloading"
        )


def _move(value: Any, device: torch.device) -> Any:
    """Moves the tensors of nested tuples, lists and dicts; caches and masks move their own."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_move(item, device) for item in value)
    if type(value) is dict:
        return {name: _move(item, device) for name, item in value.items()}
    return value
