"""Answers in conversations about images and videos: a chat model continues their prompts.

Greedy by default, and an answer ends where the conversation template says so. Rows of a batch are
padded on the left and may or may not have pictures.

    B conversations, L tokens of the longest prompt, T tiles
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..generation import generate as static_generate
from ..processing.chat_templates import PublishedTemplate
from ..processing.images import is_one_image
from ..processing.message_parts import Message, counted
from ..processing.messages import is_conversation, pictures_of, tiles_of
from ..processing.picture_reading import conversations, of_rows, with_question
from .settings import check_whole, completed, merged
from .streaming import StopAtText, stream_text

MAX_NEW_TOKENS = 1024
GROWING = ("dynamic", "linear", "yarn")  # rotary scalings that go beyond the trained positions


class Work(NamedTuple):
    """Conversations to answer, and how.

    rows: of each the messages, the last one the user's; pictures are not opened yet.
    system: sentence in place of the checkpoint's.
    limits: of pictures.
    settings: for `generate`.
    batch_size: rows at a time.
    """

    rows: list[list[Message]]
    system: str | None
    limits: dict[str, Any]
    settings: dict[str, Any]
    batch_size: int


def prepare(
    images: Any,
    question: Any,
    *,
    messages: Any = None,
    videos: Any = None,
    history: Any = None,
    system_message: str | None = None,
    max_tiles: int | None = None,
    num_frames: int | None = None,
    batch_size: int = 8,
    **generate_kwargs: Any,
) -> tuple[Work, bool]:
    """Reads conversations in every form that `InternVLChat.chat` takes; whether there is only one.

    Args, Raises: as `InternVLChat.chat`.
    """
    settings = _checked(batch_size, **generate_kwargs)
    if question is None and messages is None and _are_messages(images):
        images, messages = None, images
    if messages is not None:
        if question is not None or history is not None:
            raise ValueError("chat: messages hold questions and history; give either")
        single, rows = is_conversation(messages), conversations(messages, images, videos)
    else:
        if question is None:
            raise ValueError("chat: needs a question, or messages")
        single = isinstance(question, str)
        if not single and (isinstance(question, bytes) or not isinstance(question, Iterable)):
            raise TypeError(f"chat: a question must be a text, or several, got {question!r:.60}")
        asked = [question] if single else list(question)
        given = [images], [videos], [history]
        if not single:
            given = _of_questions(len(asked), images, videos, history)
        rows = [
            with_question(before, text, pictures, films)
            for text, pictures, films, before in zip(asked, *given, strict=True)
        ]
    if any(row[-1].role != "user" for row in rows):
        raise ValueError("chat: the last message must be the user's")
    limits = {"max_tiles": max_tiles, "num_frames": num_frames}
    return Work(rows, system_message, limits, settings, batch_size), single


def answers(engine: Any, work: Work) -> Iterator[tuple[str, list[Message]]]:
    """The answers in order, each with the messages that it answers.

    Pictures are opened for a batch at a time: their tiles need memory.
    """
    for start in range(0, len(work.rows), work.batch_size):
        numbers = range(start, min(start + work.batch_size, len(work.rows)))
        rows = [_opened(engine, work, number) for number in numbers]
        yield from zip(_answer(engine, rows, work), rows, strict=True)


def stream(engine: Any, work: Work) -> tuple[Iterator[str], list[Message]]:
    """The pieces of the answer to the only conversation, and its messages.

    It is checked here, and runs when the first piece is asked for.
    """
    if len(work.rows) != 1 or work.settings["num_beams"] != 1:
        raise ValueError("chat: only one conversation can be streamed, with num_beams=1")
    if work.settings.get("assistant_model") or work.settings.get("prompt_lookup_num_tokens"):
        raise ValueError("chat: assisted generation cannot be streamed")
    row = _opened(engine, work, 0)
    inputs, settings = _inputs(engine, [row], work)

    @torch.inference_mode()  # in the thread that runs it
    def generate(**streaming: Any) -> None:
        static_generate(engine.model.generate, **inputs, **settings, **streaming)

    prompts = engine.processor.prompts
    return stream_text(generate, prompts, prompts.stop_texts), row


def _opened(engine: Any, work: Work, number: int) -> list[Message]:
    try:
        return engine.processor.opened(work.rows[number], **work.limits)
    except (ValueError, OSError, TypeError) as error:
        if len(work.rows) == 1:
            raise
        raise type(error)(f"conversation {number}: {error}") from error


@torch.inference_mode()
def _answer(engine: Any, rows: Sequence[Sequence[Message]], work: Work) -> list[str]:
    inputs, settings = _inputs(engine, rows, work)
    words = engine.processor.prompts
    if words.separator and words.stop_token_id is None:
        settings["stopping_criteria"] = [StopAtText(words, [words.separator])]
    ids = static_generate(engine.model.generate, **inputs, **settings)
    ends = settings.get("eos_token_id") or _ends_of(engine.model)
    return [words.answer(_up_to(row, ends)) for row in ids.tolist()]


def _inputs(
    engine: Any, rows: Sequence[Sequence[Message]], work: Work
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and settings of `generate`; the prompts are checked against the context."""
    processor, model = engine.processor, engine.model
    batch: dict[str, Any] = processor.encode([processor.prompt(row, work.system) for row in rows])
    lengths = batch["attention_mask"].sum(1).tolist()
    tiles = [tiles_of(pictures_of(row)) for row in rows]
    room = context_of(model.config.llm_config) - max(lengths)
    if room < 1:
        longest = lengths.index(max(lengths))
        count = sum(map(len, tiles[longest]))
        images = f"{counted(count, 'tile')} of images among them ({processor.num_image_token} each)"
        raise ValueError(
            f"chat: the prompt has {max(lengths)} tokens, {images if count else 'no image'}, and "
            f"the context {room + max(lengths)}; give "
            f"{'fewer or smaller images (max_tiles=)' if count else 'a shorter text'}, or less "
            "history"
        )
    found = [t for row in tiles for t in row]
    if found:
        pixels = processor.image_processor.pixel_values(found, dtype=engine.dtype)
        batch["pixel_values"] = pixels.to(engine.device)
    inputs = {name: value.to(engine.device) for name, value in batch.items()}
    words = processor.prompts
    settings = {"pad_token_id": words.pad_token_id, **work.settings}
    if words.stop_token_id is not None:
        # The published chat stops at the separator alone, transformers at the model's ends too.
        own = [] if isinstance(words.template, PublishedTemplate) else _ends_of(model)
        settings.setdefault("eos_token_id", list(dict.fromkeys([words.stop_token_id, *own])))
    for name in ("max_new_tokens", "min_new_tokens"):
        if settings.get(name):
            settings[name] = min(settings[name], room)
    return inputs, settings


