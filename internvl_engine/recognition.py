"""Which classes are known to compute what a fused class does, and how another is found out.

A known class is trusted by where it is defined; its structure (names and shapes of what it holds)
is checked all the same. A module with that structure from elsewhere may scale, clamp or turn in
between: of 182 norms of transformers 5.23 that look alike, 16 compute something else (Gemma's,
Qwen3-Next's: weights count from 1). A table would miss the 166 or take the 16 for them, so one
module of each class and configuration is tried: a stand-in with random float32 weights on the CPU
computes both ways.
"""

from collections import OrderedDict
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .fused import (
    FusedAttentionPooling,
    FusedCLIPLayer,
    FusedCrossAttention,
    FusedDecoder,
    FusedDecoderLayer,
    FusedDinov2Layer,
    FusedDinov2LayerOf4,
    FusedInternLM2Attention,
    FusedInternLM2MLP,
    FusedLlamaAttention,
    FusedLlamaLayer,
    FusedLlamaMLP,
    FusedModule,
    FusedPackedAttention,
    FusedPackedLayer,
    FusedPackedMLP,
    FusedPreNormBlock,
    FusedPublishedAttention,
    FusedResidualAttentionBlock,
    FusedRMSNorm,
    FusedTimmBlock,
    FusedTransformersVisionLayer,
    FusedVisionEncoder,
    FusedVisionLayer,
    FusedViTLayer,
    FusedViTLayerOf4,
)
from .fused.base import submodule

OURS = "internvl_engine.modeling."
MODELS = "transformers.models."
LLAMA = (f"{MODELS}llama.modeling_llama",)
MISTRAL = (f"{MODELS}mistral.modeling_mistral",)
PHI3 = (f"{MODELS}phi3.modeling_phi3",)
QWEN2 = (f"{MODELS}qwen2.modeling_qwen2",)
QWEN3 = (f"{MODELS}qwen3.modeling_qwen3",)
QWEN3_MOE = (f"{MODELS}qwen3_moe.modeling_qwen3_moe",)
# Fused class -> the names of its eager classes and where those are defined: the module's path or,
# for remote code and copies of the published repository, the name of its file.
KNOWN: dict[type[FusedModule], dict[str, tuple[str, ...]]] = {
    FusedVisionEncoder: {"InternVisionEncoder": (f"{OURS}vision", "modeling_intern_vit")},
    FusedVisionLayer: {"InternVisionEncoderLayer": (f"{OURS}vision", "modeling_intern_vit")},
    FusedTransformersVisionLayer: {
        "InternVLVisionLayer": (f"{MODELS}internvl.modeling_internvl",),
    },
    FusedTimmBlock: {"Block": ("timm.models.vision_transformer",)},
    FusedCLIPLayer: {
        "CLIPEncoderLayer": (f"{MODELS}clip.modeling_clip",),
        "SiglipEncoderLayer": (f"{MODELS}siglip.modeling_siglip",),
        "Siglip2EncoderLayer": (f"{MODELS}siglip2.modeling_siglip2",),
    },
    **{
        kind: {
            "Dinov2Layer": (f"{MODELS}dinov2.modeling_dinov2",),
            "Dinov2WithRegistersLayer": (
                f"{MODELS}dinov2_with_registers.modeling_dinov2_with_registers",
            ),
        }
        for kind in (FusedDinov2Layer, FusedDinov2LayerOf4)
    },
    **{
        kind: {"ViTLayer": (f"{MODELS}vit.modeling_vit",)}
        for kind in (FusedViTLayer, FusedViTLayerOf4)
    },
    FusedResidualAttentionBlock: {
        "ResidualAttentionBlock": ("open_clip.transformer",),
        "CustomResidualAttentionBlock": ("open_clip.transformer",),  # named, never served
    },
    FusedDecoder: {"LlamaModel": (f"{OURS}qllama",)},
    FusedDecoderLayer: {"LlamaDecoderLayer": (f"{OURS}qllama_layers",)},
    FusedAttentionPooling: {"AttentionPoolingBlock": (f"{OURS}pooling", "modeling_internvl")},
    FusedLlamaLayer: {
        "LlamaDecoderLayer": LLAMA, "MistralDecoderLayer": MISTRAL, "Qwen2DecoderLayer": QWEN2,
        "Qwen3DecoderLayer": QWEN3, "Qwen3MoeDecoderLayer": QWEN3_MOE,
    },
    FusedPackedLayer: {"Phi3DecoderLayer": PHI3},
    FusedLlamaAttention: {
        "LlamaAttention": LLAMA, "MistralAttention": MISTRAL, "Qwen2Attention": QWEN2,
        "Qwen3Attention": QWEN3, "Qwen3MoeAttention": QWEN3_MOE,
        "GptOssAttention": (f"{MODELS}gpt_oss.modeling_gpt_oss",),
    },
    FusedPackedAttention: {"Phi3Attention": PHI3},
    FusedInternLM2Attention: {"InternLM2Attention": ("modeling_internlm2",)},
    FusedPublishedAttention: {"LlamaAttention": ("modeling_qllama",)},
    FusedCrossAttention: {"LlamaCrossAttention": ("modeling_qllama",)},
    FusedLlamaMLP: {
        "LlamaMLP": (f"{OURS}qllama_layers", *LLAMA, "modeling_qllama"), "MistralMLP": MISTRAL,
        "Qwen2MLP": QWEN2, "Qwen3MLP": QWEN3, "Qwen3MoeMLP": QWEN3_MOE,
    },
    FusedPackedMLP: {"Phi3MLP": PHI3},
    FusedInternLM2MLP: {"InternLM2MLP": ("modeling_internlm2",)},
    FusedRMSNorm: {
        "InternRMSNorm": (f"{OURS}vision", "modeling_intern_vit"),
        "LlamaRMSNorm": (f"{OURS}qllama_layers", *LLAMA, "modeling_qllama"),
        "MistralRMSNorm": MISTRAL, "Qwen2RMSNorm": QWEN2, "Qwen3RMSNorm": QWEN3,
        "Qwen3MoeRMSNorm": QWEN3_MOE, "Phi3RMSNorm": PHI3,
        "InternLM2RMSNorm": ("modeling_internlm2",),
        # apex's, which the published code takes where apex is installed
        "FusedRMSNorm": ("apex.normalization.fused_layer_norm",),
    },
}  # fmt: skip
LOOPS = (FusedVisionEncoder, FusedDecoder)  # whose layers are fused by themselves
# Whose attention, MLP and norms are fused by themselves where the layer as a whole cannot be.
LAYERS = (FusedLlamaLayer, FusedPackedLayer)
# Served where the table has the class: what they do beside computing could not be tried.
BY_TABLE_ONLY = (*LOOPS, *LAYERS, FusedLlamaAttention, FusedPackedAttention)
# Parts that a known class may have from elsewhere, by where those are defined, and by name too.
TRUSTED = (
    "torch.nn.modules.", "transformers.activations", "timm.layers.activations", "timm.layers.drop",
    "timm.models.layers.drop",
)  # fmt: skip
PARTS = {
    "Attention": ("timm.layers.attention", "timm.models.vision_transformer"),
    "LayerNorm": ("timm.layers.norm",),
    "LayerScale": ("timm.layers.layer_scale", "timm.models.vision_transformer"),
    "Mlp": ("timm.layers.mlp",),
}
# Names that others give to something else.
COMMON = {"Block", "LlamaDecoderLayer", "LlamaModel", "ResidualAttentionBlock"}
# Classes that the report names even where they hold something else.
EXPECTED = {name for kind in KNOWN if kind not in LAYERS for name in KNOWN[kind]} - COMMON

