"""InternViT-6B whole, from images to features, against what people run today.

    ours (accelerated)  accelerate(model)
    ours (CUDA graph)   the same, recorded once and replayed; on a GPU
    eager               the readable model, modeling/vision.py
    transformers, SDPA  InternVLVisionModel of the same shape
    torch.compile       that one, compiled; on a GPU with max-autotune, which takes minutes

One set of random weights serves all: 11.8 GB in bfloat16 at full depth, and on a CPU a packed copy.
A batch of 64 is bound by its operations, one image by them or by reading the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVisionConfig
from internvl_engine.modeling.vision import InternVisionModel

from .cases import Case, Provider, rival

DTYPE = torch.bfloat16
IMAGES = {"cuda": (1, 64), "cpu": (1, 4)}
CPU_LAYERS = 2  # of 48: they are all alike
State = dict[str, Tensor]

# Ours, then transformers', applied in this order.
NAMES = (
    ("class_embedding", "cls_token"),
    ("patch_embedding.", "patch_embeddings.projection."),
    ("position_embedding", "position_embeddings"),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls", ".lambda_"),
)


def cases(
    device: str, images: Sequence[int] = (), layers: int | None = None,
    config: InternVisionConfig | None = None, compiles: bool = True,
) -> Iterator[Case]:  # fmt: skip
    """One case for each number of images.

    Args:
        device: "cpu" or "cuda".
        images: batch sizes; IMAGES of the device where empty.
        layers: depth; all on a GPU, CPU_LAYERS on a CPU where None.
        config: of the encoder; InternViT-6B's where None.
        compiles: whether torch.compile is among the rivals.
    """
    config = config or InternVisionConfig()
    config.num_hidden_layers = layers or (
        CPU_LAYERS if device == "cpu" else config.num_hidden_layers
    )
    towers = Towers(config, random_state(config, device))
    for batch in images or IMAGES[device]:
        size = (batch, 3, config.image_size, config.image_size)
        pixels = torch.randn(size, device=device).to(DTYPE)
        label = f"{batch} image{'s' * (batch > 1)} {config.image_size} px, "
        label += f"{config.num_hidden_layers} layers"
        yield towers.case("encoder", label, pixels, compiles)


class Towers:
    """The same vision encoder in several forms that share their weights."""

    def __init__(self, config: InternVisionConfig, state: State) -> None:
        """state: as InternVisionModel names it, on the device and of the dtype to run in."""
        self.eager = loaded(InternVisionModel, config, state)
        self.accelerated = loaded(InternVisionModel, config, state)
        self.theirs = transformers_model(config, state)
        accelerate(self.accelerated, strict=True)

    def case(self, operator: str, label: str, pixels: Tensor, compiles: bool = True) -> Case:
        """All of them on pixels (B, 3, height, width)."""
        mode = "max-autotune" if pixels.is_cuda else None

        def run(model: Callable) -> Callable[[], Tensor]:
            return lambda: model(pixels)[0]

        providers = {
            "ours (accelerated)": Provider(run(self.accelerated)),
            "eager": Provider(run(self.eager)),
            **rival("transformers, SDPA", run(self.theirs)),
        }
        if pixels.is_cuda:
            providers["ours (CUDA graph)"] = Provider(recorded(run(self.accelerated)))
        if compiles:
            torch._dynamo.reset()
            compiled = torch.compile(self.theirs, dynamic=False, mode=mode)
            providers |= rival("torch.compile", run(compiled))
        flops, out = counted(run(self.eager))
        traffic = sum(p.nbytes for p in self.eager.parameters()) + pixels.nbytes + out.nbytes
        shape = tuple(pixels.shape)
        return Case(operator, label, shape, pixels.dtype, providers, traffic, flops, shape[0])


def random_state(config: InternVisionConfig, device: str, dtype: torch.dtype = DTYPE) -> State:
    """Weights that keep activations at unit scale, under the names of InternVisionModel."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in InternVisionModel(config).state_dict().items()}
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        if len(shape) > 1 or name.endswith("bias"):
            weight.normal_(std=max(shape[1:].numel(), 100) ** -0.5)
        else:  # of norms and layer scales
            weight.uniform_(0.5, 1.5)
        state[name] = weight
    return state


@torch.no_grad()
def randomise(model: Any) -> Any:
    """Gives a model weights that keep activations at unit scale, in place; returns it."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=max(parameter[0].numel(), 100) ** -0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    return model


def loaded(kind: type, config: object, state: State) -> Any:
    """A model of this class whose parameters are the tensors of the state, not copies."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def transformers_model(config: InternVisionConfig, state: State) -> Any:
    """transformers' InternVLVisionModel with SDPA and the weights of ours."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    same = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    settings = InternVLVisionConfig(
        **{name: getattr(config, name) for name in same},
        image_size=[config.image_size] * 2,
        patch_size=[config.patch_size] * 2,
        norm_type=config.norm_type,
        layer_norm_eps=config.layer_norm_eps,
        use_qk_norm=config.qk_normalization,
        use_absolute_position_embeddings=True,
        attention_bias=config.qkv_bias,
    )
    settings._attn_implementation = "sdpa"
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        if ".qkv." not in name:
            renamed[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            renamed[name.replace(".qkv.", f".{part}_proj.")] = rows
    return loaded(InternVLVisionModel, settings, renamed)


def recorded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """run() as a CUDA graph, recorded at the first call; its result is overwritten by the next."""

    @cache
    def graph() -> tuple[torch.cuda.CUDAGraph, Tensor]:
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(warm)
        found = torch.cuda.CUDAGraph()
        with torch.cuda.graph(found):
            out = run()
        return found, out

    def replay() -> Tensor:
        found, out = graph()
        found.replay()
        return out

    return replay


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """The floating-point operations of the products in run(), and its result."""
    with FlopCounterMode(display=False) as counter:
        out = run()
    return counter.get_total_flops(), out
