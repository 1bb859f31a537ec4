"""Images and texts together; settings read from the published layout, ours, and AutoProcessor."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, pipeline

from internvl_engine import InternVLProcessor  # and with it all of the Auto classes
from internvl_engine.assets import held_out, nano_directory
from internvl_engine.configuration import InternVLConfig
from internvl_engine.processing import InternVLImageProcessor

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
PUBLISHED_CONFIG = {
    "model_type": "internvl",
    "architectures": ["InternVLModel"],
    "force_image_size": None,
    "vision_config": {"model_type": "intern_vit_6b", "image_size": 224},
    "qllama_config": {"hidden_size": 4096},
}
PUBLISHED_PREPROCESSOR = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
}  # fmt: skip


@pytest.fixture
def processor(tiny) -> InternVLProcessor:
    return InternVLProcessor(InternVLImageProcessor(28, "classification"), tiny)


def write(folder, tiny, **files):
    """A published directory with changed files; None leaves one out."""
    files = {"config": PUBLISHED_CONFIG, "preprocessor_config": PUBLISHED_PREPROCESSOR} | files
    for name, values in files.items():
        if values is not None:
            text = values if isinstance(values, str) else json.dumps(values)
            (folder / f"{name}.json").write_text(text)
    tiny.save(folder / "tokenizer.model")
    return folder


def test_images_and_texts_for_embeddings(processor, tiny):
    texts = ["a red panda", "two  dogs run on the beach"]
    inputs = processor(images=[PHOTO, PHOTO], text=texts)
    assert list(inputs) == ["pixel_values", "input_ids", "attention_mask"]
    assert torch.equal(inputs["pixel_values"], processor.image_processor([PHOTO, PHOTO]))
    ids, mask = tiny.encode_for_embedding(texts)
    assert torch.equal(inputs["input_ids"], ids) and torch.equal(inputs.attention_mask, mask)
    assert inputs.to(torch.float64).pixel_values.dtype == torch.float64  # a transformers batch
    assert inputs.input_ids.dtype == torch.int64
    padded = processor(text=texts, padding="max_length")
    assert list(padded) == ["input_ids", "attention_mask"] and padded.input_ids.shape == (2, 80)
    assert processor(text=texts, max_length=6).input_ids[:, -1].tolist() == [2, 2]
    long = "a red panda " * 60
    whole = processor(text=long, padding=True, truncation=False, return_tensors="pt").input_ids
    assert torch.equal(whole, tiny.encode_for_embedding(long, None).input_ids)


def test_prompts_for_generation(processor, tiny):
    prompts = ["English caption:", "a dog"]
    inputs = processor(images=PHOTO, prompts=prompts, dtype=torch.bfloat16)
    assert inputs.pixel_values.dtype == torch.bfloat16
    ids, mask = tiny.encode_prompt(prompts)
    assert torch.equal(inputs.input_ids, ids) and torch.equal(inputs.attention_mask, mask)
    same = processor(text=prompts, task="prompt")
    assert torch.equal(same.input_ids, ids) and "pixel_values" not in same
    assert processor.batch_decode(ids) == prompts and processor.decode(ids[1]) == "a dog"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "needs images, text or prompts"),
        ({"text": "a", "prompts": "b"}, "give one"),
        ({"text": "a", "task": "caption"}, 'task must be "embedding" or "prompt"'),
        ({"text": "a", "return_tensors": "np"}, "not 'np'"),
        ({"images": b"", "text": "a"}, "image 0: "),
    ],
)
def test_mistakes_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_what_is_saved_is_loaded_by_us_and_by_auto_processor(processor, tmp_path):
    processor.image_processor.max_aspect_ratio = 7.0
    written = processor.save_pretrained(tmp_path / "model")
    assert [name.rpartition("/")[2] for name in written] == [
        "processor_config.json",
        "tokenizer.model",
    ]
    expected = processor(images=PHOTO, text="two  dogs at 3.14")
    for read in (
        InternVLProcessor.from_pretrained(tmp_path / "model"),
        AutoProcessor.from_pretrained(tmp_path / "model"),
        AutoProcessor.from_pretrained(str(tmp_path / "model"), trust_remote_code=False),
    ):
        assert isinstance(read, InternVLProcessor)
        assert read.image_processor.to_dict() == processor.image_processor.to_dict()
        got = read(images=PHOTO, text="two  dogs at 3.14")
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_auto_classes_serve_ours_and_no_namesake(processor, tiny, tmp_path):
    """transformers has an InternVLConfig too, whose processors it would take by that name."""
    InternVLConfig.from_preset("nano").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images, tokenizer = (
        auto.from_pretrained(tmp_path) for auto in (AutoImageProcessor, AutoTokenizer)
    )
    assert isinstance(images, InternVLImageProcessor) and images.geometry == "classification"
    expected = processor.image_processor(PHOTO)
    assert torch.equal(images(PHOTO, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(images.preprocess([PHOTO]).pixel_values, expected)
    assert torch.equal(images.transform(PHOTO), expected[0])
    assert torch.equal(images.video([PHOTO] * 2), expected.expand(2, -1, -1, -1))
    assert tokenizer.encode("a red panda") == tiny.encode("a red panda")
    images.save_pretrained(tmp_path / "images")
    again = AutoImageProcessor.from_pretrained(tmp_path / "images")
    assert again.to_dict() == images.to_dict()
    with pytest.raises(ValueError, match="not 'np'"):
        images(PHOTO, return_tensors="np")


def test_a_pipeline_of_transformers_classifies_with_a_saved_folder():
    pipe = pipeline("zero-shot-image-classification", model=str(nano_directory()), dtype="float32")
    (picture, *_), ((colour, digit), *_) = held_out()
    labels = [f"a {colour} {digit}", "a blue seven"]
    best = pipe(picture, candidate_labels=labels[::-1], hypothesis_template="{}")[0]
    assert best["label"] == labels[0] and best["score"] > 0.9
    model, processor = pipe.model, InternVLProcessor.from_pretrained(nano_directory())
    with torch.no_grad():
        found = model(**processor(images=picture, text=labels))
        texts = model.encode_text(**processor(text=labels))
    assert found.logits_per_image.softmax(-1)[0, 0].item() == pytest.approx(best["score"])
    torch.testing.assert_close(found.text_embeds, texts / texts.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="two names for one argument"):
        model(found, texts, input_ids=texts)
    with pytest.warns(UserWarning, match="ends in id .*, not in the end of a sentence"):
        model.encode_text(processor(prompts=labels[0]).input_ids)


def test_auto_processor_knows_a_saved_model_directory(processor, tiny, tmp_path):
    InternVLConfig.from_preset("nano").save_pretrained(tmp_path)
    tiny.save(tmp_path / "tokenizer.model")
    by_config = AutoProcessor.from_pretrained(tmp_path)  # no processor_config.json: by model type
    assert isinstance(by_config, InternVLProcessor) and by_config.image_processor.size == 28
    processor.save_pretrained(tmp_path)
    read = AutoProcessor.from_pretrained(tmp_path)
    assert read.image_processor.geometry == "classification"


@pytest.mark.parametrize("forced, side", [(None, 224), (364, 364)])
@pytest.mark.parametrize("modern", [False, True])
def test_a_published_directory(tiny, tmp_path, forced, side, modern):
    preprocessor = PUBLISHED_PREPROCESSOR
    if modern:  # as transformers writes it since 4.25
        preprocessor = preprocessor | {
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
        }
    config = PUBLISHED_CONFIG | {"force_image_size": forced}
    folder = write(tmp_path, tiny, config=config, preprocessor_config=preprocessor)
    processor = InternVLProcessor.from_pretrained(folder)
    assert processor.image_processor.to_dict() == InternVLImageProcessor(side, "clip").to_dict()
    other = InternVLProcessor.from_pretrained(folder, geometry="retrieval", size=28)
    assert (other.image_processor.geometry, other.image_processor.size) == ("retrieval", 28)


@pytest.mark.parametrize(
    "preprocessor, expected",
    [
        (None, ("retrieval", 224)),
        ({"size": {"height": 448, "width": 448}}, ("retrieval", 448)),
        ({"size": 336, "do_center_crop": False}, ("retrieval", 336)),
        ({"size": 336}, ("clip", 336)),
        ({"crop_size": 336}, ("clip", 336)),
    ],
)
def test_other_preprocessor_files(tiny, tmp_path, preprocessor, expected):
    config = PUBLISHED_CONFIG if preprocessor is None else None
    folder = write(tmp_path, tiny, config=config, preprocessor_config=preprocessor)
    read = InternVLProcessor.from_pretrained(folder).image_processor
    assert (read.geometry, read.size) == expected


def test_clip_settings_inside_processor_config(tiny, tmp_path):
    values = {"image_processor": {"size": {"shortest_edge": 224}, "crop_size": 224}}
    folder = write(tmp_path, tiny, processor_config=values, preprocessor_config=None)
    assert InternVLProcessor.from_pretrained(folder).image_processor.geometry == "clip"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"preprocessor_config": {"size": 224, "crop_size": 200}}, "size 224 but crop_size 200"),
        ({"preprocessor_config": {"size": {"height": 2, "width": 3}}}, "needs one side"),
        ({"preprocessor_config": {"size": {"height": [2], "width": "a"}}}, "needs one side"),
        ({"config": {"vision_config": {"image_size": "big"}}}, "size must be"),
        ({"preprocessor_config": {"size": 224, "resample": 2}}, "resample 2, only bicubic"),
        ({"preprocessor_config": {"do_normalize": False}}, "turns do_normalize off"),
        ({"preprocessor_config": "{"}, "preprocessor_config.json: not valid JSON"),
        ({"preprocessor_config": "[]"}, "needed a JSON object"),
        ({"preprocessor_config": {"image_mean": 3}}, "image settings"),
        ({"preprocessor_config": None, "config": None}, "has neither processor_config.json"),
        ({"processor_config": {}}, "has no image_processor settings"),
        ({"processor_config": {"image_processor": {"geometry": "clip", "size": 8, "x": 1}}}, "'x'"),
    ],
)
def test_files_that_can_not_be_honoured_are_refused(tiny, tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        InternVLProcessor.from_pretrained(write(tmp_path, tiny, **files))
    assert str(tmp_path) in str(caught.value)


def test_missing_files_are_named(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.model"):
        InternVLProcessor.from_pretrained(tmp_path)
    for absent in (tmp_path / "absent", "absent", "./some/where"):
        with pytest.raises(FileNotFoundError, match="no directory"):
            InternVLProcessor.from_pretrained(absent)
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        InternVLProcessor.from_pretrained(
            "owner/absent", local_files_only=True, cache_dir=str(tmp_path)
        )
    write(tmp_path, tiny)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="tokenizer.model is no SentencePiece model"):
        InternVLProcessor.from_pretrained(tmp_path)


def test_the_size_is_the_one_of_the_model_beside_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG | {"force_image_size": 56}))
    assert InternVLProcessor.from_pretrained(tmp_path).image_processor.size == 56


def test_what_is_shown_says_what_it_is(processor):
    assert repr(processor) == (
        "InternVLProcessor(\n  InternVLImageProcessor(size=28, geometry='classification'),\n  "
        f"InternVLTokenizer({len(processor.tokenizer)} pieces, bos 1, eos 2, unk and padding 0),\n)"
    )
    changed = InternVLImageProcessor(28, mean=(0, 0, 0), draft=True)
    assert repr(changed) == (
        "InternVLImageProcessor(size=28, geometry='retrieval', draft=True, mean=(0.0, 0.0, 0.0))"
    )


def test_a_subfolder_of_a_directory(processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    read = InternVLProcessor.from_pretrained(tmp_path, subfolder="processor")
    assert read.image_processor.size == 28


def test_a_cached_repository_is_read_without_the_network(processor, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "models--owner--name"
    processor.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    read = InternVLProcessor.from_pretrained(
        "owner/name", cache_dir=str(tmp_path), local_files_only=True
    )
    assert read.image_processor.to_dict() == processor.image_processor.to_dict()
