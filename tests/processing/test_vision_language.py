"""VisionLanguageProcessor: conversations in all forms, batches, labels, folders of both layouts."""

import base64
import io
import pickle

import pytest
import torch
from PIL import Image
from tiny_chat import (
    ASKED,
    IMAGE,
    SIDE,
    USER,
    picture,
    published_folder,
    shown,
    tokenizer,
    user,
)

from internvl_engine.processing import (
    SPECIAL_TOKENS,
    ImageError,
    InternVLTileProcessor,
    VisionLanguageProcessor,
    add_special_tokens,
)


def encoded(image) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("form", ["object", "path", "url", "file", "data", "base64", "openai"])
def test_pictures_in_messages(processor, tmp_path, form):
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    part = {
        "object": {"type": "image", "image": Image.fromarray(IMAGE)},
        "path": {"type": "image", "path": str(path)},
        "url": {"type": "image", "url": str(path)},
        "file": {"type": "image_url", "image_url": {"url": f"file://{path}"}},
        "data": {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{encoded(IMAGE)}"},
        },
        "base64": {"type": "image", "base64": encoded(IMAGE)},
        "openai": {"type": "image_url", "image_url": str(path)},
    }[form]
    inputs = processor(messages=user(part, ASKED))
    expected = processor(messages=[{"role": "user", "content": "What is this?"}], images=IMAGE)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_a_conversation_with_pictures_in_several_turns(processor):
    one, two = {"type": "image", "image": IMAGE}, {"type": "image", "image": picture(20, 20)}
    messages = [*user(one, ASKED), {"role": "assistant", "content": "A <image>."}, *user(two, two)]
    inputs = processor(messages=messages)
    assert inputs.num_patches_list == [3, 1, 1]
    assert shown(processor, inputs) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"{USER}<img><12></img>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA <image>.<|im_end|>\n"
        f"{USER}Image-2: <img><4></img>\nImage-3: <img><4></img>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_placeholders_in_the_texts_of_parts(processor):
    parts = [{"type": "text", "text": "a <image> b <image>"}, {"type": "image", "image": IMAGE},
             {"type": "image", "image": picture(20, 20)}]  # fmt: skip
    inputs = processor(messages=user(*parts))
    assert f"{USER}a <img><12></img> b <img><4></img><|im_end|>" in shown(processor, inputs)


