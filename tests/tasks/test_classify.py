"""Zero-shot classification against the formula written out."""

import copy
import inspect
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_engine import pictures, tiny_engine

from internvl_engine import InternVL
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


def forms(labels: list[str]) -> list:
    """The same labels in everything that holds some."""
    found = [
        tuple(labels), np.array(labels), np.array(labels, dtype=object), dict.fromkeys(labels, 1),
        dict.fromkeys(labels).keys(), (label for label in labels),
    ]  # fmt: skip
    if find_spec("pandas"):
        from pandas import Series

        found.append(Series(labels, index=range(5, 5 + len(labels))))
    return found


def test_labels_in_every_form():
    engine, images = tiny_engine(), pictures(2)
    expected = engine.classify(images, LABELS)
    for labels in forms(LABELS):
        assert engine.classify(images, labels) == expected
    for row, other in zip(engine.classify(images, set(LABELS)), expected, strict=True):
        assert dict(row) == pytest.approx(dict(other))


def test_templates_in_every_form():
    engine, images = tiny_engine(), pictures(2)
    expected = engine.classify(images, LABELS, templates=["a photo of a {}.", "{}"])
    for templates in (
        ["a photo of a {c}.", "{0}"],
        [lambda c: f"a photo of a {c}.", "{label}"],
        np.array(["a photo of a {}.", "{}"]),
        (t for t in ("a photo of a {}.", str)),
    ):
        assert engine.classify(images, LABELS, templates=templates) == expected
    one = engine.classify(images, LABELS)
    assert engine.classify(images, LABELS, templates="a photo of a {}.") == one
    assert engine.classify(images, LABELS, templates=lambda c: f"a photo of a {c}.") == one


def test_braces_beside_the_place_of_the_label_stay(monkeypatch):
    engine, asked = tiny_engine(), []
    encode = engine.encode_text
    monkeypatch.setattr(engine, "encode_text", lambda texts: asked.extend(texts) or encode(texts))
    classifier(engine, ["cat"], ["{} in {c}", "{c}, yes, {c}"])
    assert asked == ["cat in {c}", "cat, yes, cat"]


def test_labels_that_come_twice_or_are_empty_stay_in_their_order():
    engine, image = tiny_engine(), pictures(1)[0]
    labels = ["crane", "", "maillot", "crane", "maillot"]
    (row,) = engine.classify(image, labels)
    assert sorted(label for label, _ in row) == sorted(labels)
    weights = classifier(engine, labels)
    assert torch.equal(weights[0], weights[3]) and torch.equal(weights[2], weights[4])
    torch.testing.assert_close(weights[1], classifier(engine, [""])[0], atol=2e-6, rtol=0)
    assert sum(p.probability for p in row) == pytest.approx(1)


def test_many_labels_are_gone_through_once(monkeypatch):
    """As many as ImageNet-21k has: what is checked in every call is linear in them."""
    engine, labels = tiny_engine(), [f"label {number}" for number in range(21_841)]
    rows = torch.eye(1, 48).expand(len(labels), 48)
    monkeypatch.setattr(engine, "encode_text", lambda texts: rows[: len(texts)])
    image, start = pictures(1)[0], time.process_time()
    (row,) = engine.classify(image, labels, top_k=3)
    assert [label for label, _ in row] == labels[:3]
    assert engine.classify(image, labels, top_k=3) == [row]
    assert time.process_time() - start < 2  # 16 s each, once


def test_a_changed_model_gets_new_weights():
    engine = copy.deepcopy(tiny_engine())
    images, before = pictures(2), engine.classify(pictures(2), LABELS)
    weights = classifier(engine, LABELS)
    engine.model.qllama.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    changed = engine.classify(images, LABELS)
    assert changed != before
    fresh = InternVL(engine.model, engine.processor, accelerate=False)
    assert changed == fresh.classify(images, LABELS)
    engine.model.load_state_dict(tiny_engine().model.state_dict())
    assert engine.classify(images, LABELS) == before
    assert classifier(engine, LABELS) is weights  # the weights are those of then


def test_one_after_another_names_what_is_broken():
    engine, images = tiny_engine(), pictures(4)
    expected = engine.classify(images, LABELS, top_k=2)
    outcomes = list(
        engine.classify_each([*images[:2], b"no", *images[2:]], iter(LABELS), top_k=2, batch_size=2)
    )
    assert [outcome.number for outcome in outcomes] == list(range(5))
    assert "image 2: " in str(outcomes[2].error) and outcomes.pop(2).value is None
    for (_, row, error), other in zip(outcomes, expected, strict=True):
        assert error is None and [p.label for p in row] == [p.label for p in other]
    with pytest.raises(ValueError, match="one template"):
        engine.classify_each(images, LABELS, templates=[])  # at once, before anything is read


@pytest.mark.parametrize("name", ["classify", "caption", "answer", "index", "search"])
def test_every_task_says_what_it_takes(name):
    method = getattr(InternVL, name)
    parameters = inspect.signature(method).parameters
    assert len(parameters) > 3 and "options" not in parameters
    documented = inspect.getdoc(method)
    assert "Returns:" in documented
    assert all(p in documented for p in parameters if p != "self")


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
