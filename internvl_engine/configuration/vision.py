"""Configuration of InternViT, the vision tower of every InternVL.

Fields: OpenGVLab/InternVL, configuration_intern_vit.py.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """Configuration of InternViT; the defaults are InternViT-6B at 224 px.

    Args:
        num_channels: stored only; the patch convolution reads three.
        patch_size: side of a patch, in pixels.
        image_size: side of the image the position table was made for, in pixels.
        qkv_bias: whether the fused qkv projection has a bias; the other linears always have.
        hidden_size: width C, a multiple of num_attention_heads.
        num_attention_heads: heads, of hidden_size / num_attention_heads each.
        intermediate_size: width of the MLP.
        qk_normalization: RMSNorm of q and k over all heads together.
        num_hidden_layers: encoder layers.
        use_flash_attn: read and kept, never needed.
        hidden_act: activation of the MLP.
        norm_type: "rms_norm" or "layer_norm" (chat variants).
        layer_norm_eps: epsilon of every norm.
        qk_norm_eps: epsilon of the norms of q and k; None is layer_norm_eps.
        dropout: after the attention's output projection.
        attention_dropout: on the attention probabilities.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0.
        initializer_range: standard deviation of new weights.
        initializer_factor: initial value of both layer scales.

    Raises:
        ValueError: hidden_size is not a multiple of num_attention_heads, or norm_type is unknown.
    """

    model_type = "intern_vit_6b"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 224,
        qkv_bias: bool = False,
        hidden_size: int = 3200,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        qk_normalization: bool = True,
        num_hidden_layers: int = 48,
        use_flash_attn: bool = True,
        hidden_act: str = "gelu",
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        qk_norm_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.use_flash_attn = use_flash_attn
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.qk_norm_eps = qk_norm_eps
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"InternVisionConfig: hidden_size must be a multiple of num_attention_heads, "
                f"got {hidden_size} and {num_attention_heads}"
            )
        if norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(
                f"InternVisionConfig: norm_type must be rms_norm or layer_norm, got {norm_type!r}"
            )

    @property
    def qk_eps(self) -> float:
        """Epsilon of the norms of q and k."""
        return self.layer_norm_eps if self.qk_norm_eps is None else self.qk_norm_eps

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]
        """As transformers', and takes the `vision_config` out of a composite file."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config = config.get("vision_config", config)
        config["model_type"] = cls.model_type  # copies of the family name it differently
        return config, kwargs


AutoConfig.register(InternVisionConfig.model_type, InternVisionConfig, exist_ok=True)
