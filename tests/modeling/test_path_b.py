"""Path B on real handwriting: the projector learns, then LoRA with it, and nothing else moves.

The vision tower is the embedded model's, the language model a small LLaMA with random weights.
"""

import hashlib

import pytest
import torch
from assembled import FP32, language
from tiny_chat import tokenizer

from internvl_engine import InternVLProcessor, VisionLanguageModel, accelerate, freeze
from internvl_engine.assets import DIGITS, held_out, nano_directory

COUNT, PER_STEP = 40, 20
# Room for the answer, and a tile's tokens before it: 28 px in patches of 7, four to a token.
PROMPT = "<img>{context}</img>What is this?"


def hashes(built):
    """Of every parameter, by its name without what peft puts into it."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): hashlib.sha256(
            p.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, p in built.named_parameters()
    }


@pytest.fixture
def lesson():
    """A model of two parts, and held-out pictures with questions and answers for it."""
    built = VisionLanguageModel.from_parts(
        nano_directory(), language(hidden_size=64), tokenizer=tokenizer(added=False), **FP32
    )
    images, pairs = held_out()
    processor = InternVLProcessor.from_pretrained(nano_directory())
    words = built.tokenizer
    prompt = words(PROMPT.format(context="<IMG_CONTEXT>" * built.num_image_token))["input_ids"]
    answers = [words.convert_tokens_to_ids(str(DIGITS.index(d))) for _, d in pairs[:COUNT]]
    ids = torch.tensor([[*prompt, answer] for answer in answers])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    pixels = processor(images[:COUNT])["pixel_values"]
    return built, {"pixel_values": pixels, "input_ids": ids, "labels": labels}


def train(built, batch, steps):
    """AdamW over what trains; the loss of all pictures before and after."""
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=3e-3)
    losses = [loss_of(built, batch)]
    for step in range(steps):
        start = step * PER_STEP % COUNT
        part = {name: tensor[start : start + PER_STEP] for name, tensor in batch.items()}
        optimizer.zero_grad()
        built(**part).loss.backward()
        optimizer.step()
    return [*losses, loss_of(built, batch)]


@torch.no_grad()
def loss_of(built, batch):
    mode = built.training
    loss = built.eval()(**batch).loss.item()
    built.train(mode)
    return loss


def moved(before, after):
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("mode", [None, "inference", "training"])
def test_the_projector_trains_then_lora_and_what_is_frozen_stays_to_the_bit(lesson, mode):
    pytest.importorskip("peft")
    built, batch = lesson
    if mode is not None:
        accelerate(built, mode)
    whole = hashes(built)
    projector = {name for name in whole if name.startswith("mlp1.")}
    built.train()
    freeze(built)
    first, second = train(built, batch, 10)
    assert second < 0.8 * first
    assert moved(whole, hashes(built)) == projector

    built.wrap_backbone_lora(r=4)
    built.wrap_llm_lora(r=4)
    freeze(built)
    assert loss_of(built, batch) == pytest.approx(second, rel=1e-4)  # adapters begin as nothing
    before = hashes(built)
    assert moved(whole, before) == projector
    built.train()
    second, third = train(built, batch, 10)
    assert third < 0.9 * second
    lora = {name for name in before if ".lora_" in name}
    assert moved(before, hashes(built)) == projector | lora


def test_other_parts_train_where_they_are_asked_to(lesson):
    built, batch = lesson
    before = hashes(built)
    freeze(built, projector=True, last_vision_layers=1, lm_head=True)
    first, second = train(built, batch, 4)
    assert second < first
    assert {name.rpartition(".layers.")[0] or name for name in moved(before, hashes(built))} == {
        "vision_model.encoder", "language_model.lm_head.weight",
    }  # fmt: skip


def test_a_trained_model_comes_back(lesson, tmp_path):
    built, batch = lesson
    freeze(built)
    train(built, batch, 3)
    built.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path, **FP32)
    assert hashes(loaded) == hashes(built)
    assert loss_of(loaded, batch) == loss_of(built, batch)
    alone = VisionLanguageModel.from_parts(
        nano_directory(), language(hidden_size=64), projector=tmp_path, **FP32
    )
    assert {n: h for n, h in hashes(alone).items() if n.startswith("mlp1.")} == {
        n: h for n, h in hashes(built).items() if n.startswith("mlp1.")
    }


@pytest.mark.parametrize("method", ["gradient", "activation"])  # the older name, the newer one
def test_recomputed_layers_have_the_same_gradients(lesson, method):
    pytest.importorskip("peft")
    built, batch = lesson
    enable = getattr(built, f"{method}_checkpointing_enable", None)
    if enable is None:
        pytest.skip("this transformers has the older name only")
    built.wrap_llm_lora(r=4, lora_dropout=0.0)
    freeze(built)
    built.train()
    built.vision_model.encoder.gradient_checkpointing = False
    runs = []
    layer = built.language_model.get_base_model().model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        built.zero_grad()
        runs.clear()
        built(**batch).loss.backward()
        grads = {n: p.grad.clone() for n, p in built.named_parameters() if p.grad is not None}
        return grads, len(runs)

    expected, once = gradients()
    enable()
    found, twice = gradients()
    assert (once, twice) == (1, 2)
    assert (
        found.keys()
        == expected.keys()
        == {n for n, p in built.named_parameters() if p.requires_grad}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
