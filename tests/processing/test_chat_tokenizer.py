"""Tokenizers of chat checkpoints: SentencePiece files without the code that they come with."""

import copy
import json
import pickle
import shutil

import pytest
from tokenizer_fixtures import train

from internvl_engine.assets import nano_chat_directory
from internvl_engine.processing import SPECIAL_TOKENS, add_special_tokens
from internvl_engine.processing.chat_tokenizer import (
    SentencePieceTokenizer,
    load_tokenizer,
    save_tokenizer,
)

CHAT = ("<|im_start|>", "<|im_end|>")
TEXT = "<|im_start|>red panda  x<img><IMG_CONTEXT></img>3.14<|im_end|>"


@pytest.fixture(scope="module")
def model() -> bytes:
    return train(byte_fallback=True)


def folder(path, model, **changes):
    """As InternLM2's published folders: a SentencePiece model, and a class of remote code."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model)
    size = SentencePieceTokenizer(str(path / "tokenizer.model")).vocab_size
    flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False,
             "normalized": False}  # fmt: skip
    added = {str(i): {"content": t, **flags} for i, t in enumerate(("<unk>", "<s>", "</s>"))}
    added |= {str(size + i): {"content": t, **flags} for i, t in enumerate(CHAT + SPECIAL_TOKENS)}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "additional_special_tokens": [*CHAT, *SPECIAL_TOKENS], "pad_token": "</s>",
        "add_bos_token": True, "add_eos_token": False, "model_max_length": 8192,
    } | changes  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "tokenization_internlm2.py").write_text("raise SystemExit('this code was run')")
    return path


def expected(words, pieces: list) -> list[int]:
    """Ids of texts and of special tokens, each text by itself as SentencePiece splits it."""
    known = words.get_vocab()
    ids = [known["<s>"]]
    for piece in pieces:
        ids += [known[piece]] if piece in known else words.pieces.encode(piece)
    return ids


def test_pieces_between_added_tokens(tmp_path, model):
    words = load_tokenizer(folder(tmp_path, model))
    pieces = ["<|im_start|>", "red panda  x", "<img>", "<IMG_CONTEXT>", "</img>", "3.14", CHAT[1]]
    ids = words(TEXT)["input_ids"]
    assert ids == expected(words, pieces)
    assert len(words) == words.vocab_size + 11 and words.model_max_length == 8192
    assert words.decode(ids, skip_special_tokens=True).split() == ["red", "panda", "x", "3.14"]
    assert add_special_tokens(words) == 0


def test_without_a_token_at_the_beginning(tmp_path, model):
    words = load_tokenizer(folder(tmp_path, model, add_bos_token=False))
    again = _saved(words, tmp_path / "saved")
    assert again("a")["input_ids"] == words("a")["input_ids"] == words.pieces.encode("a")


def test_only_the_first_piece_begins_a_word_where_legacy_is_off(tmp_path, model):
    words = load_tokenizer(folder(tmp_path, model, tokenizer_class="LlamaTokenizer", legacy=False))
    tokens = words.tokenize("red<img>red")
    assert tokens == ["\u2581red", "<img>", "r", "ed"]
    assert words.tokenize("<img> red") == ["<img>", "\u2581red"]
    assert words.tokenize("") == []


def _saved(words, path):
    words.save_pretrained(path)
    return load_tokenizer(path)


@pytest.mark.parametrize("legacy", [True, False])
def test_saved_and_copied_ones_split_the_same(tmp_path, model, legacy):
    words = load_tokenizer(folder(tmp_path, model, legacy=legacy))
    ids = words(TEXT)["input_ids"]
    saved = _saved(words, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == model
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "InternLM2Tokenizer"  # as its maker calls it
    for again in (saved, pickle.loads(pickle.dumps(words)), copy.deepcopy(words)):
        assert again(TEXT)["input_ids"] == ids and len(again) == len(words)


def test_a_model_file_alone(tmp_path, model):
    (tmp_path / "tokenizer.model").write_bytes(model)
    words = load_tokenizer(tmp_path)
    size = len(words)
    assert add_special_tokens(words) == 9
    assert words.convert_tokens_to_ids([*SPECIAL_TOKENS]) == list(range(size, size + 9))


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"rubbish", "no SentencePiece model"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "(?i)lfs"),
])  # fmt: skip
def test_damaged_models(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_fast_one_is_read_by_either_name_and_saved_by_the_one_both_versions_know(tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(nano_chat_directory(), source, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
    words = load_tokenizer(source)
    assert words.tokenize("red<img>") == ["red", "<img>"]
    save_tokenizer(words, tmp_path, {}, "")
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
