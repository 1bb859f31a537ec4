"""One layer of a small chat model's language model, beside transformers' own.

Qwen2-0.5B, InternVL3-1B's: C = 896, 14 query heads of 64 on 2 key heads, F = 4864, biases of q, k
and v. A prefill of 1,300 tokens is an image of four tiles, its thumbnail, and a question; a
decoding step has one token behind a cache of as many.

    ours (accelerated)    accelerate(layer), and the cache that transformers makes, which is copied
    ours (KVCache)        the same with ours, which is written in place
    transformers, SDPA    the layer as it is, on PyTorch's attention
    torch.compile         that one, compiled
    eager                 the layer with its plain attention

Speeds are related to transformers' on SDPA.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internvl_engine.acceleration import accelerate
from internvl_engine.generation import KVCache

from .cases import Case, Provider, rival
from .encoder import counted

TOKENS = 1300
SDPA = "transformers, SDPA"
# label: (rows, new tokens, whether the last row is padded)
SHAPES = {
    "prefill": (1, TOKENS, False),
    "padded prefill": (2, TOKENS, True),
    "decode": (1, 1, False),
    "padded decode": (2, 1, True),
}


def qwen2_05b(**changes: Any) -> Any:
    """The configuration, with one layer."""
    from transformers import Qwen2Config

    fields = {
        "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "num_hidden_layers": 1, "vocab_size": 151674,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    return Qwen2Config(**(fields | changes))


def cases(
    device: str, config: Any = None, tokens: int = TOKENS, compiles: bool = True
) -> Iterator[Case]:
    """Every shape in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        layers = Layers(config or qwen2_05b(), dtype, device)
        for label, (rows, new, padded) in SHAPES.items():
            queries = 1 if new == 1 else tokens
            yield layers.case(label, rows, queries, tokens, padded, compiles)


class Past:
    """A cache that holds keys and values and stays as it is: it returns them with new ones behind,
    in a copy, as transformers' DynamicCache does."""

    def __init__(self, held: Tensor) -> None:
        self.held = held  # (2, B, Hk, T, D)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, Hk, S, D) states; returns all of them."""
        keys, values = self.held
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)


class Layers:
    """The same layer in several forms, with equal weights that keep activations at unit scale."""

    def __init__(self, config: Any, dtype: torch.dtype, device: str) -> None:
        from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

        torch.manual_seed(0)
        models = {"sdpa": Qwen2Model(config).to(device, dtype).eval().requires_grad_(False)}
        with torch.no_grad():
            for parameter in models["sdpa"].layers.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.uniform_(0.5, 1.5)
        for name in ("eager", "ours"):
            models[name] = copy.deepcopy(models["sdpa"])
        models["eager"].set_attn_implementation("eager")
        accelerate(models["ours"], strict=True)
        self.models, self.config, self.dtype, self.device = models, config, dtype, device

    def case(
        self, label: str, rows: int, queries: int, tokens: int, padded: bool, compiles: bool
    ) -> Case:
        """All of them on (rows, queries, C), behind `tokens` in the cache where queries is 1."""
        x = torch.randn(rows, queries, self.config.hidden_size, device=self.device).to(self.dtype)
        past = tokens if queries == 1 else 0
        mask = self._mask(rows, queries, past, padded)
        held = self._held(rows, past)
        run = partial(self._run, x=x, mask=mask, past=past)
        cached = partial(run, cache=Past(held)) if past else run
        providers = {
            "ours (accelerated)": Provider(partial(cached, self.models["ours"])),
            "eager": Provider(partial(cached, self.models["eager"])),
            **rival(SDPA, partial(cached, self.models["sdpa"])),
        }
        if past:
            providers["ours (KVCache)"] = Provider(self._in_place(run, held))
        if compiles:
            torch._dynamo.reset()
            compiled = torch.compile(self.models["sdpa"].layers[0], dynamic=False)
            providers |= rival(
                "torch.compile", partial(cached, self.models["sdpa"], layer=compiled)
            )
        with torch.no_grad():
            flops, out = counted(providers["eager"].run)
        weights = sum(p.nbytes for p in self.models["sdpa"].layers[0].parameters())
        name = f"{label}, {tokens} tokens, {str(self.dtype)[6:]}"
        traffic = weights + x.nbytes + out.nbytes + held.nbytes
        return Case("decoder_layer", name, tuple(x.shape), self.dtype, providers, traffic, flops,
                    baseline=SDPA)  # fmt: skip

    def _run(
        self, model: Any, x: Tensor, mask: dict[str, Tensor | None], past: int,
        cache: Any = None, layer: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        layer = model.layers[0] if layer is None else layer
        out = layer(
            x, attention_mask=mask[model.config._attn_implementation], past_key_values=cache,
            position_ids=positions, position_embeddings=self._angles(x, positions),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    def _angles(self, x: Tensor, positions: Tensor) -> Any:
        return self.models["sdpa"].rotary_emb(x, positions)

    def _held(self, rows: int, past: int) -> Tensor:
        heads = self.config.num_key_value_heads
        dim = self.config.hidden_size // self.config.num_attention_heads
        return torch.randn(2, rows, heads, past, dim, device=self.device).to(self.dtype)

    def _in_place(self, run: Callable, held: Tensor) -> Callable[[], Tensor]:
        cache = KVCache(self.config, held.shape[3] + 1)
        cache.layers[0].update(*held)

        def step() -> Tensor:
            cache.layers[0].length = held.shape[3]
            return run(self.models["ours"], cache=cache)

        return step

    def _mask(self, rows: int, queries: int, past: int, padded: bool) -> dict[str, Tensor | None]:
        """As transformers makes them: none for SDPA where nothing is padded, or one query."""
        columns = torch.arange(past + queries, device=self.device)
        seen = columns <= torch.arange(past, past + queries, device=self.device)[:, None]
        seen = seen.expand(rows, 1, -1, -1)
        if padded:
            first = torch.zeros(rows, 1, 1, 1, dtype=torch.int64, device=self.device)
            first[-1] = len(columns) // 4
            seen = (seen & (columns >= first)) | torch.eye(
                queries, len(columns), dtype=torch.bool, device=self.device
            ) & (past == 0)  # padding sees itself: the others give no mean
        lowest = torch.finfo(self.dtype).min
        added = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        return {"sdpa": seen if padded else None, "eager": added.masked_fill(~seen, lowest)}