def context_of(config: Any) -> int:
    """The most positions of a language model; a scaling that grows with the text extends them."""
    most = getattr(config, "max_position_embeddings", None) or 2**31
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    scaling = scaling if isinstance(scaling, dict) else {}
    grows = scaling.get("rope_type", scaling.get("type")) in GROWING
    return int(most * (scaling.get("factor") or 1)) if grows else most


def _up_to(ids: list[int], ends: Iterable[int]) -> list[int]:
    """The ids before the first of those that end an answer."""
    places = [ids.index(end) for end in ends if end in ids]
    return ids[: min(places, default=len(ids))]


def _ends_of(model: Any) -> list[int]:
    config = getattr(model.language_model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _are_messages(given: Any) -> bool:
    """Whether what came first is a conversation, or several."""
    if not isinstance(given, list | tuple) or not given:
        return False
    if all(isinstance(item, list | tuple) and not isinstance(item, Message) for item in given):
        given = [message for item in given for message in item]
    return all(isinstance(m, Message) or (isinstance(m, dict) and "role" in m) for m in given)


def _of_questions(count: int, images: Any, videos: Any, history: Any) -> tuple[Any, Any, Any]:
    """What belongs to each of several questions; one image, video or history is for all."""
    if images is not None and is_one_image(images):
        images = [images] * count
    if isinstance(videos, str | os.PathLike):
        videos = [videos] * count
    if is_conversation(history):
        history = [history] * count
    named = ((images, "images"), (videos, "videos"), (history, "histories"))
    return tuple(of_rows(given, count, name) for given, name in named)  # type: ignore[return-value]


def _checked(batch_size: Any, **given: Any) -> dict[str, Any]:
    """Arguments of transformers' `generate`."""
    given, config = merged("chat", **given)
    settings = completed("chat", given, config, max_new_tokens=MAX_NEW_TOKENS, num_beams=1)
    check_whole("chat", "batch_size", batch_size)
    if isinstance(settings.get("eos_token_id"), int):
        settings["eos_token_id"] = [settings["eos_token_id"]]
    return settings if config is not None else {"do_sample": False, **settings}
