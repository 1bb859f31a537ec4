"""The embedder in company: other defaults, threads, processes, training, and NaN."""

import multiprocessing
import pickle
import threading

import pytest
import torch
from tiny_engine import pictures, tiny_engine
from torch import nn

from internvl_engine import InternVL, kernels
from internvl_engine.assets import held_out

IMAGES = pictures(5)
TEXTS = ["a red panda", "two dogs", "a"]
LABELS = ["cat", "dog"]


def everything(engine):
    """A value of every method of an engine."""
    c, g = engine.encode_image(IMAGES[:3], "both")
    labels = engine.classify(IMAGES[:2], LABELS)
    return [c, g, engine.encode_text(TEXTS), labels, engine.caption(IMAGES[:2], max_new_tokens=4)]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("accelerate", [True, False])
def test_the_default_dtype_counts_for_nothing(dtype, accelerate):
    engine = InternVL.nano(accelerate=accelerate)
    expected = everything(engine)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        engine.remembered.clear()
        assert_same(everything(engine), expected)
    finally:
        torch.set_default_dtype(default)


def test_the_default_device_counts_for_nothing():
    engine = tiny_engine()
    expected = everything(engine)
    engine.remembered.clear()
    with torch.device("meta"):
        assert_same(everything(engine), expected)


def test_embeddings_are_ordinary_tensors():
    """Made under inference mode, and yet good for a linear probe."""
    engine = tiny_engine()
    (outcome,) = engine.each_image(IMAGES[0])
    for found in (engine.encode_image(IMAGES), engine.encode_text(TEXTS), outcome.value[None]):
        assert not found.is_inference() and not found.requires_grad
        probe = nn.Linear(found.shape[1], 2)
        probe(found).sum().backward()
        assert probe.weight.grad is not None
        found.add_(1)


@pytest.mark.parametrize("accelerate", [True, False])
def test_the_model_trains_after_the_engine_used_it(accelerate):
    engine = InternVL.nano(accelerate=accelerate)
    images, _ = held_out()
    engine.encode_image(images[:2], "g"), engine.caption(images[:1]), engine.encode_text("a")
    pixels = engine.processor.image_processor(images[:2])
    model = engine.model.train()
    model.encode_image(pixels, "InternVL-G").sum().backward()
    assert model.query_tokens.grad is not None
    model.eval()
    assert model.encode_image(pixels, "InternVL-G").requires_grad


def test_pixel_values_are_taken_as_they_are():
    engine = tiny_engine()
    pixels = engine.processor.image_processor(IMAGES)
    expected = engine.encode_image(IMAGES, "both", batch_size=2)
    found = engine.encode_image(mode="both", pixel_values=pixels, batch_size=2)
    assert torch.equal(found.c, expected.c) and torch.equal(found.g, expected.g)
    assert engine.encode_image(pixel_values=pixels[:0]).shape == (0, 48)
    with pytest.raises(ValueError, match="pass values that are normalised as pixel_values="):
        engine.encode_image(pixels)
    with pytest.raises(ValueError, match="either images or pixel_values"):
        engine.encode_image(IMAGES, pixel_values=pixels)
    with pytest.raises(ValueError, match=r"normalised values \(B, 3, 28, 28\), got torch.uint8"):
        engine.encode_image(pixel_values=pixels.byte())


def test_the_model_takes_pictures_of_another_dtype():
    model = InternVL.nano(dtype="bfloat16").model
    pixels = torch.randn(2, 3, 28, 28)
    for mode in ("InternVL-C", "InternVL-G"):
        assert torch.equal(model.encode_image(pixels, mode), model.encode_image(pixels.bfloat16(),
                                                                                mode))  # fmt: skip


@pytest.fixture
def spoiled(monkeypatch):
    """An engine whose vision tower gives NaN for a white picture."""
    engine = tiny_engine()
    vision = engine.model.vision_model.forward

    def forward(pixel_values, **options):
        output = vision(pixel_values=pixel_values, **options)
        white = (pixel_values > 2).flatten(1).all(1)
        states = torch.where(white[:, None, None], torch.nan, output[0])
        output.last_hidden_state = states
        return output

    monkeypatch.setattr(engine.model.vision_model, "forward", forward)
    return engine


def test_what_is_not_finite_is_named(spoiled):
    images = [*IMAGES[:3], 0 * IMAGES[0] + 255, IMAGES[4]]
    for call in (
        lambda: spoiled.encode_image(images, batch_size=2),
        lambda: spoiled.encode_image(images, "both"),
        lambda: spoiled.classify(images, LABELS),
    ):
        with pytest.raises(ValueError, match="image 3: .* tiny-0 gives is not finite"):
            call()
    outcomes = list(spoiled.each_image(images, batch_size=2))
    assert [outcome.number for outcome in outcomes] == list(range(5))
    assert [outcome.error is None for outcome in outcomes] == [True, True, True, False, True]
    assert outcomes[3].value is None and "not finite" in str(outcomes[3].error)
    sound = [row for n, row, _ in outcomes if n != 3]
    expected = tiny_engine().encode_image([images[i] for i in (0, 1, 2, 4)])
    torch.testing.assert_close(torch.stack(sound), expected, atol=2e-6, rtol=0)


def test_texts_that_are_not_finite_are_named(monkeypatch):
    engine = tiny_engine()
    monkeypatch.setattr(engine.model.text_projection, "data",
                        torch.full_like(engine.model.text_projection, torch.inf))  # fmt: skip
    with pytest.raises(ValueError, match="text 0, 'a red panda': .*not finite"):
        engine.encode_text(TEXTS)


def test_each_image_in_both_modes():
    engine = tiny_engine()
    c, g = engine.encode_image(IMAGES, "both", batch_size=2)
    outcomes = list(engine.each_image([*IMAGES[:2], b"", *IMAGES[2:]], "both", batch_size=2))
    assert "image 2: " in str(outcomes.pop(2).error)
    torch.testing.assert_close(torch.stack([o.value.c for o in outcomes]), c, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.stack([o.value.g for o in outcomes]), g, atol=2e-6, rtol=0)


def test_threads_share_an_engine():
    engine, wrong = tiny_engine(), []
    expected = everything(engine)

    def run():
        try:
            for _ in range(3):
                assert_same(everything(engine), expected)
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_goes_to_other_processes(dtype):
    """As a started process gets it, without starting one: files of weights cannot be passed."""
    engine = InternVL.nano(dtype=dtype)
    images, _ = held_out()
    engine.classify(images[:2], LABELS)
    content = multiprocessing.reduction.ForkingPickler.dumps(engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", None)
        received = pickle.loads(content)
    assert torch.equal(received.encode_image(images[:5]), engine.encode_image(images[:5]))
    assert received.fingerprint == engine.fingerprint and received.report is not None
    received.report.undo()
    torch.testing.assert_close(received.encode_image(images[:5]), engine.encode_image(images[:5]),
                               atol=2e-5 if dtype == "float32" else 2e-2, rtol=0)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_batch_counts_for_nothing_where_that_is_asked(dtype):
    """The embedder groups texts by length, and images by the batch size."""
    engine = InternVL.nano(dtype=dtype)
    images, _ = held_out()
    texts = ["a red three", "b", "a green seven that is long and longer still", "c d"]
    with kernels.batch_invariant():
        for mode in ("c", "g"):
            apart = torch.cat([engine.encode_image(image, mode) for image in images[:9]])
            assert torch.equal(engine.encode_image(images[:9], mode), apart)
        apart = torch.cat([engine.encode_text(text) for text in texts])
        assert torch.equal(engine.encode_text(texts), apart)
