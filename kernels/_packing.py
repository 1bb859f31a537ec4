"""Which layout a linear layer's weight is packed in on this machine: kernels/linear_packed.py."""

import torch
from torch import Tensor, nn

from ._library import native
from ._panels import Panel, from_panels, panel_of, to_panels


def layout_of(weight: Tensor) -> str | None:
    """The packed layout that this machine has for a weight, or None: then `linear` takes it dense.

    Args:
        weight: (F, C). Only a plain strided tensor or parameter on the CPU has one: a subclass may
            hold its values elsewhere than where it says.

    Returns:
        "panels-RxD" (the rows of a panel and the columns of a step), "onednn" or None.
    """
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    if not is_plain or weight.device.type != "cpu" or weight.dim() != 2 or weight.numel() == 0:
        return None
    panel = _panel(weight.dtype)
    if panel is not None:
        return None if weight.shape[1] % panel.depth else str(panel)
    return "onednn" if _onednn_packs(weight.dtype) else None


def panel_rows(dtype: torch.dtype) -> int | None:
    """How many rows of a weight lie together; None where its layout is not made of panels.

    Rows whose number is a multiple of it are a range of the packed tensor: for such a and b,
    pack(cat([a, b])) equals cat([pack(a), pack(b)]), and each half of it is that weight, packed.
    """
    panel = _panel(dtype)
    return None if panel is None else panel.rows


def _panel(dtype: torch.dtype) -> Panel | None:
    """The panel where panels are the fastest layout for the dtype.

    float32: oneDNN sums in one chain, with 2.5 times the error of MKL. bfloat16: without units of
    its own oneDNN takes 1.2 to 3 times as long as panels, on AVX-512, and has nothing on AVX2.
    """
    if native is None or native.instruction_set() == "portable":
        return None
    is_onednns = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    if is_onednns and _onednn_packs(dtype):
        return None
    return panel_of(dtype)


def _onednn_packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def pack(weight: Tensor) -> Tensor:
    """The weight (F, C) in the layout `layout_of(weight)`, in memory of its own.

    Raises:
        ValueError: this machine has no packed layout for it.
    """
    layout = layout_of(weight)
    if layout is None:
        raise ValueError(
            f"pack: no packed layout here for a {weight.dtype} {type(weight).__name__} of shape "
            f"{tuple(weight.shape)} on {weight.device}; use linear() with the dense weight"
        )
    weight = weight.detach()
    if layout == "onednn":  # not told for how many rows: without, as fast for 1 to 1028
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    panel = _panel(weight.dtype)
    assert panel is not None
    return to_panels(weight, panel)


def unpack(packed: Tensor, features: int, channels: int) -> Tensor:
    """The weight (features, channels) as it came, bit for bit, in memory of its own.

    Reads panels of any machine: their shape says how they are packed.
    """
    if packed.layout != torch.strided:
        return packed.to_dense()
    return from_panels(packed, features)


def packed_nbytes(packed: Tensor) -> int:
    """Bytes of a packed weight."""
    if packed.layout == torch.strided:
        return packed.nbytes
    return torch.ops.mkldnn._nbytes(packed)
