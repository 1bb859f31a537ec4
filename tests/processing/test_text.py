"""Token ids: SentencePiece's own under the published rules, with padding that is checked."""

import pickle
import random
import subprocess
import sys

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_engine.processing import (
    InternVLTokenizer,
    check_right_padded,
    clean_caption,
    encode_for_training,
    last_token_index,
    mask_from_ids,
    repad_left,
)

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
    if texts:
        assert torch.equal(check_right_padded(*batch, eos_token_id=2), batch.attention_mask)
        assert torch.equal(mask_from_ids(batch.input_ids), batch.attention_mask)


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


@pytest.mark.golden
def test_published_training_samples(published, golden_text):
    for sample in golden_text["samples"]:
        batch = encode_for_training(published, [sample["pos"]], [sample["neg"]])
        assert set(batch) == set(sample) - {"pos", "neg"}
        for name, values in batch.items():
            assert values.tolist() == sample[name], name


@pytest.mark.golden
def test_published_caption_cleaning(golden_text):
    for case in golden_text["clean_caption"]:
        assert clean_caption(case["in"]) == case["out"]


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
    assert last_token_index(mask).tolist() == [ids.shape[1] - 1] * 3
    assert tiny.encode_prompt().input_ids.tolist() == [rows[0]]
    assert tiny.encode_prompt("English caption:", max_length=3).input_ids.shape == (1, 3)


def test_right_padded_prompts_are_padded_left_again(tiny):
    prompts = ["English caption:", "a dog", "two  spaces and 3.14"]
    right = [[1, *library(tiny).encode(p)] for p in prompts]
    length = max(map(len, right))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in right])
    left = tiny.encode_prompt(prompts)
    for got, want in zip(repad_left(ids, mask_from_ids(ids)), left, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(repad_left(*left), left, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="same shape"):
        repad_left(ids, mask_from_ids(ids)[:, 1:])


def test_an_unknown_piece_inside_a_sentence_is_not_padding(tiny_unk):
    ids, mask = tiny_unk.encode_for_embedding(["a 😀 dog", "a dog on the beach runs"])
    assert (ids[0] == 0).sum() > (mask[0] == 0).sum()  # `ids > 0` would be wrong
    last = last_token_index(mask)
    assert ids.gather(1, last[:, None]).flatten().tolist() == [2, 2]
    assert last[0] != (ids[0] > 0).sum() - 1
    assert torch.equal(mask_from_ids(ids), mask)
    assert torch.equal(check_right_padded(ids, None, 2), mask)


RIGHT = torch.tensor([[1, 7, 8, 2, 0], [1, 7, 8, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        (RIGHT.flip(1), MASK.flip(1), "row 0 has padding before a real token"),
        (RIGHT.roll(1, 1), None, "row 0 has padding before a real token"),
        (RIGHT, torch.ones_like(RIGHT), "row 0 ends in id 0 at position 4"),
        (RIGHT, torch.tensor([[1, 0, 1, 1, 0], [1] * 5]), "row 0 has padding before"),
        (RIGHT, torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), "row 0 ends in id 8 at position 2"),
        (RIGHT[:, :4], None, "row 1 ends in id 9 at position 3"),
        (RIGHT, torch.tensor([[1] * 5, [0] * 5]), "row 1 of the attention mask has no real"),
        (torch.zeros_like(RIGHT), None, "row 0 of the attention mask has no real"),
        (RIGHT, MASK[:, :4], r"input_ids are \(2, 5\), attention_mask \(2, 4\)"),
        (RIGHT, MASK * 2, "only 0 and 1"),
        (RIGHT[0], None, r"needs a batch of rows \(B, L\), got shape \(5,\)"),
        (torch.zeros(2, 0, dtype=torch.long), None, "row 0 of the attention mask has no real"),
    ],
)
def test_wrongly_padded_batches_are_refused(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        check_right_padded(ids, mask, 2)


def test_right_padded_batches_pass():
    assert torch.equal(check_right_padded(RIGHT, MASK.bool(), 2), MASK)
    assert torch.equal(check_right_padded(RIGHT), MASK)
    assert check_right_padded(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3)
    assert last_token_index(torch.tensor([[0, 0, 1], [1, 0, 0]])).tolist() == [2, 0]


def test_training_labels_and_padding(tiny):
    pieces = library(tiny)
    prompt = [1, *pieces.encode("English caption:")]
    captions, negatives = ["A Dog!", "two  dogs, " * 60], ["cat", ""]
    batch = encode_for_training(tiny, captions, negatives, max_length=40)
    fixed = encode_for_training(tiny, captions, negatives, max_length=40, labels="fixed")
    assert tiny.training_pad_token_id == pieces.piece_to_id("[PAD]") > 0
    row = prompt + pieces.encode("a dog") + [2]
    assert batch["input_ids"][0].tolist() == row + [tiny.training_pad_token_id] * (40 - len(row))
    assert batch["attention_mask"][0].sum() == len(row)
    scored = row[len(prompt) - 1 :]
    assert batch["labels"][0].tolist() == (
        [-100] * (len(prompt) - 1) + scored + [-100] * (40 - len(row))
    )
    assert fixed["labels"][0].tolist() == (
        [-100] * len(prompt) + scored[1:] + [-100] * (40 - len(row))
    )
    assert batch["input_ids"][1, -1] == 2 and batch["attention_mask"][1].all()  # cut, with its end
    assert batch["negative_input_ids"][1, :2].tolist() == [1, 2]
    assert batch["summarize_attention_mask"][0].sum() == len(expected_row(pieces, "a dog"))
    raw = encode_for_training(tiny, ["A Dog!"], ["x"], max_length=40, clean=False)
    assert raw["positive_input_ids"][0, :-1].tolist()[1:8] == (pieces.encode("A Dog!") + [2] + [
        tiny.training_pad_token_id] * 40)[:7]  # fmt: skip


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
    with pytest.raises(ValueError, match="2 captions but 1 negatives"):
        encode_for_training(tiny, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no room after the prompt"):
        encode_for_training(tiny, ["a"], ["b"], max_length=3)
    with pytest.raises(TypeError, match="got one string"):
        encode_for_training(tiny, "a", "b")
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


def test_a_missing_sentencepiece_says_so(tmp_path):
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from internvl_engine.processing.text import InternVLTokenizer\n"
        "try: InternVLTokenizer(b'model')\n"
        "except ImportError as error: sys.stdout.write(str(error))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "pip install sentencepiece" in out.stdout, out.stderr
