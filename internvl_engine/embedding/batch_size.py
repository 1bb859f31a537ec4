"""How many images fit at a time: guessed from free memory, corrected where the guess was wrong."""

import operator
from typing import Any

import torch

from ..memory import memory

LARGEST = 2**31 - 1  # a batch of everything
MOST = {"cuda": 64, "cpu": 32}  # of a guess: larger batches are no faster
SHARE = 0.5  # of the free memory, which others use too
SAID = (  # what PyTorch says in a RuntimeError where no memory is left
    "can't allocate memory", "not enough memory", "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


class BatchSize:
    """The images of a batch in one call; it becomes smaller where memory runs out, and stays so.

    Args:
        size: to begin with.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def shrink(self, failed: int) -> bool:
        """Halves a size that ran out of memory; False where it was 1."""
        self.size = min(self.size, max(failed // 2, 1))
        return failed > 1


def batch_size_of(size: Any, model: Any, device: torch.device, image_size: int) -> BatchSize:
    """The size that was asked for, or for None the one that memory allows."""
    if size is not None:
        return BatchSize(checked_batch_size(size))
    room = SHARE * free_memory(device) / bytes_per_image(model, image_size)
    most = min(MOST.get(device.type, MOST["cpu"]), int(room))
    return BatchSize(1 << max(most.bit_length() - 1, 0))


def checked_batch_size(batch_size: Any) -> int:
    """A batch size as a number; raises ValueError where it is none of 1 or more."""
    try:
        size = operator.index(batch_size)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}")
    return min(size, LARGEST)


def bytes_per_image(model: Any, image_size: int) -> int:
    """What a pass over one image takes beside the weights, at least and roughly.

    The largest moment of a layer of either tower: its stream, norms and residuals, its products of
    attention and MLP, and the scores of an attention that keeps them, as an eager layer does.
    """
    vision, text = model.config.vision_config, model.config.qllama_config
    tokens = 1 + (image_size // vision.patch_size) ** 2
    width, heads = vision.hidden_size, vision.num_attention_heads
    seen = tokens * (9 * width + vision.intermediate_size + 2 * heads * tokens)
    queries = model.config.num_query_token
    read = queries * (9 * text.hidden_size + 2 * text.intermediate_size) + 2 * tokens * (
        text.hidden_size
    )
    return max(seen, read + tokens * width) * model.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that a batch may take on a device, what PyTorch holds and does not use included."""
    if device.type != "cuda":
        return memory()["available"]
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left, on a GPU or in the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in SAID)
