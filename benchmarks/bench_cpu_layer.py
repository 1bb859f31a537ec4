"""One InternViT-6B layer at real width on the CPU, against its four products through F.linear.

    python -m internvl_engine.benchmarks.bench_cpu_layer [--images 4] [--rounds 9] [--threads N]

C = 3200, 25 heads of 128, F = 12800, 257 tokens an image, bfloat16. All variants hold the same
weights and are timed in turns in one process; a ratio is the median of the ratios of each turn, so
that what else the machine does hits both sides. With --cpu-time it is the processor time of one
thread instead: the only figure worth having on a machine that is busy.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import PackedWeight, add_rms_norm, linear_packed, rms_norm

from .harness import machine

C, HEADS, MLP, TOKENS, EPS = 3200, 25, 12800, 257, 1e-6
SHAPES = {"qkv": (3 * C, C), "proj": (C, C), "fc1": (MLP, C), "fc2": (C, MLP)}
BIASES = ("proj", "fc1", "fc2")
VECTORS = ("norm1", "norm2", "q_norm", "k_norm", "ls1", "ls2")


class Layer:
    """The weights of one layer, dense and packed, and the ways to run it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dense = {name: _random(shape, dtype) for name, shape in SHAPES.items()}
        self.packed = {name: PackedWeight(weight) for name, weight in self.dense.items()}
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.onednn = {name: reorder(weight) for name, weight in self.dense.items()}
        self.bias = {name: _random(SHAPES[name][:1], dtype) for name in BIASES}
        self.vector = {name: torch.rand(C).to(dtype) + 0.5 for name in VECTORS}

    def products(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """The four products alone, through F.linear."""
        inputs = {"qkv": x, "proj": x, "fc1": x, "fc2": hidden}
        return tuple(
            F.linear(inputs[name], weight, self.bias.get(name))
            for name, weight in self.dense.items()
        )

    def products_packed(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """The four products alone, with packed weights."""
        inputs = {"qkv": x, "proj": x, "fc1": x, "fc2": hidden}
        return tuple(
            linear_packed(inputs[name], weight, self.bias.get(name))
            for name, weight in self.packed.items()
        )

    def products_onednn(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """The four products alone, with oneDNN's own packing, as Inductor's freezing has them."""
        inputs = {"qkv": x, "proj": x, "fc1": x, "fc2": hidden}
        return tuple(
            torch.ops.mkldnn._linear_pointwise(
                inputs[name], weight, self.bias.get(name), "none", [], ""
            )
            for name, weight in self.onednn.items()
        )

    def ours(self, x: Tensor) -> Tensor:
        """The layer from fused operators and packed weights."""
        qkv = linear_packed(rms_norm(x, self.vector["norm1"], EPS), self.packed["qkv"])
        q, k, v = qkv.unflatten(-1, (3, C)).unbind(-2)
        q = rms_norm(q, self.vector["q_norm"], EPS)
        k = rms_norm(k, self.vector["k_norm"], EPS)
        attended = linear_packed(_matmuls(q, k, v), self.packed["proj"], self.bias["proj"])
        normed, x = add_rms_norm(attended, x, self.vector["ls1"], self.vector["norm2"], EPS)
        hidden = linear_packed(normed, self.packed["fc1"], self.bias["fc1"], "gelu")
        out = linear_packed(hidden, self.packed["fc2"], self.bias["fc2"])
        return torch.addcmul(x, out, self.vector["ls2"])

    def eager(self, x: Tensor, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """The layer as the published model computes it, or with another attention."""
        dense, bias, vector = self.dense, self.bias, self.vector
        qkv = F.linear(reference.rms_norm(x, vector["norm1"], EPS), dense["qkv"])
        q, k, v = qkv.unflatten(-1, (3, C)).unbind(-2)
        if attend is None:
            packed = qkv.unflatten(-1, (3, HEADS, C // HEADS))
            attended = reference.qk_norm_attention(
                packed, vector["q_norm"], vector["k_norm"], EPS
            ).flatten(-2)
        else:
            q = reference.rms_norm(q, vector["q_norm"], EPS)
            attended = attend(q, reference.rms_norm(k, vector["k_norm"], EPS), v)
        x = x + F.linear(attended, dense["proj"], bias["proj"]) * vector["ls1"]
        normed = reference.rms_norm(x, vector["norm2"], EPS)
        hidden = F.gelu(F.linear(normed, dense["fc1"], bias["fc1"]))
        return x + F.linear(hidden, dense["fc2"], bias["fc2"]) * vector["ls2"]


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)


def _matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as three operators of PyTorch: on this CPU in bfloat16 faster than its SDPA."""
    q, k, v = (t.unflatten(-1, (HEADS, C // HEADS)).transpose(1, 2) for t in (q, k, v))
    scores = (q * (C // HEADS) ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, C // HEADS)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def variants(layer: Layer, images: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the first is the measure of the others."""
    x = torch.randn(images, TOKENS, C).to(dtype)
    hidden = torch.rand(images, TOKENS, MLP).to(dtype)
    compiled = torch.compile(lambda x: layer.eager(x, _sdpa), dynamic=False)
    runs: dict[str, Callable[[], object]] = {
        "four products, F.linear": lambda: layer.products(x, hidden),
        "four products, packed": lambda: layer.products_packed(x, hidden),
        "four products, oneDNN": lambda: layer.products_onednn(x, hidden),
        "layer, ours": lambda: layer.ours(x),
        "layer, eager": lambda: layer.eager(x),
        "layer, SDPA": lambda: layer.eager(x, _sdpa),
        "layer, torch.compile": lambda: compiled(x),
    }
    eager = layer.eager(x).double()
    for name in ("layer, ours", "layer, SDPA", "layer, torch.compile"):
        result = runs[name]()
        assert isinstance(result, Tensor)
        error = (result.double() - eager).norm() / eager.norm()
        assert error < 8 * torch.finfo(dtype).eps, f"{name}: {error:.2e} from eager"
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="One InternViT-6B layer on the CPU.")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    torch.manual_seed(0)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    dtype = getattr(torch, arguments.dtype)
    with torch.inference_mode():
        runs = variants(Layer(dtype), arguments.images, dtype)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = clock()
                run()
                samples[name].append((clock() - start) * 1e3)
    print(machine("cpu"), "processor time" if arguments.cpu_time else "wall clock")
    base = next(iter(samples.values()))
    for name, times in samples.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        print(
            f"{name:26}{statistics.median(times):9.1f} ms  min {min(times):9.1f}  ratio {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
