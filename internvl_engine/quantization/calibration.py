"""What the linears of a model are given while it runs on a few examples.

Rounding to 4 bits loses less where it knows which columns count, and together
(kernels/_rounding.py). A few hundred rows of a layer's input say that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 512  # of each linear's input that are kept; 4096 columns in bfloat16 are 4 MB
Run = Callable[[Any], Any]


def record_inputs(
    model: nn.Module, linears: Sequence[nn.Module], calibration: Run | Tensor, rows: int = ROWS
) -> dict[int, Tensor]:
    """Runs a model and keeps some rows of what linears were given, spread evenly over all.

    Args:
        model: whose linears these are.
        linears: nn.Linear modules; one that is not called is left out.
        calibration: a function that runs the model it is given, or pixel_values (B, 3, height,
            width) for its `get_image_features` or `extract_feature`.
        rows: at most, of each.

    Returns:
        id of the module to (rows, C).

    Raises:
        TypeError: the calibration is neither, or the model has no method for images.
    """
    run = _of_images(model, calibration) if isinstance(calibration, Tensor) else calibration
    if not callable(run):
        raise TypeError(
            f"calibration must be a function of the model or pixel_values, got {type(run).__name__}"
        )
    kept: dict[int, list[Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen = args[0].detach().flatten(0, -2)
        kept.setdefault(id(module), []).append(_some(seen, rows))

    handles = [module.register_forward_pre_hook(keep) for module in linears]
    training = model.training
    try:
        with torch.no_grad():
            run(model.eval())
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {key: _some(torch.cat(seen), rows) for key, seen in kept.items()}


def _some(x: Tensor, rows: int) -> Tensor:
    """At most so many rows of (N, C), in memory of their own."""
    if len(x) <= rows:
        return x.clone()
    return x[torch.linspace(0, len(x) - 1, rows, dtype=torch.float64, device=x.device).long()]


def _of_images(model: Any, pixels: Tensor) -> Run:
    names = ("get_image_features", "extract_feature", "encode_image")
    name = next((each for each in names if hasattr(model, each)), None)
    if name is None:
        raise TypeError(
            f"calibration: {type(model).__name__} has none of {', '.join(names)}; give a function "
            "that runs it"
        )
    return lambda model: getattr(model, name)(pixels)
