"""`internvl doctor`: what this machine is, what it will run, why, and what would make it better."""

import os
import platform
from collections.abc import Iterator
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory import memory

if TYPE_CHECKING:
    from ..embedding import Embedder

NEEDED = (
    "torch", "transformers", "safetensors", "sentencepiece", "pillow", "numpy", "huggingface-hub",
    "tqdm", "typer",
)  # fmt: skip
OPTIONAL = {  # package: what for
    "triton": "GPU kernels",
    "flash-attn": "attention on NVIDIA GPUs (extra: flash)",
    "peft": "LoRA (extra: train)",
    "accelerate": "training on several devices (extra: train)",
    "torchao": "quantised weights (extra: quant)",
    "faiss-cpu": "approximate search (extra: index)",
    "fastapi": "serving (extra: serve)",
    "pyarrow": "data sets in Parquet (extra: data)",
    "ray": "embedding on a cluster (extra: ray)",
    "gradio": "a page to try the model (extra: demo)",
    "matplotlib": "plots of benchmarks (extra: bench)",
}
BYTES = {"float32": 4, "bfloat16": 2}
ACTIVATIONS = 1.1  # of the weights, roughly, for a small batch


def examine() -> dict[str, Any]:
    """Everything that `internvl doctor --json` prints; `problems` have `what` and `do`."""
    import torch

    from .. import __version__
    from ..checkpoint import computes_in_bfloat16, resolve_dtype

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "internvl_engine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in NEEDED},
        "optional": {name: _version(name) for name in OPTIONAL},
        "cpu": {
            "name": processor_name(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_gb": {name: round(size / 1e9, 1) for name, size in memory().items()},
        "native": _native("_native"),
        "native_cuda": _native("_native_cuda"),
        "gpus": [_gpu(device) for device in devices[1:]],
        "dtype_auto": {
            str(device): str(resolve_dtype("auto", device)).removeprefix("torch.")
            for device in devices
        },
        "bfloat16_in_hardware": {str(d): bool(computes_in_bfloat16(d)) for d in devices},
        "operators": _operators(),
    }
    found["internvl_14b"] = _needs_of_14b(found)
    found["problems"] = list(_problems(found))
    return found


def machine(engine: "Embedder") -> dict[str, Any]:
    """What an engine runs on, for the head of results."""
    import torch

    kind = engine.device.type
    threads = torch.get_num_threads()
    cpu = f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"
    return {
        "device": torch.cuda.get_device_name(engine.device) if kind == "cuda" else cpu,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "native": _native("_native")["instruction_set"],
    }


def processor_name() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native(name: str) -> dict[str, Any]:
    """Whether a module of csrc/ is there, and what it says of itself."""
    if util.find_spec(f"internvl_engine.{name}") is None:
        return {"built": False, "instruction_set": None, "error": None}
    try:
        module = import_module(f"internvl_engine.{name}")
    except ImportError as error:
        return {"built": True, "instruction_set": None, "error": str(error)}
    describe = getattr(module, "instruction_set", None)
    return {"built": True, "instruction_set": describe() if describe else None, "error": None}


def _operators() -> dict[str, dict[str, str]]:
    from .. import kernels

    return kernels.implementations()


def _gpu(device: Any) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "free_gb": round(free / 1e9, 1),
    }


def _needs_of_14b(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The memory that InternVL-14B takes here, by parts, in the dtype of each device."""
    import torch

    from ..checkpoint import PARTS, needs
    from ..configuration import InternVLConfig
    from ..modeling.internvl import InternVLModel

    with torch.device("meta"):
        model = InternVLModel(InternVLConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    free = {"cpu": found["memory_gb"]["available"]}
    free |= {f"cuda:{n}": gpu["free_gb"] for n, gpu in enumerate(found["gpus"])}
    rows = []
    for parts in PARTS:
        needed = needs(parts)
        count = sum(size for name, size in sizes.items() if needed(name))
        for device, dtype in found["dtype_auto"].items():
            weights = count * BYTES[dtype] / 1e9
            rows.append({
                "parts": parts, "parameters": count, "device": device, "dtype": dtype,
                "weights_gb": round(weights, 1), "fits": weights * ACTIVATIONS < free[device],
            })  # fmt: skip
    return rows


def _problems(found: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What is worse than it need be, and what to do about it."""
    import torch

    for name, version in found["packages"].items():
        if version is None:
            yield {"what": f"{name} is not installed", "do": f"pip install {name}"}
    if not found["native"]["built"]:
        yield {
            "what": "the native CPU kernels were not built: plain PyTorch serves the CPU",
            "do": "install a C++ compiler (Debian: apt install g++), then reinstall with "
            "INTERNVL_NATIVE=1, which shows why a build fails",
        }
    for module in ("native", "native_cuda"):
        if found[module]["error"]:
            yield {
                "what": f"_{module} was built but does not load: {found[module]['error']}",
                "do": "reinstall internvl-engine on this machine",
            }
    if found["gpus"] and found["optional"]["triton"] is None:
        yield {
            "what": "there is a GPU but no triton: PyTorch serves it",
            "do": "pip install triton, of the version that torch names",
        }
    if Path("/dev/nvidiactl").exists() and not torch.cuda.is_available():
        yield {
            "what": f"there is an NVIDIA GPU that torch {torch.__version__} cannot use",
            "do": "install a CUDA build of torch that the driver supports",
        }
    if found["cpu"]["threads"] < found["cpu"]["cores"] and "OMP_NUM_THREADS" in os.environ:
        yield {
            "what": f"{found['cpu']['threads']} of {found['cpu']['cores']} cores are used",
            "do": "unset OMP_NUM_THREADS",
        }
