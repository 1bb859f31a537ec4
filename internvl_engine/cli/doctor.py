"""`internvl doctor`: what this machine is, what it will run, why, and what would make it better.

It imports torch and the kernels, and nothing that may be broken itself: see trial.py for the rest.
"""

import os
import platform
from collections.abc import Iterator
from importlib import import_module, metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory import memory
from ..printable import printable
from .trial import PATIENCE, Trials

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
    "matplotlib": "plots of benchmarks (extra: bench)",
    "pillow-heif": "HEIC photos",
}
# What loading a model imports where it is there, and what else may fail with it.
TRIED = ("transformers", "torchvision", "flash_attn", "peft", "accelerate", "triton")
LIMITS = ("INTERNVL_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # of instruction sets


def examine(patience: float | None = PATIENCE) -> dict[str, Any]:
    """Everything that `internvl doctor --json` prints; `problems` have `what` and `do`.

    Args:
        patience: seconds to wait for packages that take long to import; None waits for all.
    """
    import torch

    from .. import __version__
    from ..checkpoint import choose_dtype

    trials = Trials(TRIED)  # each in a copy of this process, which has torch
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    chosen = {str(device): choose_dtype("auto", device) for device in devices}
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
            "limits": {name: os.environ[name] for name in LIMITS if os.environ.get(name)},
        },
        "memory_gb": {name: round(size / 1e9, 1) for name, size in memory().items()},
        "native": _native("_native"),
        "native_cuda": _native("_native_cuda"),
        "gpus": [_gpu(device) for device in devices[1:]],
        "dtype_auto": {name: _name(choice.dtype) for name, choice in chosen.items()},
        "dtype_reasons": {name: choice.reason for name, choice in chosen.items()},
        "operators": _operators(),
    }
    found["internvl_14b"], found["advice"] = _needs_of_14b(found)
    found["broken"] = trials.errors(patience)
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
        "dtype": _name(engine.dtype),
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


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


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
        describe = getattr(module, "instruction_set", None)
        running = describe() if describe else None
    except Exception as error:  # noqa: BLE001  whatever it is, the page says it
        return {"built": True, "instruction_set": None, "error": printable(error, 300)}
    return {"built": True, "instruction_set": running, "error": None}


def _operators() -> dict[str, Any]:
    try:
        from .. import kernels

        return kernels.implementations()
    except Exception as error:  # noqa: BLE001  whatever it is, the page says it
        return {"error": f"{type(error).__name__}: {printable(error, 300)}"}


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


def _needs_of_14b(found: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    """The memory that InternVL-14B takes here by parts, device and dtype, and what to load."""
    from ..checkpoint.fitting import advice, fitting

    free = {"cpu": found["memory_gb"]["available"]}
    free |= {f"cuda:{n}": gpu["free_gb"] for n, gpu in enumerate(found["gpus"])}
    rows, instead = [], {}
    for device, gigabytes in free.items():
        available, auto = int(gigabytes * 1e9), found["dtype_auto"][device]
        rows += [
            {
                "parts": fit.parts, "parameters": fit.parameters, "device": device,
                "dtype": fit.dtype, "weights_gb": round(fit.nbytes / 1e9, 1), "fits": fit.fits,
            }
            for fit in fitting(available)
        ]  # fmt: skip
        instead[device] = advice(available, "all", auto)
    return rows, instead


def _problems(found: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What is worse than it need be, and what to do about it."""
    import torch

    for name, version in found["packages"].items():
        if version is None:
            yield {"what": f"{name} is not installed", "do": f"pip install {name}"}
    for module, error in found["broken"].items():
        yield {
            "what": f"{module} is installed and does not import: {printable(error, 300)}",
            "do": f"install the version of {module} that fits torch {torch.__version__}, or "
            f"pip uninstall {module.replace('_', '-')}",
        }
    if "error" in found["operators"]:
        yield {
            "what": f"the kernels do not import: {found['operators']['error']}",
            "do": "reinstall internvl-engine, and the package that the message names",
        }
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
