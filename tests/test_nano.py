"""The embedded model is as accurate as its report says, and its training does what it says."""

import hashlib
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from internvl_engine import InternVL_G, InternVLConfig, InternVLProcessor
from internvl_engine.assets import held_out, nano_directory

EXAMPLES = Path(__file__).parents[1] / "examples"
MAX_BYTES = 3_000_000
REQUIRED = 0.98


@pytest.fixture
def script(monkeypatch):
    """examples/train_nano.py as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_nano

    return train_nano


@pytest.fixture
def digits(script):
    """(training, held-out) samples, and the module that draws them."""
    pytest.importorskip("sklearn")
    return (*script.nano_digits.load(), script.nano_digits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_embedded_model_is_right_about_handwriting_it_never_saw(script, dtype):
    scores = script.evaluate(nano_directory(), dtype)
    assert len(scores) == 9
    required = {name: score for name, score in scores.items() if not name.startswith("text_to")}
    assert not {name: score for name, score in required.items() if score < REQUIRED}
    report = (nano_directory() / "README.md").read_text()
    rows = re.findall(r"\| (\w+) \| ([\d.]+)% \| ([\d.]+)% \|", report)
    reported = {name: float(shares[dtype == torch.bfloat16]) for name, *shares in rows}
    # Two pictures of 360, or one of 50 captions, may tip over on a machine with other kernels.
    for name, score in scores.items():
        slack = 2.01 if name.startswith("text_to") else 0.56
        assert 100 * score == pytest.approx(reported[name], abs=slack), name


def test_the_embedded_model_is_small():
    files = [path for path in nano_directory().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_the_embedded_model_is_its_preset():
    config = InternVLConfig.from_pretrained(nano_directory())
    preset = InternVLConfig.from_preset("nano")
    for ours, theirs in (
        (config.vision_config, preset.vision_config),
        (config.qllama_config, preset.qllama_config),
    ):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(ours, name) == getattr(theirs, name)
    assert config.num_query_token == preset.num_query_token
    processor = InternVLProcessor.from_pretrained(nano_directory())
    assert len(processor.tokenizer) == config.qllama_config.vocab_size
    assert processor.image_processor.size == config.image_size


def test_training_never_sees_what_is_held_out(digits):
    train, test, nano_digits = digits
    assert (len(train.grey), len(test.grey)) == (1437, 360)

    def hashes(samples):
        return {hashlib.sha256(grey.numpy().tobytes()).digest() for grey in samples.grey}

    assert not hashes(train) & hashes(test)
    tiles = nano_digits.draw_plainly(test, nano_digits.SIDE)
    images, _ = held_out()
    shipped = torch.stack(
        [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images]
    )
    # Another machine may round a bicubic weight the other way.
    assert (shipped.view_as(tiles).int() - tiles.int()).abs().max() <= 1
    again, part = nano_digits.load(validate=True)
    assert len(part.grey) == 360
    assert hashes(again) | hashes(part) == hashes(train)
    assert not hashes(again) & hashes(part)


def test_three_steps_of_training_lower_the_loss_and_repeat(digits, script):
    train, _, _ = digits
    model, processor = script.build(seed=3)

    def loss(model):
        pixels, batch = next(script.batches(train, processor.image_processor, 1, seed=9))
        with torch.no_grad():
            return script.total_loss(model, processor, pixels, batch, random.Random(9)).item()

    before = loss(model)
    first = script.train(model, processor, train, steps=3, seed=3)
    assert loss(model) < before
    untrained = script.build(seed=3)[0].query_tokens
    distance = (first.query_tokens - untrained).norm() / (model.query_tokens - untrained).norm()
    assert 0 < distance < 1
    second = script.train(script.build(seed=3)[0], processor, train, steps=3, seed=3)
    for (name, weight), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name


def test_the_one_pass_of_training_has_the_embeddings_of_inference(digits, script, monkeypatch):
    train, _, _ = digits
    model, processor = script.build(seed=0)
    pixels, batch = next(script.batches(train, processor.image_processor, 1, seed=0))
    seen = []
    monkeypatch.setattr(script, "contrast", lambda m, p, images, *rest: seen.extend(images) or 0.0)
    script.total_loss(model, processor, pixels, batch, random.Random(0))
    for embeds, mode in zip(seen, ("InternVL-C", "InternVL-G"), strict=True):
        expected = F.normalize(model.encode_image(pixels, mode), dim=1)
        torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)


def test_contrastive_targets_are_shared_by_all_that_match(script):
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, -1.0]])
    diagonal = torch.eye(2, dtype=torch.bool)
    plain = F.cross_entropy(logits[:, :2], torch.arange(2))
    plain_t = F.cross_entropy(logits[:, :2].T, torch.arange(2))
    loss = script.soft_contrastive_loss(logits[:, :2], diagonal)
    torch.testing.assert_close(loss, (plain + plain_t) / 2)
    # Both images show the first text; nobody shows the others, which are negatives only.
    match = torch.tensor([[True, False, False]] * 2)
    rows = -logits.log_softmax(1)[:, 0].mean()
    column = -logits[:, 0].log_softmax(0).mean()
    torch.testing.assert_close(script.soft_contrastive_loss(logits, match), (rows + column) / 2)


def test_only_answers_are_scored(digits, script):
    import nano_words

    train, _, _ = digits
    tokenizer = InternVLProcessor.from_pretrained(nano_directory()).tokenizer
    ids, mask, labels = nano_words.dialogue_tokens(tokenizer, train, random.Random(0))
    answers = {d.answer for d in nano_words.DIALOGUES}
    for row in range(len(ids)):
        words = {
            "colour": script.COLOURS[train.colour[row]],
            "digit": script.DIGITS[train.digit[row]],
        }
        scored = labels[row] != -100
        said = tokenizer.decode(labels[row][scored])
        assert said in {answer.format(**words) for answer in answers}
        assert labels[row][scored][-1] == tokenizer.eos_token_id
        prompt = tokenizer.decode(ids[row][(mask[row] == 1) & ~scored])
        assert any(
            prompt in d.prompts and said == d.answer.format(**words) for d in nano_words.DIALOGUES
        )


def test_the_vocabulary_has_the_published_control_pieces(script):
    tokenizer = script.train_tokenizer(256)
    assert len(tokenizer) == 256
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.training_pad_token_id == 255
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert pieces.id_to_piece(255) == "[PAD]"
    assert pieces.is_control(255)
    assert tokenizer.model_bytes == script.train_tokenizer(256).model_bytes
    text = "Question: what digit is it? Answer: [PAD] ~ 42"
    [ids] = tokenizer.encode(text)
    assert 0 not in ids
    assert 255 not in ids
    assert tokenizer.decode(ids) == text


def test_the_model_loads_strictly():
    model = InternVL_G.from_pretrained(nano_directory())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
