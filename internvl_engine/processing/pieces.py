"""A SentencePiece model with the special pieces that the published model knows, and decoding.

Spaces around special pieces that are written out are those of transformers 4.37.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import refuse_pointer


class SentencePieces:
    """The pieces of a SentencePiece model, by id.

    Args:
        model: a SentencePiece model file, or its bytes. Needs `<s>`, `</s>` and an unknown piece;
            the unknown piece has id 0, which is also the padding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a SentencePiece model, or one without the special pieces.
        ImportError: sentencepiece is not installed.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        name = "the given bytes" if isinstance(model, bytes) else str(model)
        self.model_bytes = model if isinstance(model, bytes) else _read(Path(model))
        try:
            if not self.model_bytes:
                raise RuntimeError("it is empty")  # the library accepts that and encodes nothing
            pieces = self._pieces
        except RuntimeError as error:
            raise ValueError(f"InternVLTokenizer: {name} is no SentencePiece model: {error}") from (
                error
            )
        self.vocab_size: int = pieces.get_piece_size()
        self.bos_token_id: int = pieces.bos_id()
        self.eos_token_id: int = pieces.eos_id()
        self.unk_token_id: int = pieces.unk_id()
        self.pad_token_id = 0
        pad = pieces.piece_to_id("[PAD]")
        self.training_pad_token_id: int = self.pad_token_id if pad == self.unk_token_id else pad
        if self.unk_token_id != 0 or self.bos_token_id < 1 or self.eos_token_id < 1:
            raise ValueError(
                f"InternVLTokenizer: {name} must have the unknown piece at id 0 and pieces <s> and "
                f"</s>; it has unk {self.unk_token_id}, bos {self.bos_token_id}, eos "
                f"{self.eos_token_id} (train it with unk_id=0, bos_id=1, eos_id=2, pad_id=-1)"
            )

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.vocab_size} pieces, bos {self.bos_token_id}, eos "
            f"{self.eos_token_id}, unk and padding {self.unk_token_id})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pieces", "_control_ids")}

    @cached_property
    def _pieces(self) -> Any:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                "InternVLTokenizer needs the sentencepiece package: pip install sentencepiece"
            ) from error
        return SentencePieceProcessor(model_proto=self.model_bytes)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        control = {i for i in range(self.vocab_size) if self._pieces.is_control(i)}
        return frozenset(control | {self.pad_token_id, self.training_pad_token_id})

    def save(self, path: str | Path) -> None:
        """Writes the SentencePiece model, byte for byte as it was read."""
        Path(path).write_bytes(self.model_bytes)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of one row of ids.

        Args:
            ids: (L,) token ids.
            skip_special_tokens: leave out `<unk>`, `<s>`, `</s>` and `[PAD]`; otherwise they
                are written out, spaced as transformers 4.37 does.

        Raises:
            ValueError: an id outside the vocabulary (-100 of a label, for example).
        """
        numbers = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        for position, i in enumerate(numbers):
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"decode: id {i} at position {position} is not one of the "
                    f"{self.vocab_size} ids of this tokenizer"
                )
        if skip_special_tokens:
            return self._pieces.decode([i for i in numbers if i not in self._control_ids])
        text = ""
        run: list[int] = []
        for i in numbers:
            if i not in self._control_ids:
                run.append(i)
                continue
            space = " " if run else ""
            text += space + self._pieces.decode(run) + self._pieces.id_to_piece(i)
            run = []
        return text + self._pieces.decode(run)

    def batch_decode(
        self, batch: Iterable[Sequence[int]] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """Text of every row of a batch; see `decode`."""
        return [self.decode(row, skip_special_tokens) for row in batch]

    def _split(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts whose written-out control tokens count, as transformers 4.37 splits them."""
        names = {self._pieces.id_to_piece(i): i for i in self._control_ids}
        pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        parts = [[part for part in pattern.split(text) if part] for text in texts]
        return [
            [i for p in row for i in ([names[p]] if p in names else self._pieces.encode(p))]
            for row in parts
        ]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"InternVLTokenizer: no tokenizer model at {path}")
    refuse_pointer(path)
    return path.read_bytes()
