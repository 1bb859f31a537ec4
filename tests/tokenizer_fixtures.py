"""Tokenizers for the tests: two tiny ones trained here, and the published one where it is found."""

import io
import json
import os
from pathlib import Path

import pytest

from internvl_engine.processing import InternVLTokenizer

GOLDEN = Path(__file__).parent / "golden"
SENTENCES = [
    "summarize:a photo of a red panda", "English caption: two dogs run on the beach",
    "a man riding a bike, up 5% at 3.14", "一张熊猫的照片", "二匹の猫の写真",
    "собака и кошка на траве",
    "naïve café – dash… don’t", "the quick brown fox jumps over the lazy dog 0123456789",
    "كلب في الحديقة", "two  spaces and\ttab",
] * 5  # fmt: skip


def train(byte_fallback: bool) -> bytes:
    """A SentencePiece model of the published kind (BPE, no normalisation), in a split second."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe",
        vocab_size=480 if byte_fallback else 240, byte_fallback=byte_fallback,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, control_symbols=["[PAD]"],
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.9999, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def tiny_model() -> bytes:
    return train(byte_fallback=True)


@pytest.fixture(scope="session")
def tiny(tiny_model) -> InternVLTokenizer:
    return InternVLTokenizer(tiny_model)


@pytest.fixture(scope="session")
def tiny_unk() -> InternVLTokenizer:
    """Without byte fallback: unseen characters have the unknown id 0, as padding does."""
    return InternVLTokenizer(train(byte_fallback=False))


@pytest.fixture(scope="session")
def published() -> InternVLTokenizer:
    path = os.environ.get("INTERNVL_TOKENIZER")
    if not path:
        pytest.skip("INTERNVL_TOKENIZER does not name the published tokenizer.model")
    return InternVLTokenizer(path)


@pytest.fixture(params=["tiny", "tiny_unk", "published"])
def tokenizer(request) -> InternVLTokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def golden_text() -> dict:
    return json.loads((GOLDEN / "text.json").read_text(encoding="utf-8"))