def test_batches_mix_rows_with_and_without_pictures(processor):
    rows = [[{"role": "user", "content": "What is this?"}], user({"type": "image"}, ASKED)]
    inputs = processor(messages=rows, images=[None, [IMAGE]], dtype=torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs.num_patches_list == [3]
    alone = processor(messages=rows[0])
    assert "pixel_values" not in alone
    mask = inputs["attention_mask"]
    assert mask[0].tolist() == sorted(mask[0].tolist()) and mask[1].all()
    assert torch.equal(inputs["input_ids"][0][mask[0].bool()], alone["input_ids"][0])
    right = processor(messages=rows, images=[None, IMAGE], padding_side="right")
    assert right["attention_mask"][0].tolist() == sorted(mask[0].tolist(), reverse=True)


def test_training_batches(processor):
    rows = [
        [("Who?", "A cat."), ("<image><image>", "Red.\nBlue")],
        [("No picture?", "None.")],
    ]
    inputs = processor(messages=rows, images=[[picture(56, 28)] * 2, None], training=True)
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask", "labels", "image_flags"}
    assert inputs["image_flags"].tolist() == [1] * 6 + [0]  # 4 tiles shared by two images
    assert inputs.num_patches_list == [3, 3]
    white = InternVLTileProcessor(SIDE)(Image.new("RGB", (9, 9), "white"))[0]
    assert torch.equal(inputs["pixel_values"][6:], white)
    assert inputs["attention_mask"][1, -1] == 0
    labels, ids = inputs["labels"], inputs["input_ids"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    learned = [processor.decode(row[row != -100], False) for row in labels]
    assert learned == ["A cat.<|im_end|>Red.\nBlue<|im_end|>", "None.<|im_end|>"]


def test_finished_prompts(processor, foreign):
    inputs = processor(text="a <image> b <IMG_CONTEXT>", images=[IMAGE, picture(20, 20)])
    assert shown(processor, inputs) == "a <img><12></img> b <img><4></img>"
    rows = ["x <image>", "y", "<video>"]
    frames = [picture(40, 40, i) for i in range(2)]
    batch = processor(text=rows, images=[[IMAGE], None, []], videos=[None, None, [frames]])
    assert shown(processor, batch, 2) == "Frame-1: <img><4></img>\nFrame-2: <img><4></img>"
    batch = foreign(text=rows, images=IMAGE, videos=frames)
    assert shown(foreign, batch, 2) == "Frame1: <img><4></img>\nFrame2: <img><4></img>"
    assert batch.num_patches_list == [3, 1, 1]


def test_pictures_alone(processor):
    inputs = processor(images=[IMAGE, IMAGE], max_tiles=1)
    assert set(inputs) == {"pixel_values"} and inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize("call, message", [
    ({}, "needs images, videos, text or messages"),
    ({"text": "a", "messages": []}, "give one"),
    ({"text": "a <image> <image>", "images": [IMAGE]}, "1 image came with 2 places for it"),
    ({"text": "a", "images": [IMAGE, IMAGE]}, "2 images came with 0 places for them"),
    ({"text": "a <image>"}, "0 images came with 1 place"),
    ({"text": ["<image>", "b"], "images": [None, IMAGE]}, "0 images came with 1 place"),
    ({"messages": []}, "at least one message"),
    ({"messages": user({"type": "image"})}, "0 images came with 1 place"),
    ({"messages": [("a", "b"), *user(ASKED)], "images": IMAGE}, "1 image came with 0 places"),
    ({"messages": user({"type": "text", "text": "<image>"}, {"type": "image", "image": IMAGE},
                       {"type": "image", "image": IMAGE})}, "message 0: 2 images came with 1"),
    ({"messages": user({"type": "audio"})}, "message 0: a part must be .* got a part of type 'aud"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "message 0: the role must be one of"),
    ({"messages": [*user(ASKED), {"role": "system", "content": "a"}]}, "only the first message"),
    ({"messages": user({"type": "image", "base64": "%%"})}, "base64 is damaged"),
    ({"messages": user({"type": "image", "image": b"no"})}, "image 0: image given as bytes"),
    ({"messages": [user(ASKED)] * 2, "images": [IMAGE]}, "2 conversations came with 1 images"),
    ({"messages": user(ASKED), "padding": False}, "padding must be True"),
    ({"messages": user(ASKED), "padding_side": "up"}, "padding_side must be"),
    ({"messages": user(ASKED), "return_tensors": "np"}, 'gives "pt" tensors'),
    ({"messages": user({"type": "text", "text": "<IMG_CONTEXT>"}), "images": IMAGE,
      }, "the prompt has 2 places for 1 picture|placeholder"),
    ({"images": IMAGE, "max_tiles": 0}, "max_tiles must be a whole number"),
])  # fmt: skip
def test_misuse_is_named(processor, foreign, call, message):
    if "the prompt has" in message:
        processor = foreign
    with pytest.raises(ValueError, match=message):
        processor(**call)


@pytest.mark.parametrize("messages", ["a text", {"role": "user", "content": "a"}, [3], 7,
                                      [{"content": "a"}], [{"role": "user"}]])  # fmt: skip
def test_what_is_no_conversation(processor, messages):
    with pytest.raises(TypeError, match="role|content"):
        processor(messages=messages)


def test_transformers_layout_writes_what_its_template_says(foreign):
    video = {"type": "video", "video": [picture(40, 40, i) for i in range(2)]}
    parts = [{"type": "image", "image": IMAGE}, {"type": "image", "image": IMAGE}, ASKED, video]
    inputs = foreign(messages=user(*parts))
    assert shown(foreign, inputs) == (
        f"{USER}<img><12></img>\n<img><12></img>\nWhat is this?"
        "Frame1: <img><4></img>\nFrame2: <img><4></img>\n<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = foreign(messages=user(ASKED), system_message="Say it.")
    assert shown(foreign, inputs).startswith("<|im_start|>system\nSay it.<|im_end|>\n")


@pytest.mark.parametrize("kind", ["processor", "foreign"])
def test_apply_chat_template(request, kind):
    ours = request.getfixturevalue(kind)
    video, frames = {"type": "video"}, [picture(40, 40, i) for i in range(2)]
    messages = [
        *user({"type": "image"}, ASKED),
        {"role": "assistant", "content": "A cat."},
        *user(video, {"type": "image"}, {"type": "image"}),
        {"role": "user", "content": "<image> x <video>"},
    ]
    text = ours.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count("<video>") == 2 and "<img>" not in text
    given = {"images": [IMAGE, IMAGE, IMAGE, picture(20, 20)], "videos": [frames, frames]}
    inputs = ours(text=[text], padding=True, return_tensors="pt", **given)
    expected = ours(messages=messages, **given)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    again = ours.apply_chat_template(messages, tokenize=True, return_dict=True, **given)
    assert torch.equal(again["input_ids"], expected["input_ids"])
    several = ours.apply_chat_template([messages, messages])
    assert several[0] == several[1] == text.removesuffix("<|im_start|>assistant\n")


def test_without_a_template_a_conversation_is_refused(tmp_path):
    bare = VisionLanguageProcessor.from_pretrained(published_folder(tmp_path, template=None))
    with pytest.raises(ValueError, match="names no conversation template; .*internvl2_5"):
        bare(messages=user(ASKED))
    assert bare(text="a <image>", images=IMAGE).num_patches_list == [3]


def test_inputs_survive_a_pickle_and_a_move(processor):
    inputs = processor(messages=user({"type": "image", "image": IMAGE}, ASKED))
    again = pickle.loads(pickle.dumps(inputs)).to("cpu", torch.float16)
    assert again.num_patches_list == [3] and again["pixel_values"].dtype == torch.float16
    assert again["input_ids"].dtype == torch.int64


def test_read_messages_serve_again(processor):
    read = processor.read(user({"type": "image", "image": IMAGE}, ASKED))
    assert repr(read[0].pictures) == "[<image, 3 tiles>]" and read[0].text == "<image>What is this?"
    inputs = processor(messages=[*read, {"role": "assistant", "content": "A cat."}, *user(ASKED)])
    assert inputs.num_patches_list == [3]
    with pytest.raises(ValueError, match="tiles of another model"):
        VisionLanguageProcessor(
            InternVLTileProcessor(56), tokenizer(), num_image_token=4, template="Hermes-2"
        )(messages=read)


def test_answers_end_at_the_separator(processor):
    ids = processor.tokenizer(" A cat. <|im_end|>more")["input_ids"]
    assert processor.prompts.answer(ids) == "A cat. more"  # a special token is no text
    own = VisionLanguageProcessor(
        processor.image_processor, processor.tokenizer, template="internvl_zh"
    )
    own.prompts.template = own.prompts.template.__class__("x", "", "", "", "", "", " STOP\n")
    assert own.prompts.answer(own.tokenizer(" A cat. STOP more")["input_ids"]) == "A cat."
    beyond = [*ids[:3], len(processor.tokenizer) + 5]  # a row that pads the table of the head
    assert processor.decode(beyond) == processor.decode(ids[:3])
    assert processor.batch_decode([ids[:3]]) == [processor.decode(ids[:3])]


def test_a_tokenizer_without_the_tokens_of_images():
    words = tokenizer(added=False)
    with pytest.raises(ValueError, match="no token <IMG_CONTEXT>; add_special_tokens"):
        VisionLanguageProcessor(InternVLTileProcessor(28), words, template="internvl2_5")
    before = len(words)
    assert add_special_tokens(words) == 9 and len(words) == before + 9
    ids = words.convert_tokens_to_ids([*SPECIAL_TOKENS])
    assert ids == list(range(before, before + 9)) and add_special_tokens(words) == 0
    with pytest.raises(TypeError, match="transformers' tokenizers, got str"):
        add_special_tokens("words")


def test_errors_of_a_batch_are_image_errors(processor, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ImageError, match="image 1: .*bad.jpg"):
        processor(text="<image><image>", images=[IMAGE, tmp_path / "bad.jpg"])
