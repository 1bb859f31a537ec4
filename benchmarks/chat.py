"""A whole chat model of InternVL3-1B's shape with random weights, beside transformers' own.

InternViT-300M (24 layers) on 5 tiles of 448 px, and Qwen2-0.5B (24 layers) on their 1,280 tokens
and a question of 20: the time to the first token, and tokens per second behind that.

    ours (accelerated)    VisionLanguageModel and accelerate(model)
    ours (KVCache)        the same with our cache, written in place; in decoding
    eager                 VisionLanguageModel as it is, whose language model is transformers'
    transformers, SDPA    InternVLForConditionalGeneration

Decoding follows given tokens, so that all compute the same; what `generate` does beside is not
timed. Speeds are related to transformers'.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import VisionLanguageConfig
from internvl_engine.generation import KVCache
from internvl_engine.modeling import VisionLanguageModel

from .cases import Case, Provider, rival
from .decoder import SDPA, qwen2_05b
from .encoder import NAMES, counted, randomise
from .layers import TILES, internvit_300m

QUESTION, ANSWER = 20, 16  # tokens
IMAGE = 151667  # the placeholder of InternVL3's tokenizer


def internvl3_1b() -> VisionLanguageConfig:
    """The configuration, its language model's head apart from its embeddings."""
    language = qwen2_05b(num_hidden_layers=24, tie_word_embeddings=False)
    return VisionLanguageConfig(
        internvit_300m(), language, ps_version="v2", force_image_size=448,
        img_context_token_id=IMAGE,
    )  # fmt: skip


def cases(
    device: str, dtype: torch.dtype = torch.bfloat16, config: VisionLanguageConfig | None = None,
    tiles: int = TILES,
) -> Iterator[Case]:  # fmt: skip
    """The time to the first token, and ANSWER tokens behind it."""
    config = config or internvl3_1b()
    eager = randomised(config, dtype, device)
    theirs = transformers_model(config, eager, dtype, device)
    ours = copy.deepcopy(eager)
    accelerate(ours, strict=True)
    side = config.image_size
    pixels = torch.randn(tiles, 3, side, side, device=device).to(dtype)
    few = config.img_context_token_id or 0
    ids = torch.randint(1, few, (1, tiles * config.num_image_token + QUESTION), device=device)
    ids[:, 3 : 3 + tiles * config.num_image_token] = few
    answer = torch.randint(1, few, (1, ANSWER), device=device)
    models = {"ours (accelerated)": ours, "eager": eager, SDPA: theirs}

    def case(
        label: str, runs: dict[str, Callable], shape: tuple[int, ...], read: Any, tokens: int = 0
    ) -> Case:
        providers = {"eager": Provider(runs.pop("eager"))}
        providers |= {name: Provider(run) for name, run in runs.items() if name != SDPA}
        providers |= rival(SDPA, runs[SDPA])
        with torch.no_grad():
            flops, _ = counted(providers["eager"].run)
        traffic = max(tokens, 1) * sum(p.nbytes for p in read.parameters())
        return Case("chat", f"{label}, {str(dtype)[6:]}", shape, dtype, providers, traffic, flops,
                    baseline=SDPA, tokens=tokens)  # fmt: skip

    runs: dict[str, Callable] = {
        name: partial(first_token, model, pixels, ids) for name, model in models.items()
    }
    label = f"first token, {tiles} tile{'s' * (tiles > 1)} and {QUESTION} tokens"
    yield case(label, runs, tuple(ids.shape), eager)
    runs = {name: following(model, pixels, ids, answer) for name, model in models.items()}
    cache = KVCache(config.llm_config, ids.shape[1] + ANSWER)
    runs["ours (KVCache)"] = following(ours, pixels, ids, answer, cache)
    label = f"{ANSWER} tokens behind {ids.shape[1]}"
    yield case(label, runs, tuple(answer.shape), eager.language_model, ANSWER)


def first_token(model: Any, pixels: Tensor, ids: Tensor, cache: Any = None) -> Tensor:
    """Logits (1, 1, V) of the token behind a prompt with images."""
    return model(
        pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids),
        past_key_values=cache, use_cache=cache is not None, logits_to_keep=1,
    ).logits  # fmt: skip


def following(
    model: Any, pixels: Tensor, ids: Tensor, answer: Tensor, cache: Any = None
) -> Callable[[], Tensor]:
    """Logits (1, 1, V) behind an answer whose tokens come one by one; the prompt is read once."""
    from transformers import DynamicCache

    cache, length = DynamicCache() if cache is None else cache, ids.shape[1]
    with torch.no_grad():
        first_token(model, pixels, ids, cache)

    def run() -> Tensor:
        if behind := cache.get_seq_length() - length:
            cache.crop(-behind)
        for index in range(answer.shape[1]):
            logits = model(
                input_ids=answer[:, index : index + 1], past_key_values=cache, use_cache=True,
                attention_mask=ids.new_ones(1, length + index + 1),
                position_ids=ids.new_full((1, 1), length + index),
            ).logits  # fmt: skip
        return logits

    return run


def randomised(config: VisionLanguageConfig, dtype: torch.dtype, device: str) -> Any:
    """Our model with weights that keep activations at unit scale."""
    torch.manual_seed(0)
    model = _built(VisionLanguageModel, config, dtype, device)
    return randomise(model)


def transformers_model(
    config: VisionLanguageConfig, ours: Any, dtype: torch.dtype, device: str
) -> Any:
    """transformers' model of the same, with the very tensors of ours."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    theirs = InternVLConfig.from_dict(config.transformers_dict())
    model = _built(InternVLForConditionalGeneration, theirs, dtype, device)
    state: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        tower, _, rest = name.partition(".")
        if tower == "vision_model":
            _rename_vision(rest, tensor, state)
        elif tower == "mlp1":
            part = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}[rest[0]]
            state[f"model.multi_modal_projector.{part}{rest[1:]}"] = tensor
        else:
            inner = f"model.language_model.{rest.removeprefix('model.')}"
            state[rest if rest.startswith("lm_head") else inner] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False)


def _rename_vision(name: str, tensor: Tensor, into: dict[str, Tensor]) -> None:
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    parts = tensor.chunk(3) if ".qkv." in name else (tensor,)
    for part, rows in zip("qkv", parts, strict=False):
        into["model.vision_tower." + name.replace(".qkv.", f".{part}_proj.")] = rows


def _built(kind: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model made in a dtype: rotary frequencies are float32 in all, as when it is loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return kind(config).to(device).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
