"""One layer of each tower at real width on the CPU, against what people run today.

    python -m internvl_engine.benchmarks.cpu_layer [--layer vision|qllama] [--rounds 9]

    vision   InternViT-6B: C = 3200, 25 heads of 128, F = 12800, --images x 257 tokens
    qllama   QLLaMA-8B with cross-attention: C = 4096, 96 queries that read 257 x 3200

bfloat16 but where a variant says otherwise. All variants are timed in turns, in shuffled order, in
one process; a ratio is the median of the ratios of each turn, so that what else the machine does
hits both sides. With --cpu-time it is the processor time of one thread instead: the only figure
worth having on a machine that is busy.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVisionConfig
from internvl_engine.kernels import PackedWeight, linear_packed
from internvl_engine.modeling.masks import AttentionMask
from internvl_engine.modeling.qllama import LlamaDecoderLayer, LlamaRotaryEmbedding
from internvl_engine.modeling.vision import InternVisionEncoderLayer

from .harness import machine

TOKENS, QUERIES, DTYPE = 257, 96, torch.bfloat16
Runs = dict[str, Callable[[], Tensor]]


def accelerated(layer: nn.Module) -> nn.Module:
    """A copy of the layer as `accelerate` makes it."""
    around = nn.Sequential(copy.deepcopy(layer))
    accelerate(around, strict=True)
    return around[0]


def vision(images: int) -> Runs:
    """A layer of InternViT-6B; the first variant is its four products through F.linear."""
    config = InternVisionConfig()
    wide = spread(InternVisionEncoderLayer(config)).eval()
    layer = copy.deepcopy(wide).to(DTYPE)
    fused = accelerated(layer)
    theirs = transformers_layer(config, layer)
    compiled = torch.compile(theirs, dynamic=False)
    x = torch.randn(images, TOKENS, config.hidden_size).to(DTYPE)
    wide_x = x.float()
    inputs = {"qkv": x, "proj": x, "fc1": x}
    inputs["fc2"] = torch.rand(images, TOKENS, config.intermediate_size).to(DTYPE)
    linears = {
        name: linear for name, linear in layer.named_modules() if isinstance(linear, nn.Linear)
    }
    linears = {name.rpartition(".")[2]: linear for name, linear in linears.items()}
    packed = {name: PackedWeight(linear.weight.detach()) for name, linear in linears.items()}

    def products() -> Tensor:
        for name, linear in linears.items():
            y = F.linear(inputs[name], linear.weight, linear.bias)
        return y

    def packed_products() -> Tensor:
        for name, linear in linears.items():
            y = linear_packed(inputs[name], packed[name], linear.bias)
        return y

    return {
        "four products, F.linear": products,
        "four products, packed": packed_products,
        "layer, accelerated": lambda: fused(x),
        "layer, eager": lambda: layer(x),
        "layer, transformers SDPA": lambda: theirs(x),
        "layer, torch.compile": lambda: compiled(x),
        "layer, eager fp32": lambda: wide(wide_x),
    }


def transformers_layer(config: InternVisionConfig, ours: nn.Module) -> nn.Module:
    """transformers' InternVLVisionLayer with SDPA and the weights of ours."""
    from transformers import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionLayer

    settings = InternVLVisionConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        norm_type="rms_norm",
        use_qk_norm=True,
        attention_bias=False,
    )
    settings._attn_implementation = "sdpa"
    theirs = InternVLVisionLayer(settings).to(DTYPE).eval()
    state = ours.state_dict()
    qkv = dict(zip("qkv", state.pop("attn.qkv.weight").chunk(3), strict=True))
    names = {"attn.proj": "attention.projection_layer", "attn.": "attention.", "ls": "lambda_"}
    names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}

    def renamed(name: str) -> str:
        if not name.startswith(("norm", "ls", "attn")):
            return name
        start = next(prefix for prefix in names if name.startswith(prefix))
        return names[start] + name.removeprefix(start)

    mapped = {renamed(name): tensor for name, tensor in state.items()}
    mapped |= {f"attention.{name}_proj.weight": tensor for name, tensor in qkv.items()}
    theirs.load_state_dict(mapped, strict=True)
    return theirs


def qllama(images: int) -> Runs:
    """A layer of QLLaMA with cross-attention on its queries, as for image features."""
    config = LlamaConfig(num_query_token=QUERIES, vision_hidden_size=3200)
    layer = spread(LlamaDecoderLayer(config, 0)).to(DTYPE).eval()
    fused = accelerated(layer)
    hidden = torch.randn(images, QUERIES, config.hidden_size).to(DTYPE)
    image = torch.randn(images, TOKENS, 3200).to(DTYPE)
    mask = AttentionMask("full", QUERIES, QUERIES)
    positions, tables = LlamaRotaryEmbedding(128).at(None, 0, hidden)
    arguments = (hidden, mask, positions, None, False, image, 1, tables)
    return {
        "layer, eager": lambda: layer(*arguments)[0],
        "layer, accelerated": lambda: fused(*arguments)[0],
    }


def spread(layer: nn.Module) -> nn.Module:
    """Weights that keep activations at unit scale."""
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def check(runs: Runs) -> None:
    """Every layer computes the same, to the rounding of bfloat16."""
    eager = runs["layer, eager"]().double()
    for name, run in runs.items():
        if name.startswith("layer"):
            error = ((run().double() - eager).norm() / eager.norm()).item()
            assert error < 8 * torch.finfo(DTYPE).eps, f"{name}: {error:.2e} from eager"


def main() -> None:
    parser = argparse.ArgumentParser(description="One layer of each tower on the CPU.")
    parser.add_argument("--layer", choices=("vision", "qllama"), default="vision")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    print(machine("cpu"), f"{options.images} images, {options.rounds} rounds", sep=", ")
    with torch.inference_mode():
        torch.manual_seed(0)
        runs = {"vision": vision, "qllama": qllama}[options.layer](options.images)
        check(runs)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name in random.sample(list(runs), len(runs)):
                start = clock()
                runs[name]()
                times[name].append((clock() - start) * 1e3)
    first = next(iter(runs))
    for name, samples in times.items():
        ratios = [ours / theirs for ours, theirs in zip(samples, times[first], strict=True)]
        print(
            f"{name:28}{statistics.median(samples):9.1f} ms  (min {min(samples):.1f})"
            f"{statistics.median(ratios):9.3f} x {first}"
        )


if __name__ == "__main__":
    main()
