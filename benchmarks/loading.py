"""Load time and memory of a model whose weights have a form, each in a process of its own.

A checkpoint with random weights is written to a temporary folder and read back as a user would
(full_size.py): the seconds until it is there, the memory that is allocated, and that with the pages
of the mapped file that were read. The whole 14B is measured so by full_size.py itself.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from internvl_engine.configuration import InternVLConfig

from .cases import Finding
from .full_size import page, run
from .random_checkpoint import write_random

NEW_TOKENS = 8
WRITTEN = ("int8", "int4")  # what random_checkpoint.py can write


def findings(
    config: InternVLConfig, dtype: torch.dtype, schemes: tuple[str, ...],
    new_tokens: int = NEW_TOKENS,
) -> Iterator[Finding]:  # fmt: skip
    """Wide weights, then those of every scheme.

    Args:
        config: of the model.
        dtype: that products are computed in.
        schemes: of `convert(quantize=)`; those that nobody writes at random are left out.
        new_tokens: of the caption that is made.
    """
    computed = str(dtype)[6:]
    for scheme in (None, *(scheme for scheme in schemes if scheme in WRITTEN)):
        with tempfile.TemporaryDirectory(prefix="internvl-bench-") as folder:
            checkpoint = write_random(Path(folder) / "model", scheme, config)
            found = run(checkpoint, scheme, computed, new_tokens)
        values = {name: value for name, value in found.items() if not isinstance(value, dict)}
        for turn in ("first", "again"):
            values |= {f"{turn}_{name}": value for name, value in found[turn].items()}
        label = f"weights in {scheme or 'bfloat16'}, computed in {computed}"
        yield Finding("load", label, values, page(found))
