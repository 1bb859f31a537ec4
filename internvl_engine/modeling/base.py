"""What every model of the family shares: initialisation, recomputation switches, loading."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import Placement, load_pretrained, replaced_weights, save_forms
from ..checkpoint.held import is_quantized
from ..configuration import InternVLConfig


class InternVLPreTrainedModel(PreTrainedModel):
    """Base of all models. Loading is our own: a missing or damaged weight is an error, never a
    guess.

    `gradient_checkpointing_enable()` and `..._disable()` switch recomputation of the layers in
    every module that has the attribute `gradient_checkpointing` (vision encoder and QLLaMA).
    """

    config_class = InternVLConfig
    base_model_prefix = "internvl"
    supports_gradient_checkpointing = True
    placement: Placement | None = None  # set by loading
    _tied_weights_keys = None  # LM head and embedding are two tensors in every checkpoint

    def _init_weights(self, module: Any) -> None:
        """Initialises one module by its type; `self` is the nearest model around it."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()
        elif isinstance(module, nn.LayerNorm) or hasattr(module, "variance_epsilon"):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_extra_parameters"):
            module.reset_extra_parameters(std)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes the layers in the backward pass from here on.

        Without `use_reentrant`, transformers 4's default: that loses the gradients of a layer whose
        inputs need none, as those after frozen embeddings.

        options: what transformers from 5.23 on passes along (every_n_layers, offload).
        """
        super().gradient_checkpointing_enable(
            gradient_checkpointing_kwargs or {"use_reentrant": False}, **options
        )

    @property
    def device(self) -> torch.device:
        """Where inputs belong: of an offloaded model, not the meta device of its first weight."""
        device = super().device
        return self.placement.main if device.type == "meta" and self.placement else device

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint; see `internvl_engine.checkpoint.load_pretrained`."""
        return load_pretrained(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(
        self, save_directory: Any, *, quantized: bool = False, **kwargs: Any
    ) -> None:
        """As transformers', which leaves the index of an earlier save in shards beside one file.

        Who reads the folder could not tell which of the two is the model. Weights that are held in
        fewer bits are written one at a time.

        Args:
            save_directory: made where it is not there.
            quantized: write quantized weights as they are held, for `from_pretrained` to map; False
                writes their values in the dtype that they compute in.
            kwargs: of transformers' `save_pretrained`; where weights are quantized max_shard_size.
        """
        if quantized or any(map(is_quantized, self.parameters())):
            shards = {k: v for k, v in kwargs.items() if k == "max_shard_size"}
            save_forms(self, save_directory, quantized=quantized, **shards)
            return
        with replaced_weights(save_directory):
            super().save_pretrained(save_directory, **kwargs)
