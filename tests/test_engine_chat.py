"""InternVLChat: answers in every form of asking, history, streams, folders, misuse."""

import copy
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from tiny_chat import CONFIG, SIDE, TOKENS, picture, tiny_chat, tokenizer
from transformers import GenerationConfig

from internvl_engine import InternVL, InternVLChat, VisionLanguageProcessor
from internvl_engine.processing import ImageError, InternVLTileProcessor
from internvl_engine.processing.picture_reading import with_question

IMAGE, SMALL, ASKED = picture(), picture(20, 20), "What is this?"
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def engine():
    return tiny_chat()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same engine in both layouts."""
    engine, root = tiny_chat(), tmp_path_factory.mktemp("chat")
    for layout in ("published", "transformers"):
        engine.model.save_pretrained(root / layout, layout=layout)
        engine.processor.save_pretrained(root / layout, layout=layout)
    return root


def by_hand(engine, **prompt) -> str:
    """The answer by the model and the processor alone."""
    inputs = engine.processor(**prompt)
    stop = engine.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    pad = engine.processor.tokenizer.pad_token_id
    options = {"eos_token_id": stop, "pad_token_id": pad, "do_sample": False, **SHORT}
    ids = engine.model.generate(**inputs, **options)[0].tolist()
    ids = ids[: ids.index(stop)] if stop in ids else ids
    return engine.processor.decode(ids).strip()


def test_an_answer_is_what_the_model_says(engine):
    expected = by_hand(engine, messages=[{"role": "user", "content": ASKED}], images=IMAGE)
    assert engine.chat(IMAGE, ASKED, **SHORT) == expected and expected
    assert engine.chat(SMALL, ASKED, **SHORT) != expected  # the picture matters
    text_only = by_hand(engine, messages=[{"role": "user", "content": ASKED}])
    assert engine.chat(question=ASKED, **SHORT) == engine.chat(None, ASKED, **SHORT) == text_only


def test_forms_of_asking_agree(engine):
    part, text = {"type": "image", "image": IMAGE}, {"type": "text", "text": ASKED}
    expected = engine.chat(IMAGE, ASKED, **SHORT)
    for form in (
        {"messages": [{"role": "user", "content": [part, text]}]},
        {"images": [{"role": "user", "content": [part, text]}]},
        {"messages": [{"role": "user", "content": f"<image>\n{ASKED}"}], "images": [IMAGE]},
        {"images": [IMAGE], "question": f"<image>\n{ASKED}"},
        {"images": IMAGE, "question": ASKED, "system_message": "Be brief."},
    ):
        assert engine.chat(**form, **SHORT) == expected
    assert engine.chat(IMAGE, ASKED, system_message="Sing.", **SHORT) != expected


def test_several_images_and_videos(engine):
    prompt = f"Image-1: <image>\nImage-2: <image>\n{ASKED}"
    expected = by_hand(engine, messages=[{"role": "user", "content": prompt}],
                       images=[IMAGE, SMALL])  # fmt: skip
    assert engine.chat([IMAGE, SMALL], ASKED, **SHORT) == expected
    frames = [picture(40, 30, seed) for seed in range(3)]
    prompt = "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>\n" + ASKED
    expected = by_hand(engine, messages=[{"role": "user", "content": prompt}], images=frames,
                       max_tiles=1)  # fmt: skip
    for video in (frames, np.stack(frames)):
        assert engine.chat(videos=video, question=ASKED, **SHORT) == expected


def test_batches_answer_as_single_questions_do(engine):
    images, questions = [IMAGE, None, [SMALL, IMAGE], SMALL], ["a?", "b?", "c?", "longer d?"]
    single = [engine.chat(i, q, **SHORT) for i, q in zip(images, questions, strict=True)]
    assert engine.chat(images, questions, **SHORT) == single
    assert engine.chat(images, questions, batch_size=3, **SHORT) == single
    assert engine.chat(IMAGE, questions[:1], **SHORT) == single[:1]
    both = engine.chat(IMAGE, ["a?", "b?"], **SHORT)
    assert both == [single[0], engine.chat(IMAGE, "b?", **SHORT)]
    rows = [[{"role": "user", "content": q}] for q in questions]
    assert engine.chat(messages=rows[:2], **SHORT) == engine.chat(None, questions[:2], **SHORT)


def test_history_keeps_the_pictures(engine):
    answer, history = engine.chat(IMAGE, ASKED, return_history=True, **SHORT)
    assert answer == engine.chat(IMAGE, ASKED, **SHORT)
    assert [message.role for message in history] == ["user", "assistant"]
    assert history[1].text == answer
    before = copy.deepcopy(history)
    messages = [(f"<image>\n{ASKED}", answer), {"role": "user", "content": "And?"}]
    expected = by_hand(engine, messages=messages, images=IMAGE)
    assert engine.chat(question="And?", history=history, **SHORT) == expected
    assert engine.chat(IMAGE, "And?", history=messages[:1], **SHORT) == expected  # as published
    assert [m.text for m in history] == [m.text for m in before]  # it is a value
    again, longer = engine.chat(SMALL, "And?", history=history, return_history=True, **SHORT)
    assert len(longer) == 4 and [len(m.pictures) for m in longer] == [1, 0, 1, 0]
    assert again != expected
    pairs = engine.chat([IMAGE, None], ["a?", "b?"], return_history=True, **SHORT)
    histories = [history for _, history in pairs]
    shared = engine.chat(None, ["x?", "y?"], history=history, **SHORT)
    assert shared == [engine.chat(None, q, history=history, **SHORT) for q in ("x?", "y?")]
    assert engine.chat(None, ["x?", "y?"], history=histories, **SHORT) == [
        engine.chat(None, q, history=h, **SHORT)
        for q, h in zip(["x?", "y?"], histories, strict=True)
    ]


def test_streams_give_the_answer_in_pieces(engine):
    expected, history = engine.chat(IMAGE, ASKED, return_history=True, **SHORT)
    stream = engine.chat(IMAGE, ASKED, stream=True, **SHORT)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer == expected and len(pieces) > 1
    assert [m.text for m in stream.history] == [m.text for m in history]
    stream = engine.chat(IMAGE, ASKED, stream=True, max_new_tokens=400)
    first = next(stream)
    stream.close()
    assert stream.history[-1].text == first
    assert not [t for t in threading.enumerate() if t.name == "generate"]


def test_an_answer_ends_at_the_separator(engine):
    stop = engine.processor.prompts.stop_token_id
    ids = engine.model.generate(
        **engine.processor(messages=[{"role": "user", "content": ASKED}], images=IMAGE), **SHORT
    )[0].tolist()
    word = engine.processor.decode(ids[2:3])
    own = copy.copy(engine)
    own.processor = copy.copy(engine.processor)
    own.processor.prompts = copy.copy(engine.processor.prompts)
    template = engine.processor.prompts.template
    # a separator that is a token of the answer, and one that is only a text
    for separator in (word, engine.processor.decode(ids[2:4])):
        own.processor.prompts.template = type(template)(
            "own", template.system, template.system_end, template.user, template.user_end,
            template.assistant, separator,
        )  # fmt: skip
        expected = engine.processor.decode(ids).split(separator)[0].strip()
        assert own.chat(IMAGE, ASKED, **SHORT) == expected
        assert "".join(own.chat(IMAGE, ASKED, stream=True, **SHORT)) == expected
    assert stop == engine.processor.prompts.stop_token_id


@pytest.mark.parametrize("layout, ends", [("published", False), ("transformers", True)])
def test_other_ends_of_the_language_model(folders, layout, ends):
    """The published chat goes on after them; transformers' does not."""
    read = InternVLChat.from_pretrained(folders / layout, dtype="float32", accelerate=False)
    whole = read.chat(IMAGE, ASKED, **SHORT)
    first = read.processor.tokenizer(whole)["input_ids"][0]
    read.model.language_model.generation_config.eos_token_id = [first]
    assert read.chat(IMAGE, ASKED, **SHORT) == ("" if ends else whole)


