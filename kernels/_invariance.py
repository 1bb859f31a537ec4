"""A switch: no bit of a row depends on how many other rows are in the batch.

On a GPU some choices follow the size of the batch, because small ones would leave it idle: into how
many parts keys are split, and with which tiles a matrix product runs (cuBLAS chooses by itself).
With the switch on these choices depend on widths and numbers of keys only, and products run in
Triton. On the CPU the native kernels are so always, but not the products of MKL and oneDNN: with
the switch on, weights that are not in panels (kernels/linear_packed.py) are packed for each call.
Forward passes of this library's operators only; what PyTorch computes beside them is not covered:
the engine's embeddings run one image, or one text, at a time then.
Source: He et al., Defeating Nondeterminism in LLM Inference, Thinking Machines Lab, 2025.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_is_on = False


def is_batch_invariant() -> bool:
    """Whether the switch is on."""
    return _is_on


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside, for the whole process, a row has the same bits in a batch of any size.

    It costs speed: keys of many rows are split as if there were one, and products of few rows take
    the tiles of many. Compiled code follows; a captured CUDA graph keeps what it was captured with.
    """
    global _is_on
    before, _is_on = _is_on, True
    try:
        yield
    finally:
        _is_on = before
