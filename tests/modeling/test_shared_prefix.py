"""Texts that go on from kept prefixes are whole texts: by the published outputs, in float64."""

import pytest
import torch
from tiny_engine import tiny_engine

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G

from golden_vectors import assert_golden, load_golden


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def split(ids, places):
    """Rows of ids (B, L) cut at places: (prefixes, their mask, rests, their mask), right-padded."""
    rows = [row[row > 0] for row in ids]
    parts = [row[:at] for row, at in zip(rows, places, strict=True)]
    rests = [row[at:] for row, at in zip(rows, places, strict=True)]
    found = []
    for some in (parts, rests):
        padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in some], batch_first=True)
        found += [padded, mask]
    return found


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:encode_text")
@pytest.mark.parametrize("places", [(1, 1, 1), (2, 5, 3), (6, 1, 7), "all but one"])
@pytest.mark.parametrize("case, accelerated", [
    ("text_right_pad_fp32", False), ("text_right_pad_fp32", True), ("text_bf16", False),
    ("text_fp16", False), ("text_fp16", True),
])  # fmt: skip
def test_golden_texts_cut_anywhere(case, accelerated, places):
    golden = load_golden(case)
    model = InternVL_G(InternVLConfig(**golden.config)).to(golden.dtype)
    model.load_state_dict(golden.state, strict=True)
    if accelerated:
        accelerate(model.eval(), strict=True)
    ids = golden.inputs["text"]
    lengths = (ids > 0).sum(1).tolist()
    places = [n - 1 for n in lengths] if places == "all but one" else places
    places = [min(at, n - 1) for at, n in zip(places, lengths, strict=True)]
    first, first_mask, rest, rest_mask = split(ids, places)
    order = torch.tensor([2, 0, 1])  # of the prefixes: texts find theirs by its number
    prefixes = model.eval().encode_prefixes(first[order], first_mask[order])
    before = prefixes.before(order.argsort())
    found = model.encode_text(rest, attention_mask=rest_mask, before=before)
    assert_golden(found, golden.outputs["text_embeds"])


@pytest.mark.parametrize("accelerated", [False, True])
def test_one_prefix_serves_every_text(accelerated):
    """In float64, where a wrong position or key would show, and rounding does not."""
    model = tiny_engine(dtype=torch.float64).model
    report = accelerate(model) if accelerated else None
    try:
        ids = torch.randint(3, 400, (5, 12))
        ids[:, :4] = ids[0, :4]
        ids[:, -1] = 2
        expected = model.encode_text(ids)
        prefixes = model.encode_prefixes(ids[:1, :4], torch.ones(1, 4))
        before = prefixes.before(torch.zeros(5, dtype=torch.long))
        found = model.encode_text(ids[:, 4:], torch.ones(5, 8), before=before)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        again = model.encode_text(ids[:, 4:], torch.ones(5, 8), before=before)
        assert torch.equal(again, found)  # nothing of the texts is kept
    finally:
        if report is not None:
            report.undo()
