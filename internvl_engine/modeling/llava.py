"""InternVL-14B as the vision tower of LLaVA: query tokens and patches, each with its projector.

    patches = hidden_states[select_layer] of the vision tower, without the class token   (B, P, C_v)
    states  = the queries after QLLaMA has read the last hidden state                    (B, Q, C)
    outputs = [mlp2(states) ; mlp1(patches)]                                             (B, Q+P, D)

96 + 576 tokens at 336 px. Source: OpenGVLab/InternVL, internvl_chat_llava (clip_encoder.py, and
the projector "two_mlp" of multimodal_projector/builder.py).

    B images, P patches, Q queries, C_v, C and D widths of the towers and of the language model
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bridge import mlp, read
from .projectors import load_projector
from .query_parts import QueryDecoder, query_parts
from .vision import InternVisionModel


class LlavaTower(nn.Module):
    """Images to Q + P embeddings for a language model.

    Args:
        vision_model: an InternViT.
        qllama: a QueryDecoder that reads its states.
        query_tokens: (1, Q, C).
        output_hidden_size: width D of the language model.
        select_layer: index of the hidden state whose patches are taken; -1 is the last.
    """

    def __init__(
        self,
        vision_model: InternVisionModel,
        qllama: QueryDecoder,
        query_tokens: nn.Parameter,
        output_hidden_size: int,
        select_layer: int = -1,
    ) -> None:
        super().__init__()
        layers = vision_model.config.num_hidden_layers
        if not -layers - 1 <= select_layer <= layers:
            raise ValueError(
                f"LlavaTower: select_layer must be one of the {layers + 1} hidden states, got "
                f"{select_layer}"
            )
        self.select_layer = select_layer
        self.vision_model = vision_model
        self.query_tokens = query_tokens
        self.qllama = qllama
        widths = vision_model.config.hidden_size, query_tokens.shape[-1], output_hidden_size
        with torch.device(query_tokens.device):
            self.projector = TwoMLP(*widths).to(query_tokens.dtype)

    @classmethod
    def from_internvl(
        cls,
        source: Any,
        output_hidden_size: int,
        *,
        select_layer: int = -1,
        projector: str | Path | None = None,
        copy_weights: bool = False,
        **options: Any,
    ) -> "LlavaTower":
        """The tower of an InternVL-14B.

        Args:
            source: an InternVLModel, or a directory or hub id of its checkpoint.
            output_hidden_size: width D of the language model.
            select_layer: as the class.
            projector: file of a trained one (mm_projector.bin or safetensors); None is new.
            copy_weights: of a model: False shares its parameters, True copies them.
            options: of a checkpoint: dtype, device, revision and others, as `from_pretrained`.
        """
        stored = isinstance(source, str | Path)
        parts = query_parts(source, False, options)
        vision = (
            InternVisionModel.from_pretrained(source, **options) if stored else source.vision_model
        )
        if copy_weights:
            vision, parts = copy.deepcopy((vision, parts))
        tower = cls(
            vision, QueryDecoder(parts.decoder), parts.query_tokens, output_hidden_size,
            select_layer,
        )  # fmt: skip
        if projector is not None:
            load_projector(tower.projector, projector)
        return tower.eval()

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(patches (B, P, C_v), query states (B, Q, C)) of images (B, 3, height, width)."""
        pixel_values = pixel_values.to(self.query_tokens.dtype)
        vision: Any = self.vision_model(pixel_values, output_hidden_states=True, return_dict=True)
        states = read(self.qllama, self.query_tokens, vision.last_hidden_state)
        return vision.hidden_states[self.select_layer][:, 1:], states

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embeddings (B, Q + P, D) of images (B, 3, height, width): queries, then patches."""
        return self.projector(*self.features(pixel_values))


class TwoMLP(nn.Module):
    """A projector of patches and another of queries, under LLaVA's names `mlp1` and `mlp2`."""

    def __init__(self, vision_width: int, query_width: int, out: int) -> None:
        super().__init__()
        self.mlp1 = mlp(vision_width, out)
        self.mlp2 = mlp(query_width, out)

    def forward(self, patches: Tensor, queries: Tensor) -> Tensor:
        """(B, P, C_v) and (B, Q, C) to (B, Q + P, D)."""
        dtype = next(self.parameters()).dtype
        return torch.cat((self.mlp2(queries.to(dtype)), self.mlp1(patches.to(dtype))), dim=1)
