"""Decoder layers of transformers' LLaMA and its kin, and their attention alone.

    n    = rms_norm(h)
    a    = attention(n Wqkv) Wo            self_attention.py
    n, h = add_rms_norm(a, h)              residual and the next norm in one pass
    h    = h + swiglu(n Wgu) Wd

q, k, v and gate, up are one product each, whether they are one linear or several. Loops over the
layers, masks and caches stay what they are. Where a layer has other parts than these (experts),
its attention and norms are fused by themselves.
"""

from inspect import signature
from typing import Any

from torch import Tensor

from .base import FusedModule, holds, submodule
from .mlp import FusedLlamaMLP, FusedPackedMLP
from .norm import add_normalize, is_rms_norm, normalize
from .self_attention import CACHES, read_call, self_attend

ARGUMENTS = frozenset(
    ("self", "hidden_states", "position_embeddings", "attention_mask", *CACHES, "cache_position",
     "kwargs")
)  # fmt: skip
LAYER_ARGUMENTS = ARGUMENTS | {"position_ids", "use_cache"}


class FusedLlamaAttention(FusedModule):
    """transformers' LlamaAttention and its twins: Mistral, Qwen2, Qwen3 with norms, GptOss."""

    LINEARS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)}
    COMPUTED = ("q_norm", "k_norm")

    @classmethod
    def matches(cls, module: Any) -> bool:
        linears = (*cls.LINEARS["qkv"], *cls.LINEARS["o"])
        known = ("head_dim", "num_key_value_groups", "scaling", "layer_idx", "config")
        return holds(module, *linears, *known)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        expected = {*cls.LINEARS["qkv"], *cls.LINEARS["o"]}
        if all(_norms_heads(module, name) for name in cls.COMPUTED):
            expected |= {"q_norm", "k_norm"}
        more = [name for name, _ in module.named_children() if name not in expected]
        if more:
            return f"it holds {', '.join(more)} beside its projections"
        more = sorted(set(signature(type(module).forward).parameters) - ARGUMENTS)
        if more:
            return f"its forward takes {', '.join(more)}, which is unknown here"
        rotated = _rotated(module)
        if rotated != 1:
            return f"it rotates {rotated:g} of the channels of a head"
        return None

    def compute(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, S, C) to (B, S, C) and, from "eager" attention, the probabilities (B, H, S, T).

        Where every channel of a head is rotated.
        """
        call = read_call(self.eager_class, hidden_states, args, kwargs)
        if call is None:
            return NotImplemented
        qkv = self.product("qkv")(hidden_states)
        found = self_attend(self, self.eager_class, qkv, call, tells=True)
        if found is None:
            return NotImplemented
        output, probabilities = found
        return self.product("o")(output.flatten(2)), probabilities


class FusedPackedAttention(FusedLlamaAttention):
    """transformers' Phi3Attention: q, k and v are one linear already."""

    LINEARS = {"qkv": ("qkv_proj",), "o": ("o_proj",)}


class FusedLlamaLayer(FusedModule):
    """transformers' LlamaDecoderLayer and its twins: (B, S, C) to (B, S, C)."""

    ATTENTION: type[FusedLlamaAttention] = FusedLlamaAttention
    MLP: type[FusedLlamaMLP] = FusedLlamaMLP
    LINEARS = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    COMPUTED: tuple[str, ...] = (
        "input_layernorm", "post_attention_layernorm", "self_attn", "self_attn.q_norm",
        "self_attn.k_norm", "mlp", "mlp.act_fn",
    )  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:
        if not holds(module, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            return False
        norms = (module.input_layernorm, module.post_attention_layernorm)
        parts = cls.ATTENTION.matches(module.self_attn) and cls.MLP.matches(module.mlp)
        return parts and all(map(is_rms_norm, norms))

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        reason = cls.ATTENTION.unsupported_reason(module.self_attn)
        reason = reason or cls.MLP.unsupported_reason(module.mlp)
        more = sorted(set(signature(type(module).forward).parameters) - LAYER_ARGUMENTS)
        if reason is None and more:
            return f"its forward takes {', '.join(more)}, which is unknown here"
        return reason

    @property
    def layer_idx(self) -> int:
        """The layer's place in the cache."""
        return self.self_attn.layer_idx

    def compute(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = read_call(self.eager_class, hidden_states, args, kwargs)
        if call is None:
            return NotImplemented
        attention = self.self_attn
        qkv = self.product("qkv")(normalize(self.input_layernorm, hidden_states))
        found = self_attend(attention, type(attention), qkv, call, tells=False)
        if found is None:
            return NotImplemented
        attended = self.product("o")(found[0].flatten(2))
        normed, hidden = add_normalize(attended, hidden_states, None, self.post_attention_layernorm)
        return self.product("down")(self.product("gate_up")(normed, "swiglu"), "none", hidden)


class FusedPackedLayer(FusedLlamaLayer):
    """transformers' Phi3DecoderLayer."""

    ATTENTION = FusedPackedAttention
    MLP = FusedPackedMLP
    LINEARS = {
        "qkv": ("self_attn.qkv_proj",),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_up_proj",),
        "down": ("mlp.down_proj",),
    }
    COMPUTED = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp",
                "mlp.activation_fn")  # fmt: skip


def _norms_heads(attention: Any, name: str) -> bool:
    """Whether a submodule is an RMSNorm of the channels of a head."""
    norm = submodule(attention, name)
    return is_rms_norm(norm) and norm.weight.shape == (attention.head_dim,)


def _rotated(attention: Any) -> float:
    """The part of a head's channels that Phi3 rotates; all of them elsewhere."""
    config = attention.config
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return 1.0 if factor is None else float(factor)
