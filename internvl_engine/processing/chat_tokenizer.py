"""The tokenizer of a chat checkpoint, without code from it.

Folders with a `tokenizer.model` of InternLM2 (whose class is remote code), LLaMA or Yi are read by
`SentencePieceTokenizer`: the pieces of the SentencePiece library between the added tokens, which is
what their slow classes do. Everything else is transformers' own.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from ..checkpoint.files import read_json, refuse_pointer
from ..printable import printable

SETTINGS, MODEL, FAST = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
JINJA = "chat_template.jinja"
FILES = (
    SETTINGS, MODEL, FAST, "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", JINJA, "chat_template.json",
)  # fmt: skip
SPACE = "\u2581"  # how SentencePiece writes a space
# What makes a SentencePiece model begin no word with a text; protobuf merges what is appended.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(PreTrainedTokenizer):
    """A SentencePiece model with added tokens, as transformers 4's slow LLaMA tokenizer.

    Args:
        vocab_file: the SentencePiece model.
        unk_token: unknown pieces; as all special tokens, it must be in the model or be added.
        bos_token: beginning of a text.
        eos_token: end of a text.
        pad_token: padding; None for none.
        add_bos_token: put `bos_token` before a text.
        add_eos_token: put `eos_token` after a text.
        legacy: every piece of text between added tokens begins a word, as before transformers
            4.31; False lets only the first do so.
        options: further ones of transformers' tokenizers.

    Raises:
        ValueError: not a SentencePiece model.
        ImportError: sentencepiece is not installed.
    """

    vocab_files_names = {"vocab_file": MODEL}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool | None = True,
        **options: Any,
    ) -> None:
        self.vocab_file, self.legacy = os.fspath(vocab_file), legacy is not False
        self.add_bos_token, self.add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self._read()
        super().__init__(
            unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token,
            add_bos_token=add_bos_token, add_eos_token=add_eos_token, legacy=legacy, **options,
        )  # fmt: skip

    def _read(self) -> None:
        self.pieces = _pieces(self.vocab_file, b"")
        self.unprefixed = _pieces(self.vocab_file, WITHOUT_PREFIX)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("pieces", "unprefixed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read()

    @property
    def vocab_size(self) -> int:
        return self.pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Ids of all tokens."""
        known = {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}
        return known | self.added_tokens_encoder

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """Tokens of a text, without those around it."""
        if self.legacy or not text:
            return super().tokenize(text, **options)
        tokens = super().tokenize(SPACE + text.replace(SPACE, " "), **options)
        only_space = len(tokens) > 1 and tokens[0] == SPACE and tokens[1] in self.all_special_tokens
        return tokens[1:] if only_space else tokens

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return (self.pieces if self.legacy else self.unprefixed).encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        special, text = set(self.all_special_tokens), ""
        run: list[str] = []
        for token in tokens:
            if token in special:
                text, run = text + self.pieces.decode(run) + token, []
            else:
                run.append(token)
        return text + self.pieces.decode(run)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids with the tokens that stand around a text."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        rows = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [i for row in rows for i in (*start, *row, *end)]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple:
        """Writes the SentencePiece model, byte for byte."""
        name = (f"{filename_prefix}-" if filename_prefix else "") + MODEL
        target = Path(save_directory, name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, **options: Any
    ) -> tuple:
        """Writes what `load_tokenizer` reads; transformers 5 leaves out two of the settings."""
        written = super().save_pretrained(save_directory, *args, **options)
        path = Path(save_directory, SETTINGS)
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return written


class InternLM2Tokenizer(SentencePieceTokenizer):
    """The class whose code published InternLM2 checkpoints bring, by its name in their files."""


class LlamaTokenizer(SentencePieceTokenizer):
    """LLaMA's and Yi's, as transformers 4 had it."""


# What transformers 4 and 5 call a tokenizer that tokenizer.json describes whole.
ANY_FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")
SENTENCEPIECE_CLASSES = {kind.__name__: kind for kind in (InternLM2Tokenizer, LlamaTokenizer)}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a damaged file, or a class that is not known here.
    """
    settings_file = folder / SETTINGS
    settings = read_json(settings_file) if settings_file.is_file() else {}
    kind = SENTENCEPIECE_CLASSES.get(str(settings.get("tokenizer_class")).removesuffix("Fast"))
    if (folder / MODEL).is_file() and (kind or not (folder / FAST).is_file()):
        refuse_pointer(folder / MODEL)
        _pieces(str(folder / MODEL), b"")  # transformers 4 would hide what is wrong with it
        return (kind or LlamaTokenizer).from_pretrained(folder)
    if not any((folder / file).is_file() for file in (FAST, "vocab.json", "vocab.txt")):
        raise FileNotFoundError(
            f"VisionLanguageProcessor: {printable(folder)} has no tokenizer ({MODEL}, {FAST} or "
            "vocab.json)"
        )
    for file in (FAST, "vocab.json"):
        if (folder / file).is_file():
            refuse_pointer(folder / file)
    try:
        own = "auto_map" in settings or settings.get("tokenizer_class") in (None, *ANY_FAST)
        if own and (folder / FAST).is_file():  # its class is remote code, or none in particular
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # With a configuration given, that of the model is not looked at, which may be remote code.
        options: dict[str, Any] = {"config": PretrainedConfig(), "trust_remote_code": False}
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"VisionLanguageProcessor: the tokenizer in {printable(folder)} cannot be read: "
            f"{printable(error, 300)}"
        ) from error


def save_tokenizer(
    tokenizer: Any, folder: Path, names: Mapping[str, str], template: str
) -> list[str]:
    """Writes a tokenizer; returns the paths.

    Args:
        tokenizer: one of transformers'.
        folder: where to.
        names: tokens that transformers' processor asks for by name; none in published folders.
        template: Jinja template in place of the tokenizer's own; "" keeps that.
    """
    written = [str(path) for path in tokenizer.save_pretrained(folder) if Path(path).is_file()]
    if template:
        (folder / JINJA).write_text(template, encoding="utf-8")
    path = folder / SETTINGS
    settings = read_json(path)
    if settings.get("tokenizer_class") in ANY_FAST:
        settings["tokenizer_class"] = ANY_FAST[0]  # the name that transformers 4 knows too
    if names:
        known = settings.get("extra_special_tokens")
        extra = known if isinstance(known, dict) else {}
        settings["extra_special_tokens"] = extra | dict(names)
        settings.pop("chat_template", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return written


def _pieces(path: str, appended: bytes) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(
            "this checkpoint's tokenizer needs sentencepiece: pip install sentencepiece"
        ) from error
    content = Path(path).read_bytes()
    try:
        if not content:
            raise RuntimeError("it is empty")
        return SentencePieceProcessor(model_proto=content + appended)
    except RuntimeError as error:
        raise ValueError(f"{printable(path)} is no SentencePiece model: {error}") from error