def test_options_of_generate(engine):
    greedy = engine.chat(IMAGE, ASKED, **SHORT)
    torch.manual_seed(0)
    sampled = {
        engine.chat(IMAGE, ASKED, do_sample=True, temperature=3.0, **SHORT) for _ in range(3)
    }
    assert len(sampled | {greedy}) > 2
    assert engine.chat(IMAGE, ASKED, num_beams=3, **SHORT)
    one = engine.chat(IMAGE, ASKED, max_tiles=1, **SHORT)
    assert one != greedy


def test_the_context_ends_an_answer(engine):
    question = "a " * 470
    length = engine.processor(messages=[{"role": "user", "content": question}])["input_ids"].shape[
        1
    ]
    options = {"max_new_tokens": 600, "min_new_tokens": 600}
    stream = engine.chat(question=question, stream=True, **options)
    assert "".join(stream) == engine.chat(question=question, **options)
    made: list[int] = []
    own = copy.copy(engine)
    own.model = copy.copy(engine.model)
    own.model.generate = lambda **o: made.append(o["max_new_tokens"]) or torch.tensor([[0]])
    own.chat(question=question, **options)
    assert made == [512 - length] and made[0] > 10


@pytest.mark.parametrize("call, error, message", [
    ({}, ValueError, "needs a question, or messages"),
    ({"images": IMAGE}, ValueError, "needs a question"),
    ({"question": 5}, TypeError, "a question must be a text, or several, got 5"),
    ({"question": ["a", 5]}, TypeError, "a question must be a text, got int"),
    ({"question": "a", "messages": [("a", "b")]}, ValueError, "give either"),
    ({"messages": [("a", "b")]}, ValueError, "the last message must be the user's"),
    ({"images": "gone.jpg", "question": "a"}, FileNotFoundError, "image 0: gone.jpg"),
    ({"images": [IMAGE, b"no"], "question": "a"}, ImageError, "image 1: image given as bytes"),
    ({"images": IMAGE, "question": "<image> <image>"}, ValueError, "1 image came with 2 places"),
    ({"question": "<image>"}, ValueError, "0 images came with 1 place "),
    ({"images": [IMAGE, SMALL], "question": ["a"]}, ValueError, "1 conversation came with 2 im"),
    ({"images": [IMAGE] * 40, "question": "a"}, ValueError,
     r"prompt has 8\d\d tokens, 120 tiles of images among them \(4 each\), and the context 512"),
    ({"question": "x " * 600}, ValueError, "has .* tokens, no image, .* give a shorter text"),
    ({"question": "\udcff"}, ValueError, "not valid Unicode"),
    ({"images": IMAGE, "question": "<IMG_CONTEXT>"}, ValueError, "13 placeholders .* 12 features"),
    ({"question": "a", "history": "abc"}, TypeError, "messages must be a list"),
    ({"question": "a", "max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number"),
    ({"question": "a", "batch_size": 0}, ValueError, "batch_size must be a whole number"),
    ({"question": "a", "num_return_sequences": 2, "num_beams": 2}, ValueError, "is not for texts"),
    ({"question": "a", "temprature": 1}, ValueError, "temprature"),
    ({"question": "a", "stream": True, "num_beams": 2}, ValueError, "only one conversation can be"),
    ({"question": ["a", "b"], "stream": True}, ValueError, "only one conversation can be streamed"),
    ({"images": [IMAGE, "gone"], "question": ["a", "b"]}, FileNotFoundError,
     "conversation 1: image 0: gone"),
    ({"question": ["a", "b"], "history": [[("a", "b")]]}, ValueError, "came with 1 histories"),
    ({"images": IMAGE, "question": "a", "max_tiles": 0}, ValueError, "max_tiles must be a whole"),
])  # fmt: skip
def test_misuse_is_named_before_anything_is_computed(engine, monkeypatch, call, error, message):
    monkeypatch.setattr(type(engine.model.vision_model), "forward", None)
    with pytest.raises(error, match=message):
        engine.chat(**SHORT | call)


@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("accelerate", [False, True])
def test_folders_of_both_layouts(engine, folders, layout, accelerate):
    read = InternVLChat.from_pretrained(
        folders / layout, dtype="float32", accelerate=accelerate, device="cpu"
    )
    assert read.chat(IMAGE, ASKED, **SHORT) == engine.chat(IMAGE, ASKED, **SHORT)
    assert (read.report is not None) == accelerate and str(folders / layout) in repr(read)
    if accelerate:
        assert read.report.replaced


@pytest.mark.parametrize("fused", [False, True])
def test_transformers_own_model_says_the_same(engine, folders, fused):
    from transformers import InternVLForConditionalGeneration

    from internvl_engine import accelerate

    theirs = (
        InternVLForConditionalGeneration.from_pretrained(folders / "transformers").float().eval()
    )
    if fused:
        assert accelerate(theirs).replaced
    images, questions = [IMAGE, None, [SMALL, IMAGE]], ["a?", "longer b?", "<image> and <image>?"]
    given = zip(images, questions, strict=True)
    rows = [engine.processor.opened(with_question(None, q, i)) for i, q in given]
    inputs = engine.processor(messages=rows)
    words = engine.processor.prompts
    options = {"eos_token_id": words.stop_token_id, "pad_token_id": words.pad_token_id, **SHORT}
    ids = theirs.generate(**inputs, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]
    ends = [row.tolist().index(words.stop_token_id) if words.stop_token_id in row else None
            for row in ids]  # fmt: skip
    said = [words.answer(row[:end]) for row, end in zip(ids, ends, strict=True)]
    assert said == engine.chat(images, questions, **SHORT)


def test_default_dtype_and_device_change_nothing(engine):
    expected = engine.chat([IMAGE, None], ["a?", "b?"], **SHORT)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert engine.chat([IMAGE, None], ["a?", "b?"], **SHORT) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_published_generation_config(engine):
    config = {"max_new_tokens": 3, "do_sample": False}
    assert engine.chat(IMAGE, ASKED, generation_config=config) == engine.chat(
        IMAGE, ASKED, max_new_tokens=3
    )
    longer = engine.chat(IMAGE, ASKED, generation_config=config, **SHORT)
    assert longer == engine.chat(IMAGE, ASKED, **SHORT)
    given = GenerationConfig(max_new_tokens=3)
    assert engine.chat(IMAGE, ASKED, generation_config=given) == engine.chat(
        IMAGE, ASKED, max_new_tokens=3
    )


def test_settings_of_the_processor_at_loading(folders):
    read = InternVLChat.from_pretrained(
        folders / "published", max_tiles=2, template="phi3-chat", system_message="Sing.",
        accelerate=False,
    )  # fmt: skip
    assert read.processor.image_processor.max_tiles == 2
    assert read.processor.prompts.template.name == "phi3-chat"
    assert read.processor.system_message == "Sing."


def test_folders_of_other_families(folders):
    from internvl_engine.assets import nano_directory

    with pytest.raises(ValueError, match="InternVL-14B checkpoint, not a chat checkpoint"):
        InternVLChat.from_pretrained(nano_directory())
    with pytest.raises(ValueError, match="InternVLChat take it"):
        InternVL.from_pretrained(folders / "published")
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        InternVLChat.from_pretrained(folders / "gone")


def test_a_processor_of_another_model_is_refused(engine):
    for size, tokens in ((56, TOKENS), (SIDE, 16)):
        other = VisionLanguageProcessor(
            InternVLTileProcessor(size), tokenizer(), num_image_token=tokens, template="Hermes-2"
        )
        with pytest.raises(ValueError, match="model takes 28 pixels and 4 tokens"):
            InternVLChat(engine.model, other, accelerate=False)
    with pytest.raises(TypeError, match="got Linear and VisionLanguageProcessor"):
        InternVLChat(torch.nn.Linear(1, 1), engine.processor)
    words = tokenizer(added=False)
    words.add_tokens([f"<{i}>" for i in range(200)])
    words.add_tokens(["<IMG_CONTEXT>"], special_tokens=True)
    other = VisionLanguageProcessor(InternVLTileProcessor(SIDE), words, num_image_token=TOKENS)
    with pytest.raises(ValueError, match="id 540, the model has 400 embeddings"):
        InternVLChat(engine.model, other, accelerate=False)


def test_several_threads(engine):
    questions = [f"{number}?" for number in range(8)]
    expected = [engine.chat(IMAGE, q, **SHORT) for q in questions]
    found: dict[int, str] = {}

    def work(number: int) -> None:
        found[number] = engine.chat(IMAGE, questions[number], **SHORT)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(8)] == expected


def test_engines_are_passed_on_as_bytes(engine):
    pickler = multiprocessing.reduction.ForkingPickler
    again = pickler.loads(pickler.dumps(engine))
    assert again.chat(IMAGE, ASKED, **SHORT) == engine.chat(IMAGE, ASKED, **SHORT)


def test_the_context_grows_with_the_rotary_scaling():
    from types import SimpleNamespace as Config

    from internvl_engine.tasks.chat import context_of

    most = CONFIG["llm_config"]["max_position_embeddings"]
    assert context_of(Config(max_position_embeddings=most)) == most
    scaled = {"rope_type": "dynamic", "factor": 2.0}
    assert context_of(Config(max_position_embeddings=most, rope_scaling=scaled)) == 2 * most
    own = {"rope_type": "longrope", "factor": 2.0}  # its positions are those of the long table
    assert context_of(Config(max_position_embeddings=most, rope_parameters=own)) == most
