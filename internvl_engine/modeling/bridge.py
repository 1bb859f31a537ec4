"""The query bridge: learned queries read an image in QLLaMA, for another language model.

    states  = QLLaMA(query_tokens; cross-attention to the image on every second layer)   (B, Q, C)
    outputs = projector(states)                                                          (B, Q, D)

Whatever the number of vision tokens, Q = 96 come out. `QueryBridge` takes features of a vision
tower; `LlavaTower` holds the tower too, and gives its patches beside the queries.

Source: OpenGVLab/InternVL, modeling_internvl.py, and its use in internvl_chat_llava; Chen et al.,
InternVL, CVPR 2024.

    B images, N vision tokens of C_v = 3200, Q = 96 queries, C = 4096 width of QLLaMA, D width of
    the other language model, E width of a pooled embedding
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig
from transformers.utils import ModelOutput

from ..configuration import InternVLConfig
from .base import InternVLPreTrainedModel
from .masks import AttentionMask
from .pooling import AttentionPoolingBlock
from .qllama import LlamaModel
from .query_parts import QueryDecoder, query_parts


class QueryBridgeConfig(PretrainedConfig):
    """Configuration of a QueryBridge.

    Args:
        qllama_config: LlamaConfig or its dict: width C, layers, heads.
        vision_hidden_size: width C_v of the image's features.
        num_query_token: learned queries Q.
        cross_attention_frequency: cross-attention stands in every how many layers, from 0 on.
        output_hidden_size: width D of the outputs; None is C, without a projector.
        projector: "linear", or "mlp" for two layers with GELU between.
        pool_dim: width E of an embedding that attention pools from the queries; None for none.
        pool_heads: heads of that pooler.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: projector is neither.
    """

    model_type = "internvl_query_bridge"
    sub_configs = {"qllama_config": LlamaConfig}

    def __init__(
        self,
        qllama_config: LlamaConfig | dict | None = None,
        vision_hidden_size: int = 3200,
        num_query_token: int = 96,
        cross_attention_frequency: int = 2,
        output_hidden_size: int | None = None,
        projector: str = "linear",
        pool_dim: int | None = None,
        pool_heads: int = 16,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        if projector not in ("linear", "mlp"):
            raise ValueError(f"QueryBridgeConfig: projector is linear or mlp, got {projector!r}")
        whole = InternVLConfig(
            vision_config={"hidden_size": vision_hidden_size, "num_attention_heads": 1},
            qllama_config=copy.deepcopy(qllama_config),
            num_query_token=num_query_token,
            cross_attention_frequency=cross_attention_frequency,
        )
        self.qllama_config = whole.qllama_config  # with the three fields that QLLaMA reads
        self.vision_hidden_size = vision_hidden_size
        self.num_query_token = num_query_token
        self.cross_attention_frequency = cross_attention_frequency
        self.output_hidden_size = output_hidden_size
        self.projector = projector
        self.pool_dim = pool_dim
        self.pool_heads = pool_heads
        self.initializer_range = initializer_range


@dataclass
class BridgeOutput(ModelOutput):
    """outputs (B, Q, D), the queries' states (B, Q, C), and the pooled embedding (B, E)."""

    last_hidden_state: Tensor | None = None
    query_states: Tensor | None = None
    pooled: Tensor | None = None


