"""Prompts of the five published templates against the recorded ones, and Jinja templates."""

import json
from itertools import groupby
from pathlib import Path

import pytest
from tiny_chat import JINJA, PLAIN_JINJA, TOKENS, picture, tokenizer

from internvl_engine.processing import InternVLTileProcessor, VisionLanguageProcessor
from internvl_engine.processing.chat_templates import (
    TEMPLATES,
    JinjaTemplate,
    as_jinja,
    published_template,
    sentence_in,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "chat" / "prompts.json").read_text(encoding="utf-8")
)["templates"]
ASKED, SAID, THEN, SYSTEM = "What is this?", "A cat.", "And the colour?", "Be brief."
THREE, TWO, ONE = picture(60, 30), picture(56, 28), picture(20, 20)  # tiles, of one or of two
SITUATIONS = {  # arguments of `read` and of a prompt; every image has as many tiles as its golden
    "text_only": ([{"role": "user", "content": ASKED}], []),
    "one_image_3_tiles_no_placeholder": ([{"role": "user", "content": ASKED}], [3]),
    "one_image_3_tiles_placeholder_inside": (
        [{"role": "user", "content": f"{ASKED} <image> {THEN}"}], [3]),
    "two_images_2_and_1_tiles": (
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"},
                                      {"type": "text", "text": ASKED}]}], [2, 1]),
    "history_image_in_first_turn": (
        [(f"<image>\n{ASKED}", SAID), {"role": "user", "content": THEN}], [3]),
    "history_text": ([(ASKED, SAID), (THEN, SAID), {"role": "user", "content": THEN}], []),
    "history_given_no_placeholder_anywhere": (
        [(ASKED, SAID), {"role": "user", "content": THEN}], []),
    "empty_system": ([{"role": "system", "content": ""}, {"role": "user", "content": ASKED}], []),
    "empty_first_question": ([("", SAID), {"role": "user", "content": ASKED}], []),
}  # fmt: skip


def processor(template: str, use_thumbnail: bool = False) -> VisionLanguageProcessor:
    images = InternVLTileProcessor(28, max_tiles=4, use_thumbnail=use_thumbnail)
    return VisionLanguageProcessor(
        images, tokenizer(), num_image_token=TOKENS, template=template, system_message=SYSTEM
    )


def image_of(tiles: int):
    return picture(28 * tiles, 28)


def expected_ids(words, segments) -> list[int]:
    """Ids of recorded segments: what stands between special tokens is split as one text."""
    ids = []
    texts = [
        (kind if kind in ("special", "IMG_CONTEXT") else "text", SYSTEM if kind == "system" else v)
        for kind, v in segments
    ]
    for kind, run in groupby(texts, key=lambda segment: segment[0]):
        values = [value for _, value in run]
        if kind == "text":
            ids += words("".join(values), add_special_tokens=False)["input_ids"]
        elif kind == "special":
            ids += words.convert_tokens_to_ids(values)
        else:
            ids += words.convert_tokens_to_ids(["<IMG_CONTEXT>"]) * sum(values)
    return ids


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_prompts_are_the_published_ones(name, situation):
    ours = processor(name)
    messages, tiles = SITUATIONS[situation]
    inputs = ours(messages=messages, images=[image_of(n) for n in tiles] or None)
    ids = expected_ids(ours.tokenizer, GOLDEN[name]["cases"][situation])
    assert inputs["input_ids"].tolist() == [ids]
    assert inputs.num_patches_list == tiles


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
def test_videos_and_batches_are_the_published_ones(name):
    ours, cases = processor(name), GOLDEN[name]["cases"]
    video = {"type": "video", "video": [picture(40, 30, i) for i in range(3)]}
    asked = {"type": "text", "text": ASKED}
    inputs = ours(messages=[{"role": "user", "content": [video, asked]}])
    words = ours.tokenizer
    assert inputs["input_ids"].tolist() == [expected_ids(words, cases["video_3_frames"])]
    assert inputs.num_patches_list == [1, 1, 1]
    rows = [[{"role": "user", "content": text}] for text in (ASKED, THEN)]
    batch = ours(messages=rows, images=[image_of(2), image_of(1)])
    for ids, mask, case in zip(batch["input_ids"], batch["attention_mask"],
                               cases["batch_of_two"], strict=True):  # fmt: skip
        assert ids[mask.bool()].tolist() == expected_ids(words, case)
        assert mask.tolist() == sorted(mask.tolist())  # padding on the left


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
def test_separators_are_the_published_ones(name):
    assert published_template(name).separator == GOLDEN[name]["stop_token"].strip()
    ours = processor(name).prompts
    assert ours.stop_token_id == ours.tokenizer.convert_tokens_to_ids(GOLDEN[name]["stop_token"])


@pytest.mark.parametrize("name", [*TEMPLATES])
@pytest.mark.parametrize("system", ["", 'say "no" \\ {{ 1 }}', None])
def test_published_templates_as_jinja_write_the_same(name, system):
    words, template = tokenizer(), TEMPLATES[name]
    jinja = JinjaTemplate(as_jinja(template, "Be brief.", "<IMG_CONTEXT>"), words)
    for turns in ([("user", " a\n")], [("user", "a"), ("assistant", "b "), ("user", "")]):
        for open_turn in (True, False):
            sentence = "Be brief." if system is None else system
            expected = template.render(turns, sentence, open_turn)
            assert jinja.render(turns, system, open_turn) == expected
    assert jinja.separator == template.separator


def test_an_unknown_template_lists_the_known():
    with pytest.raises(ValueError, match="'nope' is not known; known are internvl_zh, .*phi3-chat"):
        processor("nope")


def test_separator_of_a_jinja_template():
    assert JinjaTemplate(JINJA, tokenizer()).separator == "<|im_end|>"
    assert JinjaTemplate(PLAIN_JINJA, tokenizer()).separator == "<|im_end|>"
    assert JinjaTemplate("{{ messages[-1]['content'] }}", tokenizer()).separator == ""


@pytest.mark.parametrize("source", ["{{ raise_exception('no') }}", "{% for", "{{ 1 / 0 }}"])
def test_jinja_templates_that_fail(source):
    with pytest.raises(ValueError, match="the chat template refuses this conversation"):
        JinjaTemplate(source, tokenizer()).render([("user", "a")], None, True)


def test_sentence_in_the_code_of_a_checkpoint_is_read_not_run(tmp_path):
    path = tmp_path / "conversation.py"
    path.write_text(
        "raise SystemExit('run')\n"
        "register(Conversation(name='other', system_message='Other.'))\n"
        "register(Conversation(name='internvl2_5', system_message='书生。'))\n",
        encoding="utf-8",
    )
    assert sentence_in(path, "internvl2_5") == "书生。"
    assert sentence_in(path, "Hermes-2") is None
    path.write_text("def (", encoding="utf-8")
    assert sentence_in(path, "internvl2_5") is None
    assert sentence_in(tmp_path / "gone.py", "internvl2_5") is None
