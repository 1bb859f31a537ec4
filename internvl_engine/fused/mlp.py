"""The MLPs of LLaMA's kind: down(silu(gate(x)) * up(x)), gate and up as one product."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import FusedModule, holds, submodule


def is_silu(activation: Any) -> bool:
    """Whether a module is the activation of SwiGLU."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


class FusedLlamaMLP(FusedModule):
    """Any LLaMA's MLP, under the names that most give its parts: (..., C) to (..., C)."""

    LINEARS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
    ACTIVATION = "act_fn"
    COMPUTED: tuple[str, ...] = ("act_fn",)

    @classmethod
    def matches(cls, module: Any) -> bool:
        return holds(module, *cls.LINEARS["gate_up"], *cls.LINEARS["down"], cls.ACTIVATION)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        activation = submodule(module, cls.ACTIVATION)
        if not is_silu(activation):
            return f"its activation is {type(activation).__name__}, not SiLU"
        return None

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, submodule(module, cls.LINEARS["gate_up"][0]).in_features),)

    def compute(self, x: Tensor) -> Tensor:
        return self.product("down")(self.product("gate_up")(x, "swiglu"))


class FusedPackedMLP(FusedLlamaMLP):
    """Phi3's MLP: gate and up are one linear already."""

    LINEARS = {"gate_up": ("gate_up_proj",), "down": ("down_proj",)}
    ACTIVATION = "activation_fn"
    COMPUTED = ("activation_fn",)


class FusedInternLM2MLP(FusedLlamaMLP):
    """InternLM2's MLP, whose linears have numbers."""

    LINEARS = {"gate_up": ("w1", "w3"), "down": ("w2",)}