class QueryBridge(InternVLPreTrainedModel):
    """Features of an image to a fixed number of embeddings for any causal language model."""

    config_class: Any = QueryBridgeConfig
    main_input_name = "vision_hidden_states"
    _no_split_modules = ["LlamaDecoderLayer", "AttentionPoolingBlock"]

    def __init__(self, config: QueryBridgeConfig) -> None:
        super().__init__(config)
        width = config.qllama_config.hidden_size
        self.qllama = QueryDecoder(LlamaModel(config.qllama_config))
        weight = next(self.qllama.parameters())  # the queries have its dtype and device
        self.query_tokens = nn.Parameter(weight.new_zeros(1, config.num_query_token, width))
        self.projector = _projector(config)
        self.pooler: AttentionPoolingBlock | None = None
        if config.pool_dim is not None:
            self.pooler = AttentionPoolingBlock(
                width, config.pool_heads, qkv_bias=True, out_dim=config.pool_dim
            )
        self.post_init()
        self.reset_extra_parameters(config.initializer_range)

    def reset_extra_parameters(self, std: float) -> None:
        # Equal queries, as zeros are, read the same and have the same gradients for ever.
        nn.init.normal_(self.query_tokens, std=std)

    def forward(self, vision_hidden_states: Tensor, return_dict: bool | None = None) -> Any:
        """Reads images.

        Args:
            vision_hidden_states: (B, N, C_v) of a vision tower, any N; cast to the bridge's dtype.
            return_dict: True gives a BridgeOutput.

        Returns:
            (B, Q, D), or a BridgeOutput with the queries' states and, where the bridge has a
            pooler, the pooled embedding beside.

        Raises:
            ValueError: the features have another shape.
        """
        wanted = self.config.vision_hidden_size
        if vision_hidden_states.ndim != 3 or vision_hidden_states.shape[-1] != wanted:
            raise ValueError(
                f"QueryBridge: vision_hidden_states must be (batch, tokens, {wanted}), got "
                f"{tuple(vision_hidden_states.shape)}"
            )
        states = read(self.qllama, self.query_tokens, vision_hidden_states)
        outputs = _through(self.projector, states)
        if not return_dict:
            return outputs
        return BridgeOutput(
            outputs, states, None if self.pooler is None else _through(self.pooler, states)
        )

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: the queries are no words."""

    @classmethod
    def from_internvl(
        cls,
        source: Any,
        output_hidden_size: int | None = None,
        *,
        projector: str = "linear",
        pool: bool = False,
        copy_weights: bool = False,
        **options: Any,
    ) -> "QueryBridge":
        """The queries and QLLaMA of an InternVL-14B as a bridge; the projector, if any, is new.

        Args:
            source: an InternVLModel, or a directory or hub id of its checkpoint, of which only
                what the bridge needs is kept.
            output_hidden_size: width D of the other language model; None is QLLaMA's own.
            projector: "linear" or "mlp".
            pool: take the second attention pooler along, which pools the queries to a G embedding.
            copy_weights: of a model: False shares its parameters, so that training the bridge
                trains the model; True gives the bridge its own.
            options: of a checkpoint: dtype, device, revision and others, as `from_pretrained`.

        Raises:
            TypeError, ValueError: source is no InternVL-14B, or lacks what the bridge needs.
        """
        parts = query_parts(source, pool, options)
        config = QueryBridgeConfig(
            parts.decoder.config.to_dict(), parts.decoder.config.vision_hidden_size,
            parts.query_tokens.shape[1], parts.decoder.config.cross_attention_frequency,
            output_hidden_size, projector,
            pool_dim=parts.pooler.cross_attn.proj.out_features if parts.pooler else None,
            pool_heads=parts.pooler.cross_attn.num_heads if parts.pooler else 16,
        )  # fmt: skip
        if copy_weights:
            parts = copy.deepcopy(parts)
        with torch.device("meta"):
            bridge = cls(config)
        bridge.query_tokens = parts.query_tokens
        bridge.qllama = QueryDecoder(parts.decoder)
        bridge.pooler = parts.pooler
        with torch.device(parts.query_tokens.device):
            bridge.projector = _projector(config).to(parts.query_tokens.dtype)
        bridge.projector.apply(bridge._init_weights)
        return bridge.eval()


def read(qllama: nn.Module, query_tokens: Tensor, vision_hidden_states: Tensor) -> Tensor:
    """States (B, Q, C) of queries (1, Q, C) after they have read images (B, N, C_v)."""
    queries = query_tokens.expand(vision_hidden_states.shape[0], -1, -1)
    size = queries.shape[1]
    return qllama(
        inputs_embeds=queries,
        vision_hidden_states=vision_hidden_states.to(query_tokens.dtype),
        attention_mask=AttentionMask("full", size, size),
    ).last_hidden_state


def mlp(width: int, out: int) -> nn.Sequential:
    """Two linears with GELU between, the projector of LLaVA 1.5."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def _projector(config: QueryBridgeConfig) -> nn.Module:
    width, out = config.qllama_config.hidden_size, config.output_hidden_size
    if out is None:
        return nn.Identity()
    return nn.Linear(width, out) if config.projector == "linear" else mlp(width, out)


def _through(module: nn.Module, states: Tensor) -> Tensor:
    """A module that may be kept in another dtype than what comes before it."""
    weight = next(module.parameters(), states)
    return module(states.to(weight.dtype))


AutoConfig.register(QueryBridgeConfig.model_type, QueryBridgeConfig, exist_ok=True)
AutoModel.register(QueryBridgeConfig, QueryBridge, exist_ok=True)
