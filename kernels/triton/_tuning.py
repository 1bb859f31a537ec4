"""Launch configurations: the defaults a kernel ships with, and what the autotuner measured here.

A configuration is a dictionary of the kernel's tunable tl.constexpr values with num_warps and
num_stages. A kernel's file holds DEFAULTS, one configuration per architecture, and CANDIDATES.
Tuning is off unless INTERNVL_AUTOTUNE=1 or inside `tuning()`: then the first call with a new key
times the default and the candidates and writes the winner to disk, and no process with this GPU and
these versions tunes that key again. Without a stored winner the defaults serve.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._invariance import is_batch_invariant
from ._sizes import power_of_2

if TYPE_CHECKING:  # the file is imported by launchers only, but typing alone must not need triton
    from triton.backends.compiler import GPUTarget

Config = dict[str, int]
Run = Callable[[Config], object]

ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
# What every kernel is compiled with. Fused multiply-adds: the default changes in Triton 3.10.
OPTIONS = {"enable_fp_fusion": True}
_resolved: dict[tuple, Config] = {}
_tuning_is_on = os.environ.get("INTERNVL_AUTOTUNE") == "1"


def target(architecture: str) -> "GPUTarget":
    """The compilation target of one of ARCHITECTURES."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm")), 32)


@cache
def architecture(device: int = 0) -> str:
    """Whose defaults a device takes; those of Hopper where kernels are interpreted.

    Consumer Blackwell (12.x) has neither tcgen05 nor Hopper's shared memory: it takes Ampere's.
    """
    if torch.version.hip:
        return "gfx942"
    if not torch.cuda.is_available():
        return "sm90"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def launch_config(
    operator: str,
    key: tuple,
    defaults: dict[str, Config],
    candidates: Sequence[Config] = (),
    run: Run | None = None,
    device: int | None = 0,
) -> Config:
    """The configuration to launch with.

    Args:
        operator: the kernel's name, as it is stored.
        key: what the best choice depends on: widths, dtype, mode, and `size_class` of how much
            there is to do, so that the winner at 257 rows does not decide for 16,448.
        defaults: by architecture.
        candidates, run: what to time beside the default, `run(config)` launching the kernel, when
            tuning is on.
        device: index of the CUDA device; None or negative for tensors on the CPU.
    """
    if device is None or device < 0:
        return defaults["sm90"]
    known = _resolved.get((operator, key, device))
    if known is not None:
        return known
    default = defaults[architecture(device)]
    choices = [default, *(config for config in candidates if config != default)]
    config = _stored(device).get(f"{operator}{key}")
    if config not in choices:  # or stored by a version of this kernel that had other parameters
        config = default
        if _tuning_is_on and run is not None and candidates:
            if _capturing():  # where nothing can be timed; a later call may
                return default | OPTIONS
            config = tune(operator, key, choices, run, device)
    _resolved[operator, key, device] = config | OPTIONS
    return _resolved[operator, key, device]


def size_class(count: int) -> int:
    """A number of rows, or of heads, rounded up to a power of two, up to 32,768: a tuner's key.

    One for all with `batch_invariant`, where a configuration may not depend on the batch.
    """
    return 0 if is_batch_invariant() else min(power_of_2(count), 32768)


def _capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def tune(
    operator: str, key: tuple, candidates: Sequence[Config], run: Run, device: int = 0,
    milliseconds: Callable[[Callable[[], object]], float] | None = None,
) -> Config:  # fmt: skip
    """Times every candidate that fits the chip, stores and returns the fastest."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if milliseconds is None:
        from triton.testing import do_bench

        milliseconds = do_bench
    times: list[tuple[float, int]] = []
    for index, config in enumerate(candidates):
        try:
            times.append((milliseconds(partial(run, config | OPTIONS)), index))
        except (OutOfResources, CompilationError, PTXASError):
            continue  # too large for this chip
        except RuntimeError as error:
            if "PassManager::run failed" not in str(error):  # of the GPU: not this configuration's
                raise
    if not times:
        raise ValueError(f"{operator}: none of {len(candidates)} configurations runs on this GPU")
    best = candidates[min(times)[1]]
    _store(device, f"{operator}{key}", best)
    return best


@contextmanager
def tuning() -> Iterator[None]:
    """Inside, launches with keys that were never tuned on this GPU tune first."""
    global _tuning_is_on
    before, _tuning_is_on = _tuning_is_on, True
    _resolved.clear()  # defaults that were resolved before may now be tuned
    try:
        yield
    finally:
        _tuning_is_on = before


def _path(device: int) -> Path:
    import triton

    folder = os.environ.get("INTERNVL_CACHE") or Path.home() / ".cache" / "internvl_engine"
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return Path(folder) / f"tuning {name} triton {triton.__version__}.json".replace(" ", "_")


@cache
def _stored(device: int) -> dict[str, Config]:
    path = _path(device)
    return json.loads(path.read_text()) if path.exists() else {}


def _store(device: int, key: str, config: Config) -> None:
    """Adds one result. What another process stored meanwhile is kept; a reader never sees half."""
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[key] = _stored(device)[key] = dict(config)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known, indent=1, sort_keys=True))
    partial.replace(path)
