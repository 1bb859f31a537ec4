"""Text to token ids and back, by the rules the published model was trained with.

For embeddings: `<s>` + pieces of ("summarize:" + text) + `</s>`, cut to 80 ids with `</s>` kept,
padded on the right with 0. For prompts: `<s>` + pieces, no `</s>`, padded on the left. The pieces
are those of the SentencePiece library itself. transformers' LlamaTokenizer is not used: version 5
gives other ids for double spaces and for ordinary text such as "3.14", and pads left.

Control tokens written out in a text ("</s>", "<s>", "<unk>", "[PAD]") are plain characters here,
as in SentencePiece: nobody can end a sentence from inside a caption. The published tokenizer
(transformers 4.37) turned them into control ids; `control_tokens=True` reproduces that.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from .padding import Padding, TokenBatch, pad_rows
from .pieces import SentencePieces

EMBEDDING_PREFIX = "summarize:"
CAPTION_PROMPT = "English caption:"
MAX_LENGTH = 80


class InternVLTokenizer(SentencePieces):
    """The published model's tokenizer, on SentencePiece.

    Args:
        model: a SentencePiece model file, or its bytes. Needs `<s>`, `</s>` and an unknown piece;
            the unknown piece has id 0, which is also the padding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a SentencePiece model, or one without the special pieces.
        ImportError: sentencepiece is not installed.
    """

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
