"""Checks every provider of a case against "eager", then times them in turns.

A disturbance hits all alike, each in a new order every round; a ratio is the median of the rounds'
ratios. What the machine can do at best is measured in the same run.
"""

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from .cases import Case, Provider, Run


@dataclass(frozen=True)
class Row:
    """The result of one provider: a JSON row. Times in milliseconds.

    share_of_peak: of the copy's bytes or the large product's operations per second, whichever
    `bound` says takes longer for this case; None for a yardstick. speed: the median, over the
    rounds, of the baseline's time over this provider's.
    """

    operator: str
    label: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    bytes: int
    flops: int
    share_of_peak: float | None = None
    bound: str = ""
    baseline: str = "eager"
    speed: float = 1.0
    images: int = 0
    tokens: int = 0
    varies: tuple[str, float] | None = None

    def line(self) -> str:
        """The row of a table."""
        spread = f"(p20 {self.p20_ms:.4f}, p80 {self.p80_ms:.4f})"
        text = f"  {self.provider:24}{self.median_ms:10.4f} ms  {spread:34}{self.speed:6.2f} x"
        if self.share_of_peak is not None:
            rate = (
                f"{self.flops / self.median_ms / 1e9:10.2f} TFLOP/s"
                if self.bound == "product"
                else f"{self.bytes / self.median_ms / 1e6:10.1f} GB/s"
            )
            text += f"{rate:20}{self.share_of_peak:5.0%} of {self.bound} peak"
        for count, unit in ((self.images, "images"), (self.tokens, "tokens")):
            if count:
                text += f"{count / self.median_ms * 1e3:10.2f} {unit}/s"
        return text


@dataclass(frozen=True)
class Effort:
    """How long to time.

    Attributes:
        milliseconds: for each provider, at least.
        rounds: at least.
        processor_time: of one thread, not the clock's: the only figure worth having on a CPU that
            others use. torch must run on one thread then.
    """

    milliseconds: float = 300.0
    rounds: int = 10
    processor_time: bool = False


@dataclass(frozen=True)
class Peaks:
    """What the machine does at best: bytes and operations per second."""

    copy: float
    product: float

    def bound(self, case: Case) -> tuple[str, float]:
        """Which of both takes longer for a case, and how many milliseconds."""
        copy, product = case.bytes / self.copy * 1e3, case.flops / self.product * 1e3
        return ("copy", copy) if copy >= product else ("product", product)

    def __str__(self) -> str:
        return f"copy {self.copy / 1e9:.1f} GB/s, product {self.product / 1e12:.2f} TFLOP/s"


def peaks(device: str, dtype: torch.dtype, effort: Effort) -> Peaks:
    """Times a large copy and a large product."""
    size = 8192 if device == "cuda" else 1536
    source = torch.empty((256 if device == "cuda" else 64) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    runs = {"copy": Provider(lambda: target.copy_(source)), "product": Provider(lambda: a @ b)}
    times = time_in_turns(runs, device, effort)
    copy, product = (min(times[name]) / 1e3 for name in runs)
    return Peaks(2 * source.numel() / copy, 2 * size**3 / product)


def machine(device: str) -> str:
    """What the numbers were measured on: the first line of every table."""
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        for package in ("triton", "flash-attn", "liger-kernel"):
            try:
                name += f", {package} {version(package)}"
            except PackageNotFoundError:
                continue
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"CPU {platform.machine()} {capability}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def failures(case: Case) -> dict[str, str]:
    """The providers that break, or compute something else than eager, and how."""
    expected = [x.double() for x in _listed(case.providers["eager"].run())]
    usual = case.tolerance * torch.finfo(case.dtype).eps
    found = {}
    for name, provider in case.providers.items():
        try:
            with provider.setting():
                results = _listed(provider.run())
            if not provider.same:
                continue
            limit = usual if provider.error is None else provider.error
            for actual, wanted in zip(results, expected, strict=True):
                error = ((actual.double() - wanted).norm() / wanted.norm()).item()
                if not error <= limit:
                    found[name] = f"wrong, {error:.2e} from eager where {limit:.2e} is allowed"
        except Exception as error:  # noqa: BLE001  told beside the rows of the others
            found[name] = f"{type(error).__name__}: {error}"
    return found


def rows(
    case: Case, device: str, peak: Peaks, effort: Effort, broken: Sequence[str] = ()
) -> Iterator[Row]:
    """Times the providers of a case that are not broken; yields a row for each."""
    providers = {name: p for name, p in case.providers.items() if name not in broken}
    bound, best = peak.bound(case)
    times = time_in_turns(providers, device, effort)
    for name, samples in times.items():
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        median = statistics.median(samples)
        base = times.get(case.baseline, samples)
        yield Row(
            case.operator, case.label, tuple(case.shape), str(case.dtype)[6:], device, name,
            median, deciles[1], deciles[7], case.bytes, case.flops,
            best / median if providers[name].same else None, bound, case.baseline,
            statistics.median(theirs / mine for theirs, mine in zip(base, samples, strict=True)),
            case.images, case.tokens, case.varies,
        )  # fmt: skip


def time_in_turns(
    providers: dict[str, Provider], device: str, effort: Effort
) -> dict[str, list[float]]:
    """Milliseconds per call of each provider, one sample of each in every round."""
    samples: dict[str, list[float]] = {name: [] for name in providers}
    now = time.thread_time if effort.processor_time else time.perf_counter
    clock = _gpu_clock() if device == "cuda" else partial(_cpu_clock, now)
    repeats = {}
    for name, provider in providers.items():
        with provider.setting():
            provider.run()
            once = min(clock(provider.run, 1) for _ in range(2))
        repeats[name] = max(1, min(100, round(0.2 / max(once, 1e-4))))  # 0.2 ms, or one call
    order = random.Random(0)
    deadline = time.perf_counter() + effort.milliseconds * len(providers) / 1e3
    while min(map(len, samples.values())) < effort.rounds or time.perf_counter() < deadline:
        # In a new order every round: one that follows another inherits its caches and free memory.
        for name in order.sample(list(providers), len(providers)):
            with providers[name].setting():
                samples[name].append(clock(providers[name].run, repeats[name]))
    return samples


def _cpu_clock(now: Callable[[], float], run: Run, repeats: int) -> float:
    start = now()
    for _ in range(repeats):
        run()
    return (now() - start) / repeats * 1e3


def _gpu_clock() -> Callable[[Run, int], float]:
    """Times by CUDA events, each call with a cold L2 cache."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def clock(run: Run, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    return clock


def _listed(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
