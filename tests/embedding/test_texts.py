"""Common beginnings are run once, and nothing else changes; texts keep their place."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import tiny_engine

from internvl_engine import InternVL, kernels
from internvl_engine.embedding import texts as module
from internvl_engine.embedding.texts import Group, embed_rows, portions, share, text_batches

ROUNDING = 2e-6  # float32 sums of another batch shape, on unit vectors of 48 values
LABELS = ["cat", "dog", "red panda", "a quick brown fox", "violet beach", "two", "jumps over"]
TEMPLATES = ["a photo of a {}.", "the quick brown {}", "a photo of the blue {}, one", "{}"]
PROMPTS = [template.format(label) for label in LABELS * 3 for template in TEMPLATES]
PROMPTS = [f"{prompt} {number}" for number, prompt in enumerate(PROMPTS)]


@pytest.fixture
def counted(monkeypatch):
    """Ids, with padding, that go through the decoder of the engine it is given."""

    def watch(engine):
        tokens = []
        decoder = engine.model.qllama.model
        embed = decoder._embed
        monkeypatch.setattr(
            decoder, "_embed", lambda ids, embeds: tokens.append(ids.shape) or embed(ids, embeds)
        )
        return tokens

    return watch


def test_shared_beginnings_change_nothing(counted, monkeypatch):
    engine = tiny_engine(dtype=torch.float64)
    tokens = counted(engine)
    found = engine.encode_text(PROMPTS, normalize=False)
    shared = sum(a * b for a, b in tokens)
    tokens.clear()
    monkeypatch.setattr(module, "WORTH", 10**9)
    expected = engine.encode_text(PROMPTS, normalize=False)
    assert 1.25 * shared < sum(a * b for a, b in tokens)
    # In float64 only the last rounding, to float32, is left.
    torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_beginnings_in_the_accelerated_model(dtype, monkeypatch):
    engine = InternVL.nano(dtype=dtype)
    texts = [f"a {c} {d} on the {c}" for c in ("red", "green", "blue") for d in range(10)]
    found = engine.encode_text(texts)
    monkeypatch.setattr(module, "WORTH", 10**9)
    expected = engine.encode_text(texts)
    # bfloat16: 4 layers that round to 8 bits in another order of rows
    atol = 2e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_a_beginning_that_is_a_whole_text():
    """Ids that end another row's beginning: each text keeps a last id of its own."""
    engine, rows = tiny_engine(), [tuple(range(30, 30 + n)) for n in range(2, 40)]
    groups = share(rows)
    assert all(len(rows[i]) > g.length > 0 for g in groups if g.length for i in g.rows)
    assert sum(g.saved for g in groups) > 100
    device = torch.device("cpu")
    with torch.inference_mode(), pytest.warns(UserWarning, match="not in the end of a sentence"):
        found = embed_rows(engine.model, rows, 8192, device)
        expected = embed_rows(engine.model, rows, 1, device, shares=False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_row_at_a_time_shares_nothing(counted):
    engine = InternVL.nano()
    tokens = counted(engine)
    with kernels.batch_invariant():
        engine.encode_text(PROMPTS[:9])
    assert len(tokens) == 9 and all(rows == 1 for rows, _ in tokens)


rows_of_ids = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple), min_size=1, max_size=9,
    unique=True,
)  # fmt: skip


@settings(max_examples=80)
@given(rows_of_ids)
def test_groups_begin_alike_and_hold_every_row(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH", 1)
        groups = share(rows)
    assert sorted(i for group in groups for i in group.rows) == list(range(len(rows)))
    for group in groups:
        assert len({rows[i][: group.length] for i in group.rows}) == 1
        assert all(len(rows[i]) > group.length for i in group.rows)
    saved = sum(group.saved for group in groups)
    least = min(map(len, rows)) - 1
    shared = max(n for n in range(least + 1) if len({row[:n] for row in rows}) == 1)
    assert saved >= shared * (len(rows) - 1)  # what one common prefix saves


def test_groups_follow_the_templates():
    forms = [(1, 9, 9, 9, *range(10 * k, 10 * k + 5)) for k in range(2, 5)]
    rows = [(*form, 100 + label, 101 + label, 2) for label in range(40) for form in forms]
    groups = share(rows)
    assert sorted(group.length for group in groups) == [9, 9, 9]
    assert all(len({rows[i][:9] for i in group.rows}) == 1 for group in groups)
    lone = share([*rows, (1, 9, 9, 9, 77, 2)])  # what has no template shares with nobody
    assert [g.rows for g in lone if not g.length] == [[len(rows)]]


def test_little_in_common_is_not_shared():
    rows = [(1, 9, 9, 9, 100 + n, 2) for n in range(20)]
    assert [g.length for g in share(rows)] == [0] and share([]) == []


def test_nested_beginnings_are_no_recursion():
    rows = [(1,) * n + (2,) for n in range(1, 1500)]
    random.shuffle(rows)
    groups = share(rows)
    assert sum(len(g.rows) for g in groups) == len(rows)
    assert sum(g.saved for g in groups) > 0.6 * sum(map(len, rows))


def test_few_prefixes_are_kept_at_a_time():
    groups = [Group([i], 30) for i in range(100)] + [Group([100], 600), Group([101])]
    found = list(portions(groups))
    assert [group for portion in found for group in portion] == groups
    assert all(
        len(p) == 1 or len(p) * max(g.length for g in p) <= module.PREFIX_TOKENS for p in found
    )
    assert found[-1] == [Group([101])]


def test_a_full_batch_is_not_padded():
    rows = [[7] * 5] * 300 + [[7] * 6] * 3
    assert [len(batch) for batch in text_batches(rows, 10**6)] == [300, 3]
    assert [len(batch) for batch in text_batches(rows[-8:], 10**6)] == [8]
