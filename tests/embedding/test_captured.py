"""Captured passes: recordings here, graphs on a GPU; equal to the pass, never of old weights."""

import copy
import threading

import pytest
import torch
from tiny_engine import pictures, tiny_engine

from internvl_engine import InternVL, kernels
from internvl_engine.assets import held_out
from internvl_engine.capture import Captured, record
from internvl_engine.embedding import captured as module
from internvl_engine.embedding.captured import CapturedEncode, bucket, embed_pixels

MODES = ["c", "g", "both"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["eager", "accelerated"])
def engine(request):
    """An engine whose passes are captured on the CPU too."""
    if request.param == "accelerated":
        made = InternVL.nano()
    else:
        made = copy.deepcopy(tiny_engine())
    made.captured = CapturedEncode(made.model, replay=True)
    return made


def captures(engine) -> int:
    return sum(len(captured) for captured in engine.captured.captures.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_is_a_function_of_its_pixels(engine, mode):
    """Recorded once, it gives what the model gives for other pixels: nothing was baked in."""
    first, second = torch.randn(2, 3, 3, 28, 28)
    replay, found = record(lambda pixels: embed_pixels(engine.model, mode, pixels), first)
    for pixels in (second, first):
        expected = embed_pixels(engine.model, mode, pixels)
        assert torch.equal(replay(pixels), expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_are_captured_the_second_time(engine, mode):
    images = pictures(9)
    plain = copy.copy(engine)  # does not capture on a CPU
    expected = plain.encode_image(images, mode, batch_size=4)
    for seen in (0, 1, 1):
        found = engine.encode_image(images, mode, batch_size=4)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
        assert captures(engine) == seen + 1  # fours the first time, the single one the second


def test_results_are_nobody_elses_memory(engine):
    """A graph writes its results where it wrote those of the run before."""
    pixels, other = torch.randn(2, 2, 3, 28, 28)
    expected = embed_pixels(engine.model, "both", pixels)
    engine.captured(pixels, "both")
    run, buffer = engine.captured.captures["both"].function, torch.empty_like(expected)
    fake = Captured(lambda pixels: buffer.copy_(run(pixels)))
    engine.captured.captures["both"] = fake
    found = engine.captured(pixels, "both")
    engine.captured(other, "both")
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_numbers_of_images_share_buckets(engine):
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 25, 33, 49, 64)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 16, 24, 32, 48, 64, 64
    ]  # fmt: skip
    assert all(n <= bucket(n) <= n * 1.5 for n in range(1, 300))
    pixels = torch.randn(6, 3, 28, 28)
    expected = engine.encode_image(pixel_values=pixels, mode="both")
    for count in (5, 6, 5):
        found = engine.encode_image(pixel_values=pixels[:count], mode="both")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[:count], atol=2e-6, rtol=0)
    assert captures(engine) == 1


def scale(model):
    model.clip_projector.norm1_q.weight.data = 2 * model.clip_projector.norm1_q.weight.data


def replace(model):
    weight = model.vision_model.encoder.layers[0].attn.proj.weight
    model.vision_model.encoder.layers[0].attn.proj.weight = torch.nn.Parameter(3 * weight.detach())


def adapt(model):
    model.wrap_backbone_lora(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)


def in_place(model):
    model.clip_projector.norm1_q.weight.data.mul_(2)


@pytest.mark.parametrize("change", [scale, replace, adapt, in_place])
def test_other_weights_are_seen(change):
    engine = copy.deepcopy(tiny_engine())
    engine.captured = CapturedEncode(engine.model, replay=True)
    pixels = torch.randn(2, 3, 28, 28)
    before = [engine.encode_image(pixel_values=pixels) for _ in range(3)][-1]
    change(engine.model)
    expected = copy.copy(engine).encode_image(pixel_values=pixels)
    assert (expected - before).abs().max() > 1e-3
    for _ in range(3):
        assert torch.equal(engine.encode_image(pixel_values=pixels), expected)


