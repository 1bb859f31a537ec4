"""What a chat processor gives: a mapping for the model, and how its tiles belong together."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature


class ChatInputs(BatchFeature):
    """Inputs of a chat model. `num_patches_list` is the number of tiles of each picture."""

    def __init__(self, data: dict[str, Any], num_patches_list: Sequence[int] = ()) -> None:
        super().__init__(data)
        self.num_patches_list = list(num_patches_list)

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "num_patches_list": self.num_patches_list}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
