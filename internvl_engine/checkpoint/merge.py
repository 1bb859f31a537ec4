"""One weight of the model from the checkpoint: read, LoRA merged in, cast.

merged = W + alpha / r * B A        in float32, rounded once
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .contents import Contents


class Reader:
    """Reads weights by their published names, merging LoRA where asked to.

    Args:
        contents: the checkpoint.
        merge: whether LoRA is folded into the weights it adapts.
        alphas: beginning of a name to alpha; None is 2 * r.
    """

    def __init__(
        self,
        contents: Contents,
        merge: bool = False,
        alphas: Mapping[str, float | None] | None = None,
    ) -> None:
        self.contents = contents
        self.merge = merge
        self.alphas = dict(alphas or {})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, cast to dtype; mapped from its file where nothing had to be computed."""
        tensor = self.contents.tensors[name].read()
        sides = self._adapter(name)
        if sides is not None:
            tensor = self._merged(name, tensor, sides)
            dtype = dtype or self.contents.tensors[name].dtype
        return tensor if dtype is None else tensor.to(dtype)

    def is_computed(self, name: str) -> bool:
        """Whether LoRA changes the weight."""
        return self._adapter(name) is not None

    def _adapter(self, name: str) -> dict[str, Any] | None:
        if not self.merge or not name.endswith(".weight"):
            return None
        return self.contents.lora.get(name.removesuffix(".weight"))

    def _merged(self, name: str, weight: Tensor, sides: dict[str, Any]) -> Tensor:
        a, b = sides["A"].read().float(), sides["B"].read().float()
        alpha = next((v for start, v in self.alphas.items() if name.startswith(start)), None)
        rank = a.shape[0]
        scale = (2 * rank if alpha is None else alpha) / rank
        # Into the product, so that no third matrix of this size exists.
        return torch.addmm(weight.float(), b, a, alpha=scale)