def test_adapters_are_switched_between_captures():
    engine = copy.deepcopy(tiny_engine())
    adapt(engine.model)
    for each in engine.model.modules():  # peft looks on, for gradients: then nothing is captured
        each._forward_hooks.clear()
    engine.captured = CapturedEncode(engine.model, replay=True)
    pixels = torch.randn(2, 3, 28, 28)
    plain = copy.copy(engine)
    for _ in range(3):
        assert torch.equal(engine.encode_image(pixel_values=pixels),
                           plain.encode_image(pixel_values=pixels))  # fmt: skip
    assert captures(engine) == 1
    with engine.model.vision_model.disable_adapter():
        for _ in range(3):
            assert torch.equal(engine.encode_image(pixel_values=pixels),
                               plain.encode_image(pixel_values=pixels))  # fmt: skip


def test_tables_that_grew_are_seen(engine):
    pixels = torch.randn(2, 3, 28, 28)
    expected = [engine.captured(pixels, "g") for _ in range(3)][-1]
    rotary = engine.model.qllama.model.rotary_emb
    rotary.table(10 * rotary.max_position_embeddings, torch.float32, torch.device("cpu"))
    (before,) = engine.captured.captures["g"]._captures.values()
    engine.captured(pixels, "g")
    (after,) = engine.captured.captures["g"]._captures.values()
    assert after is not before
    assert torch.equal(engine.captured(pixels, "g"), expected)


def test_who_looks_on_sees_every_pass(engine):
    pixels, seen = torch.randn(2, 3, 28, 28), []
    for _ in range(3):
        engine.captured(pixels, "g")
    hook = engine.model.vision_model.register_forward_hook(lambda *args: seen.append(0))
    for _ in range(3):
        engine.captured(pixels, "g")
    assert len(seen) == 3
    hook.remove()


def test_backends_and_invariance_are_captured_apart():
    engine = InternVL.nano()
    engine.captured = CapturedEncode(engine.model, replay=True)
    plain = copy.copy(engine)
    images, _ = held_out()
    engine.encode_image(images[:4]), engine.encode_image(images[:4])
    with kernels.batch_invariant():
        apart = torch.cat([plain.encode_image(image) for image in images[:4]])
        for _ in range(3):
            assert torch.equal(engine.encode_image(images[:4]), apart)
    with kernels.prefer("*", "reference"):
        expected = plain.encode_image(images[:4])
        for _ in range(3):
            assert torch.equal(engine.encode_image(images[:4]), expected)


def test_captures_and_what_was_seen_are_bounded(engine, monkeypatch):
    monkeypatch.setattr(module, "SEEN", 2)
    pixels = torch.randn(9, 3, 28, 28)
    for count in (1, 2, 3, 4, 6, 8):
        engine.captured(pixels[:count], "c")
    assert len(engine.captured.seen) == 2
    engine.captured(pixels[:8], "c")
    assert captures(engine) == 1
    engine.captured.clear()
    assert captures(engine) == 0 and not engine.captured.seen


def test_copies_have_captures_of_their_own(engine):
    other = copy.deepcopy(engine)
    assert other.captured.model is other.model is not engine.model
    assert copy.copy(engine).captured is not engine.captured


def test_threads_take_turns(engine):
    images, wrong = pictures(6), []
    expected = [copy.copy(engine).encode_image(images[i:], "both", batch_size=2) for i in range(4)]

    def run(start):
        for _ in range(4):
            found = engine.encode_image(images[start:], "both", batch_size=2)
            for one, other in zip(found, expected[start], strict=True):
                if not torch.allclose(one, other, atol=2e-6):
                    wrong.append(start)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and captures(engine) > 0


@pytest.mark.gpu
def test_graphs_on_a_gpu():
    engine = InternVL.nano(device="cuda")
    images, _ = held_out()
    for mode in ("c", "g"):
        expected = InternVL.nano(device="cpu").encode_image(images[:50], mode)
        for _ in range(3):
            found = engine.encode_image(images[:50], mode, batch_size=16)
            torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)
    assert captures(engine) >= 2
