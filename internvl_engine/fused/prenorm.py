"""A pre-norm transformer block, the layer of nearly every vision tower, on the fused operators.

qkv = norm1(h) Wqkv                 one product, whether q, k, v lie in one weight or in three
a = attention(qkv)                  the norms of q and k, where it has them, folded into the scores
n, h = add_norm(a Wproj, h, ls1)    layer scale, residual and norm2 in one pass
m = gelu(n W1) W2                   the activation in the product's epilogue
n, h = add_norm(m, h, ls2)          with norm1 of the next block, where a loop carries (n, h)

Norms are LayerNorm or RMSNorm, activations the exact, the tanh or the quick GELU; biases and layer
scales may be missing. A class for each family says what its parts are called: vision.py, towers.py.

B batch, N tokens, C width, H heads
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..weights import find_linear
from .attention import Heads, attend
from .base import FusedModule, submodule
from .norm import add_normalize, add_scaled, epsilon, is_norm, is_rms_norm, normalize

# The epilogue of each class of activation; that of nn.GELU depends on `approximate`.
EPILOGUES = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELU": "gelu_quick",
    "QuickGELUActivation": "gelu_quick",
}
# transformers' names of softmax attention; another one may be anybody's.
SOFTMAX = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
STATES = ("hidden_states", "x", "q_x")  # what forwards call the states
MASKS = ("attention_mask", "attn_mask")
NONE = ("", "")  # no part has this name
UNREAD = ("output_hidden_states", "return_dict", "use_cache")  # which no block reads


class FusedPreNormBlock(FusedModule):
    """h + ls1 * attention(norm1(h)), then h + ls2 * mlp(norm2(h)): (B, N, C) to (B, N, C).

    Served are calls with the states alone, causal ones, and those with a mask where the eager block
    gives that to PyTorch's attention. What else a call brings, the eager block reads.
    """

    COMPILED = "step"
    NORMS: tuple[str, str]
    SCALES = NONE  # layer scales: parameters, which may be missing
    ATTENTION: str  # the module that knows the heads
    QK_NORMS = NONE  # of q and k, over all heads together
    ACTIVATION: str
    # Of the eager forward: its arguments, and whether it returns a tuple.
    ARGUMENTS: tuple[str, ...]
    RETURNS_TUPLE: bool

    @classmethod
    def facts(cls, eager: Any) -> dict[str, Any]:
        names = tuple(signature(eager.forward).parameters)[1:]
        return {"ARGUMENTS": names, "RETURNS_TUPLE": "output_attentions" in names}

    @classmethod
    def matches(cls, module: Any) -> bool:
        linears = (*cls.LINEARS["qkv"], *cls.LINEARS["proj"])
        return (
            isinstance(module, nn.Module)
            and all(submodule(module, name) is not None for name in cls.NORMS)
            and all(find_linear(module, name) is not None for name in linears)
            and number_of_heads(submodule(module, cls.ATTENTION)) is not None
        )

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for name in cls.NORMS:
            if not is_norm(norm := submodule(module, name)):
                return f"its {name} is {type(norm).__name__}, neither LayerNorm nor RMSNorm"
        names = (*cls.LINEARS["fc1"], *cls.LINEARS["fc2"])
        fc1, fc2 = (submodule(module, name) for name in names)
        if getattr(fc1, "out_features", 0) != getattr(fc2, "in_features", None):
            return f"its MLP is not {' and '.join(names)} with an activation between them"
        activation, attention = submodule(module, cls.ACTIVATION), submodule(module, cls.ATTENTION)
        if epilogue_of(activation) is None:
            found = "missing" if activation is None else type(activation).__name__
            return f"its {cls.ACTIVATION} is {found}, not a GELU"
        q_norm, k_norm = (submodule(module, name) for name in cls.QK_NORMS)
        if is_rms_norm(q_norm) and not (is_rms_norm(k_norm) and epsilon(q_norm) == epsilon(k_norm)):
            return "the norms of its queries and keys are not alike"
        if unknown := cls._unknown_parameters(module):
            return f"it also holds {unknown[0]}"
        if not isinstance(scale := scale_of(attention), float | int | None):
            return f"its scores are scaled by a {type(scale).__name__}"
        width = submodule(module, cls.LINEARS["proj"][0]).in_features
        return kernels.unsupported_head_dim(width // number_of_heads(attention))

    @classmethod
    def _unknown_parameters(cls, module: Any) -> list[str]:
        linears = [name for names in cls.LINEARS.values() for name in names]
        known = (*cls.NORMS, *cls.QK_NORMS, *cls.SCALES, *linears)
        # Below a linear that was wrapped, and in_proj_weight.
        prefixes = tuple(name + after for name in known for after in "._")
        names = (name for name, _ in module.named_parameters())
        return [name for name in names if name not in known and not name.startswith(prefixes)]

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        width = submodule(module, cls.LINEARS["proj"][0]).in_features
        others = list(signature(type(module).forward).parameters.values())[2:]
        needed = [p for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        return (draw(2, 17, width), *(None for _ in needed))

    @property
    def first_norm(self) -> nn.Module:
        """The norm of what comes in."""
        return submodule(self, self.NORMS[0])

    def drops(self) -> bool:
        """Also where stochastic depth drops samples, or the attention function probabilities."""
        attention = submodule(self, self.ATTENTION)
        names = ("attention_dropout", "dropout_prob", "dropout")
        rates = (getattr(attention, name, None) for name in names)
        if any(isinstance(rate, float | int) and rate > 0 for rate in rates):
            return True
        paths = (part for name, part in self._modules.items() if name.startswith("drop_path"))
        return not all(isinstance(path, nn.Identity | None) for path in paths) or super().drops()

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """(B, N, C), in a tuple where the eager block returns one."""
        given = dict(zip(self.ARGUMENTS, args, strict=False)) | kwargs
        states = [given.pop(name) for name in STATES if name in given]
        if len(args) > len(self.ARGUMENTS) or len(states) != 1 or not _is_sequence(states[0]):
            return NotImplemented
        mask, is_causal = self._mask(given)
        read = (value for name, value in given.items() if name not in UNREAD)
        if mask is NotImplemented or not all(value is None or value is False for value in read):
            return NotImplemented
        normed = normalize(self.first_norm, states[0])
        hidden = self.run("step", normed, states[0], None, mask, is_causal)[1]
        return (hidden,) if self.RETURNS_TUPLE else hidden

    def step(
        self, normed: Tensor, hidden: Tensor, next_norm: nn.Module | None,
        mask: Tensor | None = None, is_causal: bool = False,
    ) -> tuple[Any, Tensor]:  # fmt: skip
        """The block as values: (n, h) of this block to those of the next one.

        Args:
            normed: (B, N, C), the first norm of hidden.
            hidden: (B, N, C).
            next_norm: of the next block; None after the last.
            mask: (B or 1, H or 1, N or 1, N), as PyTorch's attention takes it.
            is_causal: whether no token sees a later one.

        Returns:
            (next_norm(h) or None, h), each (B, N, C).
        """
        scale1, scale2 = (self._layer_scale(name) for name in self.SCALES)
        update = self._attend(normed, mask, is_causal)
        normed, hidden = add_normalize(update, hidden, scale1, submodule(self, self.NORMS[1]))
        inner = self.product("fc1")(normed, epilogue_of(submodule(self, self.ACTIVATION)))
        if next_norm is None and scale2 is None:
            return None, self.product("fc2")(inner, residual=hidden)
        update = self.product("fc2")(inner)
        if next_norm is None:
            return None, add_scaled(update, hidden, scale2)
        return add_normalize(update, hidden, scale2, next_norm)

    def _mask(self, given: dict[str, Any]) -> tuple[Any, bool]:
        """(mask, is_causal) out of the arguments; NotImplemented where they are not served."""
        attention = submodule(self, self.ATTENTION)
        config = getattr(attention, "config", None)
        function = getattr(config, "_attn_implementation", "sdpa")
        masks = [given.pop(name) for name in MASKS if name in given]
        mask = next((each for each in masks if each is not None), None)
        is_causal = given.pop("is_causal", None)
        if is_causal is None:
            is_causal = getattr(attention, "is_causal", False)
        is_causal = bool(is_causal) and mask is None and function != "eager"
        if mask is None and not is_causal:
            return (None if function in SOFTMAX else NotImplemented), False
        normed = is_rms_norm(submodule(self, self.QK_NORMS[0]))
        if function != "sdpa" or normed or not (mask is None or _is_readable(mask, config)):
            return NotImplemented, False
        return (mask[None, None] if mask is not None and mask.dim() == 2 else mask), is_causal

    def _attend(self, normed: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = submodule(self, self.ATTENTION)
        qkv = self.product("qkv")(normed).unflatten(-1, (3, number_of_heads(attention), -1))
        # nn.MultiheadAttention may take (N, B, C).
        sequence_first = getattr(attention, "batch_first", True) is False
        if sequence_first:
            qkv = qkv.transpose(0, 1)
        output = self._attention(qkv, scale_of(attention), mask, is_causal).flatten(2)
        return self.product("proj")(output.transpose(0, 1) if sequence_first else output)

    def _attention(
        self, qkv: Tensor, scale: float | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """(B, N, 3, H, D) to (B, N, H, D)."""
        if mask is None and not is_causal:
            q_norm, k_norm = (submodule(self, name) for name in self.QK_NORMS)
            if not is_rms_norm(q_norm):
                return kernels.qk_norm_attention(qkv, None, None, 0.0, scale)
            eps = epsilon(q_norm) or 0.0
            return kernels.qk_norm_attention(qkv, q_norm.weight, k_norm.weight, eps, scale)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        if is_causal:
            return kernels.attention(q, k, v, "causal", scale=scale).transpose(1, 2)
        return attend(Heads(q, k, v), mask, scale).transpose(1, 2)

    def _layer_scale(self, name: str) -> Tensor | None:
        parent, _, last = name.rpartition(".")
        holder = submodule(self, parent) if parent else self
        return None if holder is None else holder._parameters.get(last)


def epilogue_of(activation: Any) -> str | None:
    """What `kernels.linear` calls an activation; None for what it does not have."""
    name = EPILOGUES.get(type(activation).__name__)
    return "gelu_tanh" if getattr(activation, "approximate", "none") == "tanh" else name


def number_of_heads(attention: Any) -> Any:
    """The heads of an attention module, which must be known; None where it does not say."""
    names = ("num_heads", "num_attention_heads")
    return next((getattr(attention, name) for name in names if hasattr(attention, name)), None)


def scale_of(attention: Any) -> Any:
    """What an attention module multiplies scores by; None for what PyTorch does."""
    return getattr(attention, "scale", getattr(attention, "scaling", None))


def _is_readable(mask: Tensor, config: Any) -> bool:
    """Whether a mask is one of PyTorch's attention: of a boolean one, only transformers' surely is.

    That of nn.MultiheadAttention says what is not seen.
    """
    return mask.dim() in (2, 4) and (mask.is_floating_point() or config is not None)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 3 and not x.is_nested
