"""cross_attention in Triton. What it computes: kernels/cross_attention.py.

The kernels are those of attention, whose rows may be packed: all r * S queries of one image are one
block of rows, so K and V are read once for them and nothing is copied. Where that gives few
programs (batch 1: 32 heads of 96 queries), the keys are split and a second kernel combines.
"""

from collections.abc import Iterator

from torch import Tensor

from ._attention_combine import (
    combine,
    combine_config,
    combine_kernel,
    partial_outputs,
    split_keys,
)
from ._attention_core import length_class, lse_dtype, supported, width_class
from ._cross_compile import Case
from ._tuning import Config, launch_config
from .attention import (
    CANDIDATES,
    FORWARD,
    compile_case,
    compile_values,
    forward_kernel,
    head_constants,
    packed_backward,
    readable,
    row_tiles,
)


def _steps(images: int, repeat: int, interleave: bool) -> tuple[int, int]:
    """Row i of the packed queries is batch image_step * image + repeat_step * (i // S)."""
    return (repeat, 1) if interleave else (1, images)


def cross_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, interleave: bool, scale: float, saves: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (out (r * B, H, S, D), lse (r * B, H, S) or nothing)."""
    batch, H, S, D = q.shape
    B, _, T, _ = k.shape
    if not supported(q.dtype, D):
        return NotImplemented
    out = q.new_empty((batch, S, H, D)).transpose(1, 2)
    lse = q.new_empty((batch, H, S) if saves else 0, dtype=lse_dtype(q.dtype))
    if out.numel() == 0 or T == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = readable(q), readable(k), readable(v)
    config = config or launch_config(
        "cross_attention", (width_class(D, q.dtype), length_class(T)),
        FORWARD[width_class(D, q.dtype)], CANDIDATES,
        lambda c: cross_attention_triton(q, k, v, interleave, scale, saves, c), q.get_device(),
    )  # fmt: skip
    M = batch // B * S
    tiles, rest = row_tiles(config, "BLOCK_M", M)
    parts, keys_per_part = split_keys(T, config["BLOCK_N"], H, tiles * H * B, q.device)
    saved = lse if saves else None
    to, to_lse = (out, saved) if parts == 1 else partial_outputs(out, parts)
    forward_kernel[(tiles * H * B, parts)](
        q, k, v, None, to, to_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *_steps(B, batch // B, interleave), H, S, M, T, 0, scale, batch * H * S, tiles,
        keys_per_part, **head_constants(D, "full", None), **rest, **config,
    )  # fmt: skip
    if parts > 1:
        combine(to, to_lse, out, saved)
    return out, lse


def cross_attention_backward_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, interleave: bool,
    scale: float, configs: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (dq, dk, dv); dk and dv summed over the rows that share an image."""
    if not supported(q.dtype, q.shape[-1]):
        return NotImplemented
    B = k.shape[0]
    steps = _steps(B, q.shape[0] // max(B, 1), interleave)
    return packed_backward(
        grad, q, k, v, out, lse, "full", 0, None, scale, *steps, "cross_attention", configs
    )


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """96 queries split over the keys, which are then combined; other shapes are attention's."""
    config = FORWARD["wide"][architecture]
    values = compile_values(128, "full", False) | row_tiles(config, "BLOCK_M", 96)[1]
    split = values | {"out_ptr": "*fp32"}
    yield compile_case("cross_attention", "forward S=96 D=128 bf16", forward_kernel, config, split)
    arguments = {
        "partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": None,
        "rows": "i32", "S": "i32", "H": "i32", "parts": "i32",
    }  # fmt: skip
    for parts in (8, 64):
        shape = {"D": 128, "BLOCK_D": 128, "BLOCK_P": parts}
        name, config = f"combine {parts} parts D=128", combine_config(shape)
        yield Case("cross_attention", name, combine_kernel, {**arguments, **shape}, config)
