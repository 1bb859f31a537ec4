"""Token ids: SentencePiece's own under the published rules, with padding that is checked."""

import pickle
import random
import sys
import warnings

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_engine.processing import InternVLTokenizer

SCRIPTS = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xA00), (0xE00, 0xE80),
           (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0xFF01, 0xFF5F),
           (0x1F300, 0x1FAFF), (0x2000, 0x2070), (0, 32)]  # fmt: skip
WHOLE = ["3.14", "  ", "   ", "</s>", "<s>", "<unk>", "[PAD]", "<0x41>", "▁", " ", "\n", "\u200d",
         "é", "e\u0301", "summarize:", "👩‍👩‍👧", "a red panda", "."]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Words of one script each, between things that tokenizers are known to disagree about."""
    parts = []
    for _ in range(rng.randint(0, rng.choice([3, 8, 60]))):
        if rng.random() < 0.4:
            parts.append(rng.choice(WHOLE))
        else:
            low, high = rng.choice(SCRIPTS)
            parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 9))))
    return rng.choice(["", " "]).join(parts)


def library(tokenizer: InternVLTokenizer):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)


def expected_row(pieces, text: str, max_length: int = 80) -> list[int]:
    return [1, *pieces.encode("summarize:" + text)[: max_length - 2], 2]


@pytest.mark.filterwarnings("ignore:encode_for_embedding")
def test_thousands_of_random_texts_have_the_ids_of_the_library(tokenizer):
    pieces, rng = library(tokenizer), random.Random(7)
    texts = [random_text(rng) for _ in range(4000)]
    ids, mask = tokenizer.encode_for_embedding(texts, padding=False)
    assert ids == [expected_row(pieces, text) for text in texts]
    assert mask == [[1] * len(row) for row in ids]
    assert sum(len(row) == 80 for row in ids) > 20  # truncation took part


@pytest.mark.filterwarnings("ignore:encode_for_embedding")
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=4), max_length=st.integers(2, 20))
def test_any_text_is_encoded_and_padded_by_the_rules(tiny_unk, texts, max_length):
    pieces = library(tiny_unk)
    rows = [expected_row(pieces, text, max_length) for text in texts]
    batch = tiny_unk.encode_for_embedding(texts, max_length)
    assert batch.input_ids.shape == (len(texts), max(map(len, rows), default=0))
    for row, ids, mask in zip(rows, batch.input_ids, batch.attention_mask, strict=True):
        pads = len(ids) - len(row)
        assert ids.tolist() == row + [0] * pads
        assert mask.tolist() == [1] * len(row) + [0] * pads


@pytest.mark.golden
def test_published_ids(published, golden_text):
    for case in golden_text["encode_text"]:
        # the recorded tokenizer reads a literal "[PAD]" as the control token; we do on request
        literal = "[PAD]" in case["text"]
        batch = published.encode_for_embedding(
            case["text"], padding="max_length", control_tokens=literal
        )
        assert batch.input_ids.tolist() == [case["ids_max_length_80"]], case["text"]
    rows = golden_text["encode_text_longest"]
    texts = [case["text"] for case in golden_text["encode_text"][: len(rows)]]
    assert published.encode_for_embedding(texts).input_ids.tolist() == rows


@pytest.mark.golden
def test_published_prompts_decoding_and_special_ids(published, golden_text):
    for prompt, ids in golden_text["prompt"].items():
        assert published.encode_prompt(prompt).input_ids.tolist() == [ids]
    for case in golden_text["decode"]:
        assert published.decode(case["ids"]) == case["text"]
    assert published.batch_decode([c["ids"] for c in golden_text["decode"]]) == [
        c["text"] for c in golden_text["decode"]
    ]
    assert published.decode([1, 263, 2654, 282, 5863, 2], False) == "<s> a red panda</s>"
    special = golden_text["tokenizer"]
    assert len(published) == special["vocab"]
    assert published.training_pad_token_id == special["pad_for_training"]
    assert published.pad_token_id == special["pad_for_inference"]
    assert (published.bos_token_id, published.eos_token_id) == (special["bos"], special["eos"])


def test_the_end_survives_truncation_and_the_prefix_touches_the_text(tiny):
    long = tiny.encode_for_embedding("word " * 200, padding="max_length")
    assert long.input_ids.shape == (1, 80) and int(long.input_ids[0, -1]) == tiny.eos_token_id
    assert long.attention_mask.all()
    empty = tiny.encode_for_embedding("").input_ids[0].tolist()
    assert empty == [1, *library(tiny).encode("summarize:"), 2]
    bare = tiny.encode_for_embedding("summarize:cat", prefix="")
    assert torch.equal(bare.input_ids, tiny.encode_for_embedding("cat").input_ids)
    whole = tiny.encode_for_embedding("word " * 200, max_length=None)
    assert whole.input_ids.shape[1] > 200 and bool(whole.attention_mask.all())


def test_a_prefix_that_is_there_already_is_noticed(tiny):
    with pytest.warns(UserWarning, match='pass prefix=""'):
        tiny.encode_for_embedding(["a cat", "summarize:a cat"])


def test_control_tokens_in_a_text_are_plain_text(tokenizer):
    texts = ["</s>", "a <s> b", "<unk>", "[PAD] literal"]
    rows = tokenizer.encode_for_embedding(texts, padding=False).input_ids
    for text, row in zip(texts, rows, strict=True):
        inner = row[1:-1]
        assert not {1, 2} & set(inner), text
        if tokenizer.training_pad_token_id:
            assert tokenizer.training_pad_token_id not in inner
    parsed = tokenizer.encode("a</s>b", control_tokens=True)[0]
    pieces = library(tokenizer)
    assert parsed == [1, *pieces.encode("a"), 2, *pieces.encode("b")]


def test_any_character_survives_byte_fallback(tiny):
    texts = ["😀 𝔘𝔫𝔦 \x00 ꙮ", "二  spaces", "a b "]
    ids = tiny.encode_for_embedding(texts, prefix="").input_ids
    assert tiny.batch_decode(ids) == texts
    assert not (ids[0] == 0).any()  # bytes, not unknown


def test_prompts_have_no_end_and_are_padded_on_the_left(tiny):
    prompts = ["English caption:", "a dog", ""]
    ids, mask = tiny.encode_prompt(prompts)
    rows = [[1, *library(tiny).encode(p)] for p in prompts]
    for row, i, m in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        pads = len(i) - len(row)
        assert i == [0] * pads + row and m == [0] * pads + [1] * len(row)
    assert mask[:, -1].tolist() == [1] * 3
    assert tiny.encode_prompt().input_ids.tolist() == [rows[0]]
    assert tiny.encode_prompt("English caption:", max_length=3).input_ids.shape == (1, 3)


def test_an_unknown_piece_inside_a_sentence_is_not_padding(tiny_unk):
    ids, mask = tiny_unk.encode_for_embedding(["a 😀 dog", "a dog on the beach runs"])
    assert (ids[0] == 0).sum() > (mask[0] == 0).sum()  # `ids > 0` would be wrong
    last = mask.sum(1) - 1
    assert ids.gather(1, last[:, None]).flatten().tolist() == [2, 2]


def test_it_is_called_as_other_tokenizers_are(tiny):
    """As CLIP's, for ids; as those of transformers, for a mapping, in the published recipe too."""
    texts = ["a red panda", "two dogs run"]
    ids, mask = tiny.encode_for_embedding(texts)
    assert torch.equal(tiny(texts), ids)
    assert torch.equal(tiny("a red panda"), tiny.encode_for_embedding("a red panda").input_ids)
    mapping = tiny(texts, return_tensors="pt", padding=True, truncation=True)
    assert torch.equal(mapping["input_ids"], ids) and torch.equal(mapping.attention_mask, mask)
    recipe = {"return_tensors": "pt", "max_length": 80, "truncation": True, "padding": "max_length"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published = tiny([f"summarize:{text}" for text in texts], **recipe).input_ids
    assert torch.equal(published, tiny.encode_for_embedding(texts, 80, "max_length").input_ids)
    assert tiny(texts, max_length=4).shape == (2, 4)
    assert tiny("a dog " * 100, truncation=False).shape[1] > 80
    with pytest.raises(ValueError, match="not 'np'"):
        tiny(texts, return_tensors="np")
    with pytest.raises(TypeError, match="text 0 is a int"):
        tiny([3])


def test_decoding_writes_special_tokens_only_on_request(tiny):
    ids = tiny.encode_for_embedding(["a red panda", "a dog"], prefix="").input_ids
    assert tiny.batch_decode(ids) == ["a red panda", "a dog"]
    assert tiny.decode(ids[1], skip_special_tokens=False).startswith("<s> a dog</s>")
    assert tiny.decode([]) == ""
    for wrong in (-100, len(tiny)):
        with pytest.raises(ValueError, match=f"id {wrong} at position 1"):
            tiny.decode([1, wrong])


def test_mistakes_are_named(tiny, tiny_model, tmp_path):
    with pytest.raises(TypeError, match="text 1 is a int"):
        tiny.encode_for_embedding(["a", 3])
    with pytest.raises(TypeError, match="text 0 is a bytes"):
        tiny.encode_prompt([b"a"])
    with pytest.raises(ValueError, match="text 0 is not valid Unicode"):
        tiny.encode_for_embedding("lone \ud800 surrogate")
    with pytest.raises(ValueError, match="max_length 1 leaves no room for 2"):
        tiny.encode_for_embedding("a", max_length=1)
    with pytest.raises(ValueError, match="padding must be"):
        tiny.encode_for_embedding("a", padding="left")
    with pytest.raises(ValueError, match="needs a max_length of"):
        tiny.encode_for_embedding("a", max_length=None, padding="max_length")
    with pytest.raises(FileNotFoundError, match="no tokenizer model at .*absent.model"):
        InternVLTokenizer(tmp_path / "absent.model")
    for damaged in (b"", b"hello", tiny_model[:1000]):
        (tmp_path / "damaged.model").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged.model is no SentencePiece model"):
            InternVLTokenizer(tmp_path / "damaged.model")


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 5), model_prefix=str(tmp_path / "other"),
        vocab_size=20, pad_id=0, unk_id=3, bos_id=1, eos_id=2, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="it has unk 3, bos 1, eos 2"):
        InternVLTokenizer(tmp_path / "other.model")


def test_a_tokenizer_travels_to_worker_processes_and_disk(tiny, tmp_path):
    text = ["a red panda", "3.14"]
    copy = pickle.loads(pickle.dumps(tiny))
    tiny.save(tmp_path / "tokenizer.model")
    saved = InternVLTokenizer(str(tmp_path / "tokenizer.model"))
    assert copy.encode(text) == saved.encode(text) == tiny.encode(text)
    assert saved.model_bytes == tiny.model_bytes


def test_a_missing_sentencepiece_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        InternVLTokenizer(b"model")
