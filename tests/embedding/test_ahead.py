"""Images decoded ahead of the model: in order, lazily, within bounds, and no longer than wanted."""

import gc
import threading
import time

import pytest
import torch
from tiny_engine import pictures, tiny_engine

from internvl_engine.embedding.ahead import map_ahead, num_threads
from internvl_engine.embedding.batch_size import BatchSize
from internvl_engine.embedding.batches import image_batches


def image_threads() -> int:
    return sum(thread.name.startswith("images") for thread in threading.enumerate())


def test_results_keep_the_order_of_the_items():
    def slow_first(number, item):
        time.sleep(0.02 if number % 5 == 0 else 0)
        return number, item

    found = list(map_ahead(slow_first, iter("abcdefghijklm"), lambda: 4, 3))
    assert found == list(enumerate("abcdefghijklm"))
    assert list(map_ahead(slow_first, iter(()), lambda: 4, 3)) == []
    assert image_threads() == 0


def test_an_endless_iterator_is_read_no_further_than_the_bound():
    read, running, most = [], [0], [0]
    lock = threading.Lock()

    def endless():
        number = 0
        while True:
            read.append(threading.current_thread())
            yield number
            number += 1

    def work(number, item):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.001)
        with lock:
            running[0] -= 1
        return item

    results = map_ahead(work, endless(), lambda: 6, 3)
    assert not read  # nothing before the first result is asked for
    for taken in range(1, 20):
        assert next(results) == taken - 1
        assert len(read) <= taken + 6
    assert set(read) == {threading.current_thread()} and 1 < most[0] <= 3
    results.close()
    assert image_threads() == 0 and running[0] == 0 and len(read) <= 25


def test_what_goes_wrong_comes_in_its_place():
    def work(number, item):
        if item == "bad":
            raise ValueError("bad item")
        return item

    results = map_ahead(work, iter(["a", "b", "bad", "c"]), lambda: 8, 2)
    assert [next(results), next(results)] == ["a", "b"]
    with pytest.raises(ValueError, match="bad item"):
        next(results)
    assert image_threads() == 0

    def broken():
        yield "a"
        yield "b"
        raise OSError("the disk is gone")

    results = map_ahead(work, broken(), lambda: 8, 2)
    assert [next(results), next(results)] == ["a", "b"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_a_bound_that_shrinks_is_kept():
    read, bound = [], [5]
    items = (read.append(n) or n for n in range(100))
    results = map_ahead(lambda number, item: item, items, lambda: bound[0], 2)
    next(results)
    bound[0] = 1
    for _ in range(2, 12):
        next(results)
    assert len(read) <= 12 + 1


def test_a_batch_that_shrinks_loses_nothing():
    processor, images, limit = tiny_engine().processor.image_processor, pictures(11), BatchSize(4)
    sizes, pixels = [], []
    for batch in image_batches(processor, images, limit, torch.float32):
        sizes.append(len(batch.numbers))
        pixels.append(batch.pixels)
        limit.size = 3 if len(sizes) == 1 else 2
    assert sizes == [4, 3, 2, 2]
    assert torch.equal(torch.cat(pixels), processor(images))


@pytest.mark.parametrize("end", ["stopped", "failed", "forgotten"])
def test_nothing_runs_on_when_the_consumer_stops(end):
    engine, read = tiny_engine(), []
    images = pictures(3)

    def endless():
        while True:
            read.append(0)
            yield images[len(read) % 3]

    outcomes = engine.each_image(endless(), batch_size=2)
    assert next(outcomes).number == 0
    if end == "stopped":
        outcomes.close()
    elif end == "failed":
        with pytest.raises(RuntimeError):
            outcomes.throw(RuntimeError("enough"))
    else:
        del outcomes
        gc.collect()
    assert image_threads() == 0 and len(read) <= 6


def test_an_error_leaves_no_thread_behind():
    engine = tiny_engine()
    with pytest.raises(ValueError, match="image 5: ") as caught:
        engine.encode_image([*pictures(5), b"no image", *pictures(50)], batch_size=2)
    assert caught and image_threads() == 0  # also while the error is held


def test_images_before_a_broken_stream_are_there():
    engine, images = tiny_engine(), pictures(3)

    def stream():
        yield from images
        raise OSError("the connection is gone")

    outcomes = engine.each_image(stream(), batch_size=1)
    found = [next(outcomes) for _ in range(3)]
    assert [outcome.number for outcome in found] == [0, 1, 2]
    with pytest.raises(OSError, match="the connection is gone"):
        next(outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_processors_to_the_bit(dtype):
    processor, images = tiny_engine().processor.image_processor, pictures(7)
    batches = image_batches(processor, images, 3, dtype)
    found = torch.cat([batch.pixels for batch in batches])
    assert torch.equal(found, processor(images, dtype=dtype)) and found.dtype == dtype


def test_decoding_uses_the_processors_that_are_allowed(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(3)), raising=False)
    assert num_threads() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(90)), raising=False)
    assert num_threads() == 8