# Float32 rounds sums of up to 16,384 products to within 1e-5 of their norm, and another order of
# three layers of them stays below this; a limit, a scale or an epsilon of its own shows as 1e-3.
TOLERANCE = 1e-4
# The tokens of an image: 4 x 4 patches and one more. The first is small enough for every epsilon
# to show, the last large enough for every limit to.
SCALES = torch.logspace(-2, 3, 17, dtype=torch.float32, device="cpu")[:, None]


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PLAIN = (bool, int, float, str, type(None), tuple, list, dict, torch.dtype)  # by what they say


class Recognition:
    """Finds the fused class of a module; of every kind that it does not know one is tried."""

    def __init__(self, check: bool = False) -> None:
        """check: try known classes too."""
        self.check = check
        self._tried: dict[tuple, str | None] = {}

    def kind_of(self, module: Any) -> type[FusedModule] | None:
        """The fused class for a module of this structure, or None."""
        for kind in KNOWN:
            quiet = kind in LOOPS or kind in LAYERS
            if kind.matches(module) and (not quiet or is_known(kind, module)):
                return kind
        return None

    def unsupported_reason(self, kind: type[FusedModule], module: Any) -> str | None:
        """Why a module of this structure must stay eager, or None. Never raises."""
        try:
            known, reason = is_known(kind, module), kind.unsupported_reason(module)
            if reason is not None:
                return reason
            if kind not in BY_TABLE_ONLY and not _same_arguments(kind, type(module)):
                return f"its forward takes other arguments than that of {kind.__name__}"
            if kind in BY_TABLE_ONLY:
                if known and (kind not in LAYERS or _has_known_parts(kind, module)):
                    return None
                name = f"{_path(module)}.{type(module).__name__}"
                return f"{name} is not known to compute what {kind.__name__} does"
            trusted = known and _has_known_parts(kind, module) and not _returns_more(kind, module)
            if trusted and not self.check:
                return None
            key = (kind, _settings(module))
            if key not in self._tried:
                self._tried[key] = _try(kind, module)
            return self._tried[key]
        except Exception as error:  # noqa: BLE001  somebody's code, which may do anything
            return f"it could not be tried: {type(error).__name__}: {error}"


