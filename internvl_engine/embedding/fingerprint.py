"""Which weights make an embedding: a short hash of every part of a model, as it is now.

Embeddings that were kept, in memory or on disk, are only comparable with those of the same weights.
Nothing is remembered: every call looks at the weights, so an optimizer's step, a loaded checkpoint,
an edit in place and a merged adapter all show. It stays cheap because large tensors are sampled:
64 runs of 16 neighbouring values (a cache line each), spread over its rows and columns; tensors up
to 65,536 values are read whole. A change that spares
all of that, such as a single row of a large table, is not seen; training never makes one alone.

Values are hashed in bfloat16, so the same checkpoint in another dtype is the same model (float16
apart, which cannot hold every bfloat16 value).
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import WeightTensor

WHOLE = 65_536  # values of a tensor that is read whole
RUNS, RUN = 64, 16  # of larger ones
GOLDEN = 0.6180339887498949
ADAPTERS = ("merged_adapters", "active_adapters", "disable_adapters", "scaling")
PARTS = {  # part: what the names of its tensors begin with
    "vision": ("vision_model.", "clip_projector."),
    "queries": ("query_tokens", "clip_projector2."),
    "text": ("qllama.", "text_projection"),
}


def fingerprint(
    model: nn.Module, parts: Collection[str] = tuple(PARTS), *, exact: bool = False
) -> dict[str, str]:
    """The hash of each part of a model that is there, hexadecimal.

    Args:
        model: eager or accelerated: both give the same hashes, unless `exact`.
        parts: which of "vision", "queries" and "text".
        exact: every bit counts, the dtype, and the form that weights are held in; for what is kept
            beside the model itself.

    Returns:
        {"vision": ..., "queries": ..., "text": ...}; parts that were not loaded are left out.
        Cross-attention counts to the queries; the LM head has no part in embeddings.
    """
    states: dict[str, dict[str, str | Tensor]] = {part: {} for part in parts}
    for name, state in _states(model, () if "vision" in parts else ("vision_model.",)):
        name = name.replace("_orig_mod.", "")  # compiled: the same model
        part = _part(name)
        if part in states:
            states[part][name] = state
    return {part: _hash(found, exact) for part, found in states.items() if found}


def _states(model: nn.Module, without: tuple[str, ...]) -> Iterator[tuple[str, str | Tensor]]:
    """Names and values of what a model computes with: `state_dict`, one module at a time.

    Adapters that are switched on, off and merged are in no tensor: their state comes as text.

    Args:
        without: modules whose names begin so are left out.
    """
    modules = [("", model)]
    while modules:
        prefix, module = modules.pop()
        if prefix.startswith(without):
            continue
        own: dict[str, Any] = {}
        if module._state_dict_hooks and any(p.is_meta for p in module.parameters()):
            own = module.state_dict(prefix=prefix)  # offloaded: a hook hands the weights out
        else:
            modules += [(f"{prefix}{n}.", m) for n, m in module._modules.items() if m is not None]
            if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
                module._save_to_state_dict(own, prefix, keep_vars=True)
            else:
                own = {prefix + name: p for name, p in module._parameters.items()}
                passing = module._non_persistent_buffers_set
                own |= {prefix + n: b for n, b in module._buffers.items() if n not in passing}
        for name, state in own.items():
            if isinstance(state, Tensor) and not state.is_meta:
                yield name, state
        if hasattr(type(module), "merged_adapters"):  # a layer of peft
            yield f"{prefix}adapters", str([getattr(module, name, None) for name in ADAPTERS])


def _part(name: str) -> str | None:
    if "lm_head" in name:
        return None
    if name.startswith("qllama.") and ".cross_attn." in name:  # poolers have a cross_attn too
        return "queries"
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


@torch.no_grad()
def _hash(states: dict[str, str | Tensor], exact: bool) -> str:
    digest = hashlib.sha256()
    samples: list[Tensor] = []
    for name, state in sorted(states.items()):
        if isinstance(state, str):
            digest.update(f"{name} {state} ".encode())
        else:
            digest.update(f"{name} {tuple(state.shape)} {state.dtype if exact else ''} ".encode())
            samples += _samples(state, as_held=exact)
    if len({sample.device for sample in samples}) > 1:
        samples = [sample.cpu() for sample in samples]
    values = (
        torch.cat(samples).cpu() if samples else torch.empty(0, dtype=torch.float32, device="cpu")
    )
    if not exact:
        values = values.to(torch.bfloat16)
    digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _samples(tensor: Tensor, as_held: bool = False) -> list[Tensor]:
    """Values of a tensor, flat, in one or several pieces: all up to WHOLE, or RUNS * RUN.

    Args:
        as_held: of a weight in another form, look at the form: cheaper than at its values.
    """
    size, step = tensor.numel(), _step(tensor)
    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous():
        if size <= WHOLE:
            return [tensor.reshape(-1)]
        runs = tensor.as_strided((RUNS, RUN), (step, 1), tensor.storage_offset())
        return [runs.reshape(-1)]
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    parts = [getattr(tensor, name) for name in names]
    if not (parts and as_held and all(part.layout == torch.strided for part in parts)):
        try:
            if size <= WHOLE:
                whole = tensor.dense() if isinstance(tensor, WeightTensor) else tensor.clone()
                return [whole.reshape(-1)]
            starts = torch.arange(RUNS, dtype=torch.int64, device=tensor.device) * step
            run = torch.arange(RUN, dtype=torch.int64, device=tensor.device)
            places = starts[:, None] + run
            return [tensor.take(places).reshape(-1)]
        except (NotImplementedError, RuntimeError):
            if not parts:
                raise
    # Also a quantized weight of another package, without these operators: what it is made of.
    return [sample for part in parts for sample in _samples(_countable(part), as_held)]


def _countable(part: Tensor) -> Tensor:
    """An inner tensor; of float8, which PyTorch puts next to no other type, the bits."""
    return part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part


def _step(tensor: Tensor) -> int:
    """Values between two runs, such that they go through the rows and through the columns."""
    last = tensor.shape[-1] if tensor.ndim else 1
    even = tensor.numel() // RUNS
    return max(even - min(int(last * GOLDEN), even // RUNS), 1)
