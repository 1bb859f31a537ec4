"""Single weights of a checkpoint that a model was loaded from, read again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contents import Contents
from .entries import Quantized
from .errors import CheckpointError
from .grouping import heads_of
from .identify import language_fields
from .locate import Source
from .names import canonical, prefix_of, translate
from .plan import Reader


class WideWeights:
    """What a checkpoint has for the names of a model's parameters; called with one."""

    def __init__(
        self, model: Any, names: Iterable[str], source: str | Path | Mapping[str, Tensor] | None
    ) -> None:
        """
        Args:
            model: that may say which checkpoint it came from.
            names: all that its parameters have, or had when those that are asked for were taken.
            source: a checkpoint, or a state dict of the model; None is the checkpoint that the
                model says it came from, where there still is one.

        Raises:
            CheckpointError: `source` is no checkpoint that can be read.
        """
        self.state: Mapping[str, Tensor] | None = None
        self.reader: Reader | None = None
        self.published: dict[str, str] = {}
        if isinstance(source, Mapping):
            self.state = {canonical(name): value for name, value in source.items()}
            return
        folder = source or source_of(model)
        try:
            if folder is not None:
                self._open(list(names), folder)
        except (CheckpointError, OSError, KeyError):
            if source is not None:
                raise

    def _open(self, names: list[str], folder: str | Path) -> None:
        found = Source.find(folder, **({} if Path(folder).exists() else {"local_files_only": True}))
        heads = heads_of(language_fields(found.config or {}))
        contents = Contents.read(found, found.weights(), heads=heads)
        known = translate(names).stored
        own = dict(zip(names, map(canonical, names), strict=True))
        own |= {stored[0]: name for name, stored in known.items() if len(stored) == 1}
        prefix = prefix_of(own.values(), contents.names)
        self.published = {name: prefix + published for name, published in own.items()}
        self.reader = Reader(contents)

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The weight of a name in the model, cast to dtype; None where there is none."""
        if self.state is not None:
            value = self.state.get(canonical(name))
            return None if value is None else value.detach().to(dtype)
        published = self.published.get(name)
        if self.reader is None or published not in self.reader.contents.tensors:
            return None
        if isinstance(self.reader.contents.entry(published), Quantized):  # it never was wide
            return None
        return self.reader.read(published, dtype)


def source_of(model: Any) -> Path | str | None:
    """Where a model says that it was loaded from."""
    origin = getattr(model, "origin", None)
    if origin is not None:
        return origin.folder
    named = getattr(model, "name_or_path", None)
    return named or None