def is_known(kind: type[FusedModule], module: Any) -> bool:
    """Whether the table has the class of a module, and nobody gave that another forward."""
    path = _path(module)
    places = KNOWN[kind].get(type(module).__name__, ())
    own = getattr(type(module).forward, "__module__", path) == path
    return own and any(place in (path, path.rpartition(".")[2]) for place in places)


def is_expected(module: Any) -> bool:
    """Whether the report names a module even where it holds something else than it should."""
    known = (is_known(kind, module) for kind in KNOWN if kind not in LAYERS)
    return type(module).__name__ in EXPECTED or any(known)


def _path(module: Any) -> str:
    return type(module).__module__


def _has_known_parts(kind: type[FusedModule], module: Any) -> bool:
    """Whether all that is computed without being called is of the same file, or known itself."""
    parts = (submodule(module, name) for name in kind.COMPUTED)
    return all(
        _path(part) == _path(module) == getattr(type(part).forward, "__module__", None)
        or _path(part).startswith(TRUSTED)
        or _path(part) in PARTS.get(type(part).__name__, ())
        or is_known(FusedRMSNorm, part)
        for part in parts
        if part is not None
    )


def _returns_more(kind: type[FusedModule], module: Any) -> bool:
    """Whether a forward that could return attentions may return None in their place."""
    return bool(kind.facts(type(module)).get("RETURNS_TUPLE"))


def _settings(module: nn.Module) -> tuple:
    """All of a module that decides what it computes, but its weights; objects by their identity."""
    return tuple(
        (
            name,
            type(m),
            tuple(
                (key, repr(value) if isinstance(value, _PLAIN) else id(value))
                for key, value in vars(m).items()
                if key not in _OF_EVERY_MODULE
            ),
            tuple((k, None if p is None else p.shape) for k, p in m._parameters.items()),
            tuple((k, None if b is None else id(b)) for k, b in m._buffers.items()),
        )
        for name, m in module.named_modules()
    )


def _try(kind: type[FusedModule], module: nn.Module) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def uniform(low: float, high: float, shape: torch.Size) -> Tensor:
        empty = torch.empty(shape, dtype=torch.float32, device="cpu")
        return empty.uniform_(low, high, generator=generator)

    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = kind.example_inputs(module, lambda *shape: draw(*shape) * SCALES)
        stand_in = _stand_in(module, uniform)
        outputs = [_in_both_modes(stand_in, arguments)]
        kind.fuse(stand_in, inference=False)
        outputs.append(_in_both_modes(stand_in, arguments))
    if not _same(outputs[1], outputs[0]):
        return f"{type(module).__name__} computes something else than {kind.__name__}"
    return None


def _in_both_modes(module: nn.Module, arguments: tuple) -> tuple:
    """What it computes in evaluation and, where dropout shows, in training."""
    outputs = []
    for training in (False, True):
        module.train(training)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            outputs.append(module.forward(*arguments))
    return tuple(outputs)


def _same_arguments(one: type[FusedModule], other: type[nn.Module]) -> bool:
    """Whether modules of two classes can be called alike; a single argument may have any name."""
    if one.compute is FusedModule.compute:  # a loop within the eager forward
        return True
    if issubclass(one, FusedPreNormBlock):  # looks at every argument of a call
        return True
    names = [list(signature(each).parameters) for each in (one.compute, other.forward)]
    return names[0] == names[1] or [len(each) for each in names] == [2, 2]


def _stand_in(module: Any, uniform: Callable[..., Tensor]) -> Any:
    """A module of the same classes and settings with nobody's hooks."""
    if isinstance(getattr(module, "in_features", None), int):  # also quantized, or with LoRA:
        width, bias = module.in_features, getattr(module, "bias", None) is not None
        linear = nn.Linear(width, module.out_features, bias, device="meta")
        spread = (3 / width) ** 0.5  # outputs as large as inputs
        for name, parameter in linear.named_parameters():
            linear._parameters[name] = nn.Parameter(uniform(-spread, spread, parameter.shape))
        return linear
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__.pop("forward", None)
    for name in [name for name in vars(copied) if "_hooks" in name]:
        copied.__dict__[name] = OrderedDict()
    copied._parameters = {
        name: None if p is None else nn.Parameter(_values_like(p, uniform))
        for name, p in module._parameters.items()
    }
    copied._buffers = {name: _plain(buffer) for name, buffer in module._buffers.items()}
    copied._modules = {
        name: None if child is None else _stand_in(child, uniform)
        for name, child in module._modules.items()
    }
    return copied


def _values_like(parameter: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
    if parameter.dim() < 2:
        return uniform(0.5, 1.5, parameter.shape)
    spread = (3 / parameter.shape[-1]) ** 0.5  # as a Linear's, see _stand_in
    return uniform(-spread, spread, parameter.shape)


def _plain(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or not buffer.is_floating_point():
        return None if buffer is None else buffer.to("cpu", copy=True)
    return buffer.to("cpu", torch.float32, copy=True)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether every token of every output is the same within rounding."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return ours is theirs
    error = (ours - theirs).norm(dim=-1)
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same and bool((error <= TOLERANCE * theirs.norm(dim=-1)).all())
