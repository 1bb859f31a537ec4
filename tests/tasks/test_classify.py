"""Zero-shot classification against the formula written out."""

import pytest
import torch
from tiny_engine import pictures, tiny_engine

from internvl_engine.embedding.embedder import KEPT
from internvl_engine.tasks.classify import classifier, classify

LABELS = ["cat", "dog", "red panda"]
TEMPLATES = ["a photo of a {}.", "{}"]


@pytest.mark.parametrize("mode", ["c", "g"])
def test_probabilities_are_those_of_the_formula(mode):
    engine, images = tiny_engine(), pictures(4)
    weights = []
    for label in LABELS:
        prompts = engine.encode_text([template.format(label) for template in TEMPLATES])
        mean = prompts.sum(0) / 2
        weights.append(mean / mean.norm())
    logits = 100 * engine.encode_image(images, mode) @ torch.stack(weights).t()
    expected = logits.softmax(-1)
    rows = engine.classify(images, LABELS, templates=TEMPLATES, mode=mode)
    for row, probabilities in zip(rows, expected, strict=True):
        assert [label for label, _ in row] == [LABELS[i] for i in probabilities.argsort().flip(0)]
        for label, probability in row:
            assert probability == pytest.approx(float(probabilities[LABELS.index(label)]), abs=1e-4)
        assert sum(p.probability for p in row) == pytest.approx(1)


def test_top_k_is_the_beginning():
    engine, images = tiny_engine(), pictures(3)
    full = engine.classify(images, LABELS)
    assert engine.classify(images, LABELS, top_k=2) == [row[:2] for row in full]
    (alone,) = engine.classify(images[0], LABELS)  # one image: a list of one row
    assert [p.label for p in alone] == [p.label for p in full[0]]


def test_a_classifier_is_made_once(monkeypatch):
    engine = tiny_engine(seed=3)
    calls = []
    encode = engine.encode_text
    monkeypatch.setattr(engine, "encode_text", lambda texts: calls.append(texts) or encode(texts))
    first = classifier(engine, LABELS)
    assert classifier(engine, tuple(LABELS)) is first and len(calls) == 1
    assert calls[0] == [f"a photo of a {label}." for label in LABELS]
    assert classifier(engine, LABELS[::-1]) is not first and len(calls) == 2
    for number in range(KEPT):
        classifier(engine, [str(number), "cat"])
    assert classifier(engine, LABELS) is not first  # the oldest made room


@pytest.mark.parametrize(
    "labels, templates, message",
    [
        ([], None, "at least one label"),
        (["cat"], [], "one template"),
        (["cat", 3], None, "label 1 is 3, a int"),
        (5, None, "labels are several strings, got int"),
        (["cat"], [lambda label: None], "a template made None of 'cat'"),
        (["cat"], 5, "templates are several strings, got int"),
        (["cat"], ["a photo"], "'a photo' has no {}"),
        ("cat", None, "got one string"),
    ],
)
def test_what_can_not_be_classified_is_said(labels, templates, message):
    with pytest.raises(ValueError, match=message):
        classify(tiny_engine(), pictures(1), labels, templates)
