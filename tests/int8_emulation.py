"""What linear_int8 computes where the processor multiplies bytes, in integers and float64.

Run as a script it checks the kernels of the instruction set that INTERNVL_ISA names.
"""

import json
import sys

import torch
from torch import Tensor

from internvl_engine import kernels
from internvl_engine.kernels import _library

OUTLIERS, MEANS = 64, 8.0  # of a row, and above how many mean magnitudes they are


def rounds_rows() -> bool:
    """Whether the kernels in use round x; the others widen the weight."""
    native = _library.native
    return native is not None and native.instruction_set() in (
        "avx512bf16",
        "avx512vnni",
        "avxvnni",
    )


def limit_of(row: Tensor) -> float:
    """The magnitude above which a value of a row (C,) is an outlier."""
    kept = row.double().abs()
    limit = MEANS * kept.mean().item()
    if kept.max() <= limit:
        return float("inf")
    while True:  # without them the mean is smaller
        rest = kept[kept <= limit]
        smaller = MEANS * rest.mean().item()
        if len(kept[kept <= smaller]) == len(rest):
            break
        limit = smaller
    while len(row) - len(kept[kept <= smaller]) > OUTLIERS:
        smaller *= 2
    return smaller


def product(x: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, C) by the weight: (M, F) in float64, and how far float32 may be from it."""
    weight = kernels.dequantize_int8(packed, scales, x.shape[-1], torch.float64)
    q = (weight / scales.clamp_min(1e-30).double()[:, None]).round()
    outliers = torch.stack([row.double().abs() > limit_of(row) for row in x])
    taken, kept = x.double() * outliers, x.double() * ~outliers
    largest = kept.abs().amax(1).float().clamp_min(1e-30)
    row_scales, inverse = largest / 127, torch.full_like(largest, 127) / largest
    rounded = (kept * inverse[:, None].double()).round()
    within = (rounded @ q.t()) * row_scales[:, None].double()
    beside = taken @ q.t()
    # Each of the sum, the products by both scales and the additions rounds by half a unit.
    roundings = (outliers.sum(1, keepdim=True) + 4) * 2.0**-24
    spread = within.abs() + taken.abs() @ q.abs().t()
    return (within + beside) * scales.double(), spread * roundings * scales.double()


def wide(x: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The same where x is not rounded: the product, and the bound of float32 sums of C terms."""
    weight = kernels.dequantize_int8(packed, scales, x.shape[-1], torch.float64)
    bound = x.double().abs() @ weight.abs().t() * (x.shape[-1] + 4) * 2.0**-24
    return x.double() @ weight.t(), bound


def expected(x: Tensor, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels in use compute, and how far from it they may be."""
    return (product if rounds_rows() else wide)(x, packed, scales)


def example(rows: int, columns: int, outliers: int = 0) -> Tensor:
    """Rows with this many channels of 1,000 times the size of the others."""
    x = torch.randn(rows, columns)
    x[:, torch.randperm(columns)[:outliers]] *= 1000
    return x


def largest_excess() -> float:
    """The largest error over what is allowed, over rows, columns and features of every kind."""
    torch.manual_seed(0)
    worst = 0.0
    for features, columns in ((96, 64), (33, 42), (1, 1), (70, 3203)):
        form = kernels.quantize_int8(torch.randn(features, columns))
        for rows, outliers in ((1, 0), (2, 3), (3, 1), (5, 0), (20, 5)):
            x = example(rows, columns, min(outliers, columns // 8))
            wanted, allowed = expected(x, *form[:2])
            error = (kernels.linear_int8(x, *form).double() - wanted).abs()
            worst = max(worst, (error / allowed.clamp_min(1e-30)).max().item())
    return worst


def rows_depend_on_each_other() -> bool:
    """Whether a row has other bits alone, or with one or two more, than among many."""
    x, form = example(20, 3203, 5), kernels.quantize_int8(torch.randn(70, 3203))
    whole = kernels.linear_int8(x, *form)
    parts = [kernels.linear_int8(x[:rows], *form) for rows in (1, 2, 3, 4, 19)]
    return not all(torch.equal(part, whole[: len(part)]) for part in parts)


if __name__ == "__main__":
    from internvl_engine import _native

    try:
        found = [_native.instruction_set(), largest_excess(), rows_depend_on_each_other()]
    except ValueError:  # this processor has no such set
        found = []
    sys.stdout.write(json.dumps(found))
