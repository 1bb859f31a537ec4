"""Chat processors and folders: both layouts, settings, templates, damage."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_chat import (
    ASKED,
    CONFIG,
    IMAGE,
    JINJA,
    PLAIN_JINJA,
    SIDE,
    TOKENS,
    USER,
    published_folder,
    shown,
    tokenizer,
    transformers_folder,
    user,
)

from internvl_engine import VisionLanguageConfig
from internvl_engine.processing import VisionLanguageProcessor
from internvl_engine.processing.chat_files import chat_settings

CHAT_CASES = Path(__file__).parents[1] / "golden" / "chat"


def test_settings_come_from_the_published_config(processor):
    images = processor.image_processor
    assert (images.size, images.max_tiles, images.use_thumbnail, images.dynamic) == (
        SIDE, 4, True, True)  # fmt: skip
    assert processor.num_image_token == TOKENS and processor.system_message == "Be brief."
    assert processor.prompts.template.name == "internvl2_5"
    words = processor.tokenizer
    assert processor.img_context_token_id == words.convert_tokens_to_ids("<IMG_CONTEXT>")


def test_absent_fields_of_the_config_are_the_published_defaults(tmp_path):
    names = ("dynamic_image_size", "max_dynamic_patch", "use_thumbnail", "system_message")
    bare = published_folder(tmp_path, **dict.fromkeys(names))
    read = VisionLanguageProcessor.from_pretrained(bare)
    images = read.image_processor
    assert (images.dynamic, images.max_tiles, images.use_thumbnail) == (False, 6, False)
    assert read.system_message is None


def test_a_processor_of_a_configuration(processor):
    config = VisionLanguageConfig.from_dict(CONFIG)
    made = VisionLanguageProcessor.from_config(config, tokenizer())
    assert made.image_processor.to_dict() == processor.image_processor.to_dict()
    messages = user({"type": "image", "image": IMAGE}, ASKED)
    expected = processor(messages=messages)["input_ids"]
    assert torch.equal(made(messages=messages)["input_ids"], expected)


def test_the_tokenizer_as_published_with_qwen(processor, tmp_path):
    """vocab.json and merges.txt, with the added tokens in the settings."""
    published_folder(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False,
             "normalized": False}  # fmt: skip
    added = {str(i): {"content": token.content, **flags}
             for i, token in processor.tokenizer.added_tokens_decoder.items()}  # fmt: skip
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added,
                "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
                "bos_token": None, "chat_template": PLAIN_JINJA}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = VisionLanguageProcessor.from_pretrained(tmp_path)
    messages = user({"type": "image", "image": IMAGE}, ASKED)
    expected = processor(messages=messages)["input_ids"]
    assert torch.equal(read(messages=messages)["input_ids"], expected)


@pytest.mark.golden
@pytest.mark.parametrize("case", json.loads((CHAT_CASES / "index.json").read_text()),
                         ids=lambda case: case["case"])  # fmt: skip
def test_settings_of_the_published_checkpoints(case):
    tiles, others = chat_settings(CHAT_CASES / case["case"])
    size = case["force_image_size"] or case["vision_image_size"]
    assert [tiles["size"]] == list({size} if isinstance(size, int) else {*size})
    assert others["num_image_token"] == case["num_image_token"]


def test_a_language_models_own_template_gives_way(tmp_path):
    inherited = published_folder(tmp_path / "a", chat_template=PLAIN_JINJA)
    read = VisionLanguageProcessor.from_pretrained(inherited)
    assert read.prompts.template.name == "internvl2_5"
    changes = {"template": None, "system_message": None}
    unnamed = published_folder(tmp_path / "b", chat_template=PLAIN_JINJA, **changes)
    plain = VisionLanguageProcessor.from_pretrained(unnamed)
    inputs = plain(messages=user({"type": "image", "image": IMAGE}, ASKED))
    assert shown(plain, inputs) == (
        "<|im_start|>system\nYou are Owl.<|im_end|>\n"
        f"{USER}<img><12></img>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    named = copy.copy(plain.tokenizer)
    named.chat_template = {"default": PLAIN_JINJA, "tool_use": "{{ 1 / 0 }}"}
    again = VisionLanguageProcessor(plain.image_processor, named, num_image_token=TOKENS)
    assert "You are Owl." in shown(again, again(messages=user(ASKED)))
    own = published_folder(tmp_path / "c", chat_template=JINJA)
    assert VisionLanguageProcessor.from_pretrained(own).chat_template == JINJA
    chosen = VisionLanguageProcessor.from_pretrained(own, template="phi3-chat", max_tiles=2)
    assert chosen.prompts.template.name == "phi3-chat" and chosen.image_processor.max_tiles == 2


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("kind", ["processor", "foreign"])
def test_saved_processors_prepare_the_same(request, tmp_path, layout, kind):
    ours = request.getfixturevalue(kind)
    written = ours.save_pretrained(tmp_path / "saved", layout=layout)
    assert all((tmp_path / "saved" / name.rpartition("/")[2]).is_file() for name in written)
    source = published_folder if layout == "published" else transformers_folder
    shutil.copy(source(tmp_path / "model") / "config.json", tmp_path / "saved")
    again = VisionLanguageProcessor.from_pretrained(tmp_path / "saved")
    messages = [*user({"type": "image", "image": IMAGE}, ASKED), ("a", "b"), *user(ASKED)]
    one, other = ours(messages=messages), again(messages=messages)
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert again.tokenizer("<img></img>")["input_ids"] == ours.tokenizer("<img></img>")["input_ids"]


def test_a_saved_processor_needs_no_config(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = VisionLanguageProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert (again.num_image_token, again.system_message) == (TOKENS, "Be brief.")


@pytest.mark.parametrize("break_it, error, message", [
    (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json"),
    (lambda f: (f / "tokenizer.json").write_text("{"), ValueError, "tokenizer in .* be read"),
    (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "has no tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"
                                                 "oid sha256:1\nsize 2\n"), ValueError, "(?i)lfs"),
    (lambda f: (f / "config.json").write_text('{"model_type": "internvl", "qllama_config": {}}'),
     ValueError, "no chat checkpoint .*InternVLProcessor"),
    (lambda f: (f / "config.json").unlink(), ValueError, "nothing in .* says the size"),
    (lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"template": "nope"})),
     ValueError, "'nope' is not known; known are"),
])  # fmt: skip
def test_broken_folders(tmp_path, break_it, error, message):
    folder = published_folder(tmp_path)
    break_it(folder)
    with pytest.raises(error, match=message):
        VisionLanguageProcessor.from_pretrained(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="VisionLanguageProcessor: no directory"):
        VisionLanguageProcessor.from_pretrained(tmp_path / "gone")
