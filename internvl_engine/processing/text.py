"""Text to token ids and back, by the rules the published model was trained with.

For embeddings: `<s>` + pieces of ("summarize:" + text) + `</s>`, cut to 80 ids with `</s>` kept,
padded on the right with 0. For prompts: `<s>` + pieces, no `</s>`, padded on the left. The pieces
are those of the SentencePiece library itself. transformers' LlamaTokenizer is not used: version 5
gives other ids for double spaces and for ordinary text such as "3.14", and pads left.

Control tokens written out in a text ("</s>", "<s>", "<unk>", "[PAD]") are plain characters here,
as in SentencePiece: nobody can end a sentence from inside a caption. The published tokenizer
(transformers 4.37) turned them into control ids; `control_tokens=True` reproduces that.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.files import refuse_pointer
from .padding import Padding, TokenBatch, pad_rows

EMBEDDING_PREFIX = "summarize:"
CAPTION_PROMPT = "English caption:"
MAX_LENGTH = 80


class InternVLTokenizer:
    """The published model's tokenizer, on SentencePiece.

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

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: Padding = "longest",
        truncation: bool = True,
        max_length: int = MAX_LENGTH,
        return_tensors: str | None = None,
    ) -> Any:
        """Ids of texts for `model.encode_text`, for code that calls a tokenizer as a function.

        Args:
            texts: one text or several. "summarize:" is put before those that do not bring it.
            padding: as in `encode_for_embedding`.
            truncation: False cuts nothing.
            max_length: the most ids in a row.
            return_tensors: None for the ids alone, as CLIP's tokenizers give them; "pt" for a
                mapping with `input_ids` and `attention_mask`, as those of transformers do.

        Returns:
            (B, L) int64, or a BatchEncoding of two such tensors.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f'InternVLTokenizer: gives "pt" tensors, not {return_tensors!r}')
        given = _checked("InternVLTokenizer", texts)
        given = [text.removeprefix(EMBEDDING_PREFIX) for text in given]
        batch = self.encode_for_embedding(given, max_length if truncation else None, padding)
        if return_tensors is None:
            return batch.input_ids
        from transformers import BatchEncoding

        return BatchEncoding(batch._asdict())

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

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prefix: str = "",
        bos: bool = True,
        eos: bool = False,
        max_length: int | None = None,
        control_tokens: bool = False,
    ) -> list[list[int]]:
        """Token ids of texts, without padding.

        Args:
            texts: one text or several.
            prefix: put before every text, with nothing in between.
            bos: put `<s>` first.
            eos: put `</s>` last.
            max_length: the most ids in a row, special ones included and never cut; None: any.
            control_tokens: read control tokens that are written out in a text as such.

        Returns:
            One list a text; a single text gives a list of one.

        Raises:
            TypeError: something that is not a string.
            ValueError: a lone surrogate (text that is not Unicode), or a limit without room.
        """
        checked = [prefix + text for text in _checked("encode", texts)]
        special = int(bos) + int(eos)
        if max_length is not None and max_length < max(special, 1):
            raise ValueError(
                f"encode: max_length {max_length} leaves no room for {special} special tokens"
            )
        room = None if max_length is None else max_length - special
        rows = self._split(checked) if control_tokens else self._pieces.encode(checked)
        start, end = [self.bos_token_id] * bos, [self.eos_token_id] * eos
        return [start + row[:room] + end for row in rows]

    def encode_for_embedding(
        self,
        texts: str | Sequence[str],
        max_length: int | None = MAX_LENGTH,
        padding: Padding = "longest",
        *,
        prefix: str = EMBEDDING_PREFIX,
        control_tokens: bool = False,
    ) -> TokenBatch:
        """Token ids for `encode_text`: prefix, `<s>`, `</s>`, padding 0 on the right.

        Args:
            texts: one text or several.
            max_length: the most ids in a row; what is longer is cut and still ends in `</s>`.
            padding: to the longest row, to `max_length` (as the published scripts do: same
                embeddings, more work), or False for lists without padding.
            prefix: "" for texts that bring "summarize:" with them.
            control_tokens: see `encode`.

        Returns:
            TokenBatch, (B, L) int64 each. Use its mask: an unknown piece inside a sentence has id
            0 too, so the ids alone cannot say where it ends.
        """
        checked = _checked("encode_for_embedding", texts)
        if prefix and any(text.startswith(prefix) for text in checked):
            warnings.warn(
                f'encode_for_embedding puts "{prefix}" before every text, and a text begins with '
                'it already; pass prefix="" if it is there on purpose',
                stacklevel=2,
            )
        rows = self.encode(
            checked, prefix=prefix, eos=True, max_length=max_length, control_tokens=control_tokens
        )
        return pad_rows(rows, "right", padding, max_length)

    def encode_prompt(
        self, prompts: str | Sequence[str] = CAPTION_PROMPT, max_length: int | None = None
    ) -> TokenBatch:
        """Token ids for `generate`: `<s>` + pieces, no `</s>`, padded on the left.

        The padding stands between the image queries and the prompt, so that the last position of
        every row is its last real token.

        Args:
            prompts: one prompt or several.
            max_length: the most ids in a row; None cuts nothing.

        Returns:
            TokenBatch, (B, L) int64 each.
        """
        return pad_rows(self.encode(prompts, max_length=max_length), "left")

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


def _checked(name: str, texts: str | Sequence[str]) -> list[str]:
    checked = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"{name}: text {index} is a {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: text {index} is not valid Unicode: {error}") from error
    return checked
