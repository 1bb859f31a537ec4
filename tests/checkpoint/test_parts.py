"""Parts of the composite: what is read, what is held, what using the rest says."""

import copy
import pickle

import pytest
import torch
from published_layout import write_published

from internvl_engine.checkpoint import PARTS, CheckpointError, PartNotLoadedError
from internvl_engine.checkpoint.parts import drop_absent
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVisionModel, InternVL_G

from golden_vectors import assert_golden, load_golden

FP32 = {"dtype": torch.float32}
FULL_SIZE = {  # SPEC 1.4; c and text are also published figures of memory
    "image": 5_936_000_768,
    "text": 6_684_028_928,
    "c": 12_620_029_697,
    "g": 12_620_029_697 + 956_418_048 + 393_216 + 53_515_008,
    "caption": 5_902_793_600 + 7_841_912_832 + 393_216,
    "all": 13_834_975_747,
}


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return InternVL_G(InternVLConfig())


@pytest.mark.parametrize("parts", PARTS)
def test_parameters_of_the_14b(full_size, parts):
    model = copy.deepcopy(full_size)
    drop_absent(model, parts)
    assert sum(parameter.numel() for parameter in model.parameters()) == FULL_SIZE[parts]


def uses(golden) -> dict:
    """What a part is for: a call, and what it must give."""
    image = golden.inputs["image"]
    ids = torch.tensor([[1, 7, 9, 2], [1, 8, 2, 0]])
    full = InternVL_G(InternVLConfig(**golden.config)).eval()
    full.load_state_dict(golden.state)
    calls = {
        "image": lambda model: model.encode_image(image, mode="InternVL-C"),
        "text": lambda model: model.encode_text(ids),
        "c": lambda model: model(image, ids, mode="InternVL-C")[0],
        "g": lambda model: model(image, ids)[0],
        "caption": lambda model: model.generate(
            pixel_values=image, input_ids=ids[:, :2], max_new_tokens=3
        ),
        "all": lambda model: model.itm_head(full.query_tokens),
    }
    return {name: (call, call(full)) for name, call in calls.items()}


SERVES = {
    "image": {"image"},
    "text": {"text"},
    "c": {"image", "text", "c"},
    "g": {"image", "text", "c", "g"},
    "caption": {"caption"},
    "all": {"image", "text", "c", "g", "caption", "all"},
}


@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_parts_give_the_right_answer_or_say_what_is_missing(tmp_path, published, golden_g, parts):
    model = InternVL_G.from_pretrained(published, parts=parts, **FP32)
    model.save_pretrained(tmp_path)
    again = InternVL_G.from_pretrained(tmp_path, **FP32)  # knows which parts it holds
    assert again.config.parts == model.config.parts == (None if parts == "all" else parts)
    assert set(again.state_dict()) == set(model.state_dict())
    for use, (call, expected) in uses(golden_g).items():
        for one in (model, again):
            if use in SERVES[parts]:
                torch.testing.assert_close(call(one), expected, rtol=0, atol=0)
            else:
                with pytest.raises(PartNotLoadedError, match=f"parts='{parts}'.*load with"):
                    call(one)


def test_the_message_names_the_part_to_load(published, golden_g):
    model = InternVL_G.from_pretrained(published, parts="c", **FP32)
    with pytest.raises(
        PartNotLoadedError,
        match="leave query_tokens out; .* load with parts='g' or 'caption' or 'all'",
    ):
        model.encode_image(golden_g.inputs["image"])
    model = InternVL_G.from_pretrained(published, parts="text", **FP32)
    with pytest.raises(PartNotLoadedError, match="leave vision_model out"):
        model(pixel_values=golden_g.inputs["image"])
    with pytest.raises(PartNotLoadedError, match="leave text_projection out"):
        InternVL_G.from_pretrained(published, parts="caption").encode_text(torch.tensor([[1, 2]]))
    model = InternVL_G.from_pretrained(published, parts="image")
    with pytest.raises(PartNotLoadedError, match="leave qllama out.*'text' or 'c' or 'g' or"):
        model.encode_text(torch.tensor([[1, 2]]))


def test_what_is_left_out_can_be_asked_about_and_copied(published):
    model = InternVL_G.from_pretrained(published, parts="text")
    assert not hasattr(model.qllama.lm_head, "weight")
    assert "not loaded" in repr(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(twin.state_dict()) == set(model.state_dict())
        with pytest.raises(PartNotLoadedError):
            twin.query_tokens.expand(1, 2, 3)


def test_parts_of_a_partial_checkpoint(tmp_path, published):
    InternVL_G.from_pretrained(published, parts="c", **FP32).save_pretrained(tmp_path)
    image = InternVL_G.from_pretrained(tmp_path, parts="image", **FP32)
    assert image.config.parts == "image"
    with pytest.raises(
        CheckpointError, match="weights are missing: .*; the checkpoint holds parts 'c'"
    ):
        InternVL_G.from_pretrained(tmp_path, parts="g")


def test_lora_towers_are_cut_too(tmp_path):
    pytest.importorskip("peft")
    golden = load_golden("lora_encode_G")
    write_published(tmp_path / "lora", golden)
    model = InternVL_G.from_pretrained(tmp_path / "lora", parts="g", **FP32)
    with torch.no_grad():
        embeds = model.encode_image(golden.inputs["image"])
    assert_golden(embeds, golden.outputs["image_embeds"])
    with pytest.raises(PartNotLoadedError, match="leave qllama.lm_head out"):
        model.language_model.lm_head(embeds)


def test_unknown_parts_and_parts_of_a_tower(published):
    with pytest.raises(ValueError, match="parts must be one of image, text, c, g, caption, all"):
        InternVL_G.from_pretrained(published, parts="vision")
    with pytest.raises(ValueError, match="InternVisionModel is one part"):
        InternVisionModel.from_pretrained(published, parts="image")
