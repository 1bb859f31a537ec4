"""ImageNet-21k under 80 templates: work that grows with the prompts, memory with the labels."""

import time
import tracemalloc

import pytest
import torch
from tiny_engine import tiny_engine

from internvl_engine.embedding import texts
from internvl_engine.tasks import classifier as module
from internvl_engine.tasks.classifier import CHUNK, classifier

WIDTH = 48
TEMPLATES = [f"template {number} of a {{}}." for number in range(80)]


@pytest.fixture
def engine(monkeypatch):
    """One whose text tower costs nothing: a prompt's embedding is made of its length."""
    made = tiny_engine()
    made.asked, made.remembered = [], {}
    table = torch.nn.functional.normalize(torch.randn(100, WIDTH), dim=1)

    def encode(prompts):
        made.asked.append(len(prompts))
        return table[[len(prompt) for prompt in prompts]]

    made.table = table
    monkeypatch.setattr(made, "encode_text", encode)
    monkeypatch.setattr(module, "fingerprint", lambda *args, **options: {})
    yield made
    made.remembered = {}


def test_every_prompt_is_embedded_once_in_chunks(engine):
    labels, seen = [f"label {number}" for number in range(21_841)], []
    start = time.process_time()
    weights = classifier(engine, labels, TEMPLATES, progress=lambda *n: seen.append(n))
    assert time.process_time() - start < 20  # 1.7 million prompts: 2 s here
    assert weights.shape == (21_841, WIDTH)
    assert sum(engine.asked) == 80 * 21_841 and max(engine.asked) <= CHUNK
    assert seen[-1] == (80 * 21_841,) * 2 and len(seen) == len(engine.asked)
    assert [done for done, _ in seen] == torch.tensor(engine.asked).cumsum(0).tolist()
    for index in (0, 9, 12_345, 21_840):
        lengths = [len(template.format(labels[index])) for template in TEMPLATES]
        mean = engine.table[lengths].mean(0)
        torch.testing.assert_close(weights[index], mean / mean.norm(), atol=1e-6, rtol=0)
    engine.asked.clear()
    assert classifier(engine, labels, TEMPLATES) is weights and not engine.asked


def peak(engine, labels) -> int:
    """Bytes of Python objects at the same time, beside the labels."""
    engine.remembered = {}
    tracemalloc.start()
    try:
        classifier(engine, labels, TEMPLATES)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_prompts(engine):
    few, many = ([f"label {number}" for number in range(count)] for count in (200, 2000))
    peak(engine, few)
    small, large = peak(engine, few), peak(engine, many)
    assert large < small + 150 * len(many)  # a pointer or two and a tuple, but no prompts
    assert small < 300 * CHUNK


@pytest.mark.parametrize("templates", [["{}"] * (CHUNK + 5), [lambda name: f"a {name}"]])
def test_odd_numbers_of_templates(engine, templates):
    labels = ["cat", "dog", "red panda"]
    weights = classifier(engine, labels, templates)
    length = len(templates[0].replace("{}", "cat") if len(templates) > 1 else "a cat")
    torch.testing.assert_close(weights[0], engine.table[length], atol=1e-5, rtol=0)
    assert sum(engine.asked) == len(labels) * len(templates)


def test_rows_are_gone_through_once(monkeypatch):
    """From strings to batches: 40 times as many prompts take about 40 times as long, not 1,600."""
    made = tiny_engine()
    tokens = []

    class Model:
        config = made.model.config

        def encode_prefixes(self, ids, mask):
            tokens.append(ids.numel())
            return self

        def before(self, numbers):
            return self

        def encode_text(self, ids, attention_mask, before=None):
            tokens.append(ids.numel())
            return torch.ones(len(ids), self.config.clip_embed_dim)

    def seconds(labels):
        tokens.clear()
        prompts = [t.replace("{}", f"cat {n}") for n in range(labels) for t in TEMPLATES[:20]]
        rows = made.processor.tokenizer.encode_for_embedding(prompts, 80, False).input_ids
        start = time.process_time()
        texts.embed_rows(Model(), [tuple(row) for row in rows], 8192, torch.device("cpu"))
        return time.process_time() - start, sum(tokens), sum(map(len, rows))

    few, few_tokens, _ = min(seconds(20) for _ in range(3))
    many, many_tokens, all_tokens = seconds(800)
    assert many < 40 * 4 * few
    assert many_tokens < 44 * few_tokens and many_tokens < all_tokens / 2
