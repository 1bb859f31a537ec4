"""The texts of captioned images as ids, masks and labels of the published losses."""

import pytest
import sentencepiece

from internvl_engine.train import clean_caption, encode_for_training


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


def test_training_labels_and_padding(tiny):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny.model_bytes)
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
    assert batch["summarize_attention_mask"][0].sum() == 2 + len(pieces.encode("summarize:a dog"))
    raw = encode_for_training(tiny, ["A Dog!"], ["x"], max_length=40, clean=False)
    assert raw["positive_input_ids"][0, :-1].tolist()[1:8] == (pieces.encode("A Dog!") + [2] + [
        tiny.training_pad_token_id] * 40)[:7]  # fmt: skip


def test_mistakes_are_named(tiny):
    with pytest.raises(ValueError, match="2 captions but 1 negatives"):
        encode_for_training(tiny, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no room after the prompt"):
        encode_for_training(tiny, ["a"], ["b"], max_length=3)
    with pytest.raises(TypeError, match="got one string"):
        encode_for_training(tiny, "a", "b")
