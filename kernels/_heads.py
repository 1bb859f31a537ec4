"""Heads (B, H, S, D): their pointers, limits, and the checks that the rotary operators share."""

import torch
from torch import Tensor


def pointer(x: Tensor) -> tuple[int, int, int, int]:
    """x (B, H, S, D) with adjacent elements, as csrc/heads.h takes it."""
    batch, head, token, _ = x.stride()
    return x.data_ptr(), batch, head, token


def adjacent_pointer(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`adjacent(x)`, which must outlive the call, and its `pointer`."""
    strides = x.stride()
    if strides[3] != 1 and x.shape[3] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, (x.data_ptr(), *strides[:3])


# Of a head in Triton's attention kernels: tiles of wider ones spill.
MAX_HEAD_DIM = 128


def unsupported_head_dim(head_dim: int) -> str | None:
    """Why the attention operators have no fast kernel for heads this wide, or None."""
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return (
            f"its heads are {head_dim} wide; the kernels take multiples of 8 up to {MAX_HEAD_DIM}"
        )
    return None


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp that a gradient starts from: float64 for float32 (and float64) inputs.

    At a log-sum-exp of 8, half a unit in the last place of float32 changes the probabilities that
    the backward pass computes from it by 4 times their own rounding.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def adjacent(x: Tensor) -> Tensor:
    """x, or a copy where the elements of a head are not next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_heads(x: Tensor) -> Tensor:
    """An output for x in its memory order, but with the elements of a head next to each other.

    A gradient that comes out of k.transpose(-2, -1) is dense with its elements S apart.
    """
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


def positions_stride(positions: Tensor) -> int:
    """From one sequence to the next; 0 where all share the positions. positions: (B or 1, S)."""
    return 0 if positions.shape[0] == 1 else positions.shape[1]


def slots_stride(slots: Tensor) -> int:
    """From one row to the next; 0 where all write the same slots. slots: (S,) or (B, S)."""
    return slots.shape[1] if slots.dim() == 2 else 0


def check_rotary(
    operator: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> None:
    """Raises ValueError where shapes or dtypes do not go together."""
    if q.dim() != 4:
        raise ValueError(f"{operator}: q must be (B, H, S, D), got {tuple(q.shape)}")
    batch, _, tokens, dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2:] != q.shape[2:] or k.dtype != q.dtype:
        raise ValueError(
            f"{operator}: q and k must be (B, H, S, D) of one dtype and differ in H only, got "
            f"{tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}"
        )
    half = (dim // 2,)
    if dim % 2 or cos.shape[1:] != half or sin.shape != cos.shape:
        raise ValueError(
            f"{operator}: cos and sin must be (P, D / 2) with D = {dim}, got {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}"
        )
    if cos.dtype != q.dtype or sin.dtype != q.dtype:
        raise ValueError(
            f"{operator}: cos and sin must be {q.dtype} as q is, got {cos.dtype}, {sin.dtype}"
        )
    if positions.shape not in ((batch, tokens), (1, tokens)) or positions.is_floating_point():
        raise ValueError(
            f"{operator}: positions must be integers of shape {(batch, tokens)} or {(1, tokens)}, "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )


def as_int64(x: Tensor) -> Tensor:
    """Contiguous 64-bit integers, as the native kernels read them."""
    if x.dtype is torch.int64 and x.is_contiguous():
        return x
    return x.to(torch.int64).contiguous()
