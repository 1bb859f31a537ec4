"""Batches as large as memory allows, and smaller where it turns out not to."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_engine import pictures, tiny_engine

from internvl_engine.configuration import InternVLConfig
from internvl_engine.embedding import batch_size as module
from internvl_engine.embedding.batch_size import (
    BatchSize,
    batch_size_of,
    bytes_per_image,
    is_out_of_memory,
)
from internvl_engine.embedding.passes import within_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 70368744177664 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]  # fmt: skip


@pytest.fixture
def small_device(monkeypatch):
    """An engine whose device holds the passes of so many images at a time; records their sizes."""

    def make(room, error):
        engine, sizes = tiny_engine(), []
        vision = engine.model.vision_model.forward

        def forward(pixel_values, **options):
            sizes.append(len(pixel_values))
            if len(pixel_values) > room:
                raise error
            return vision(pixel_values=pixel_values, **options)

        monkeypatch.setattr(engine.model.vision_model, "forward", forward)
        return engine, sizes

    return make


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_does_not_fit_is_halved_for_the_rest_of_the_call(small_device, error):
    images = pictures(30)
    expected = tiny_engine().encode_image(images, "both")
    engine, sizes = small_device(3, error)
    seen = []
    found = engine.encode_image(images, "both", batch_size=8, progress=seen.append)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2 and sum(seen) == 30
    assert sizes.count(8) == sizes.count(4) == 1
    sizes.clear()
    outcomes = list(engine.each_image([*images[:9], b"", *images[9:]], batch_size=8))
    assert [outcome.number for outcome in outcomes] == list(range(31))
    assert [outcome.error is None for outcome in outcomes].count(False) == 1
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2  # another call begins anew


def test_one_image_that_does_not_fit_is_the_callers(small_device):
    engine, sizes = small_device(0, ERRORS[0])
    with pytest.raises(torch.OutOfMemoryError):
        engine.encode_image(pictures(5), batch_size=4)
    assert sizes == [4, 2, 1]


def test_other_errors_are_not_tried_again(small_device):
    engine, sizes = small_device(3, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        engine.encode_image(pictures(5), batch_size=4)
    assert sizes == [4]
    assert not is_out_of_memory(ValueError("not enough memory")) and is_out_of_memory(ERRORS[1])


def test_what_is_kept_for_speed_goes_before_a_smaller_try():
    told, limit = [], BatchSize(4)

    def embed(pixels):
        told.append(len(pixels))
        if len(pixels) > 2:
            raise MemoryError
        return pixels[None]

    pixels = torch.arange(5.0)
    found = within_memory(embed, pixels, limit, lambda: told.append("released"))
    assert torch.equal(found, pixels[None]) and limit.size == 2
    assert told == [4, "released", 2, 2, 1]


@pytest.fixture
def free(monkeypatch):
    """Sets what is free on every device."""
    found = {}
    monkeypatch.setattr(module, "free_memory", lambda device: found["bytes"])
    return lambda gigabytes: found.update(bytes=int(gigabytes * 2**30))


def model_14b():
    return SimpleNamespace(config=InternVLConfig(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "device, gigabytes, size", [(GPU, 100, 64), (GPU, 1, 16), (GPU, 0.001, 1), (CPU, 100, 32)]
)
def test_the_size_follows_from_free_memory(free, device, gigabytes, size):
    free(gigabytes)
    assert batch_size_of(None, model_14b(), device, 224).size == size
    assert batch_size_of(7, model_14b(), device, 224).size == 7


def test_a_pass_is_measured_by_its_largest_moment():
    """At 224 pixels the stream, products and scores of 257 tokens; at 448 those of 1,025."""
    model = model_14b()
    small, large = bytes_per_image(model, 224), bytes_per_image(model, 448)
    assert 15e6 < small < 60e6 and 4 * small < large < 16 * small
    model.dtype = torch.float32
    assert bytes_per_image(model, 224) == 2 * small


def test_no_size_is_the_default(free):
    free(100)
    engine, images, seen = tiny_engine(), pictures(1) * 70, []
    engine.encode_image(images, progress=seen.append)
    assert seen == [32, 32, 6]
    pixels = engine.processor.image_processor(images[:3])
    free(0)
    engine.encode_image(pixel_values=pixels, progress=seen.append)
    assert seen[3:] == [1, 1, 1]
    assert len(list(engine.each_image(images[:3]))) == 3
    assert len(engine.classify(images[:3], np.array(["a", "b"]))) == 3


def test_free_memory_is_that_of_the_device(monkeypatch):
    assert 0 < module.free_memory(CPU) < 2**50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert module.free_memory(GPU) == 1100  # what PyTorch holds and does not use counts too
