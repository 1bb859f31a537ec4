"""Captions of images and answers about them: prompts that QLLaMA continues.

    captions   "English caption:"           the published prompt; "Chinese caption:" works too
    answers    "Question: {} Answer:"

The published captions were made with num_beams=5, max_new_tokens=30, min_new_tokens=8 and images
resized without regard to their aspect. The default here is greedy, several times cheaper.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from ..embedding import Embedder, Outcome
from ..embedding.batches import checked_batch_size, image_batches
from ..embedding.pictures import pictures
from ..generation import generate as static_generate
from ..processing.images import is_one_image
from ..processing.text import CAPTION_PROMPT
from .caption_queue import CaptionQueue, prompt_cache, vision_states
from .settings import check_whole, completed, merged
from .streaming import stream_text

QUESTION = "Question: {} Answer:"
MAX_NEW_TOKENS = 30


def caption(
    engine: Embedder,
    images: Any,
    prompt: str | Iterable[str] | None = None,
    *,
    stream: bool = False,
    **options: Any,
) -> Any:
    """Describes images.

    Args, Returns, Raises: as `Tasks.caption`.
    """
    prompts = checked_texts("caption", CAPTION_PROMPT if prompt is None else prompt)
    if stream:
        return _stream(engine, images, prompts, **options)
    found = [o.value for o in _describe(engine, images, [prompts], keep=False, **options)]
    return [row[0] for row in found] if prompt is None or isinstance(prompt, str) else found


def caption_each(
    engine: Embedder, images: Any, prompt: str | Iterable[str] | None = None, **options: Any
) -> Iterator[Outcome]:
    """Describes one image after another, and goes on where one cannot be used.

    Args: as `Tasks.caption`, without `stream`.

    Yields:
        For every image, in order, as soon as its batch is done: (number, its text or list of texts,
        error or None).
    """
    prompts = checked_texts("caption", CAPTION_PROMPT if prompt is None else prompt)
    outcomes = _describe(engine, images, [prompts], keep=True, **options)
    single = prompt is None or isinstance(prompt, str)
    return (o._replace(value=o.value[0]) if single and o.value else o for o in outcomes)


def answer(
    engine: Embedder,
    images: Any,
    questions: str | Iterable[str] | Iterable[Iterable[str]],
    *,
    template: str = QUESTION,
    stream: bool = False,
    **options: Any,
) -> Any:
    """Answers questions about images.

    Args, Returns, Raises: as `Tasks.answer`.
    """
    if "{}" not in template:
        raise ValueError(f"answer: template {template!r} has no {{}} for the question")
    if isinstance(questions, str):
        prompt = template.replace("{}", questions)
        return caption(engine, images, prompt, stream=stream, **options)
    questions = list(questions)
    if is_one_image(images):
        prompts = [template.replace("{}", text) for text in checked_texts("answer", questions)]
        found = caption(engine, images, prompts, stream=stream, **options)
        return found if stream else found[0]
    if stream:
        raise ValueError("answer: only one image can be streamed")
    asked = [
        [template.replace("{}", text) for text in checked_texts("answer", q)] for q in questions
    ]
    _check_count(len(images) if hasattr(images, "__len__") else len(asked), len(asked))
    if not asked:
        return []
    found = [o.value for o in _describe(engine, images, asked, each=True, keep=False, **options)]
    _check_count(len(found), len(asked))
    return [row[0] if isinstance(q, str) else row for row, q in zip(found, questions, strict=True)]


def _check_count(images: int, questions: int) -> None:
    if images != questions:
        raise ValueError(f"answer: {images} images came with {questions} questions; give one each")


def _describe(
    engine: Embedder,
    images: Any,
    prompts: Sequence[Sequence[str]],
    *,
    each: bool = False,
    keep: bool,
    stop: Iterable[str] = (),
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[Outcome]:
    """The texts of each image, checked here and made as they are asked for.

    Args:
        prompts: of all images, or with `each` those of every image.
        keep: name images that cannot be used, and go on.
    """
    engine.require("captions")
    settings, stop = checked_settings(**settings), checked_texts("caption", stop) if stop else []
    batch_size = checked_batch_size(batch_size)
    processor, options = engine.processor.image_processor, {"keep_errors": keep}
    batches = image_batches(processor, images, batch_size, engine.dtype, **options)

    def asked(number: int) -> Sequence[str]:
        if each and number >= len(prompts):
            _check_count(number + 1, len(prompts))
        return prompts[number if each else 0]

    queue = CaptionQueue(engine, batches, asked, stop, settings)
    return queue.outcomes(batch_size)


def _stream(
    engine: Embedder,
    images: Any,
    prompts: list[str],
    *,
    stop: Iterable[str] = (),
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[str]:
    """Everything is checked here, and runs when the first piece is asked for."""
    engine.require("captions")
    settings, stop = checked_settings(**settings), checked_texts("caption", stop) if stop else []
    if len(prompts) != 1 or settings["num_beams"] != 1:
        raise ValueError("caption: only one prompt can be streamed, with num_beams=1")
    image = list(islice(pictures(images), 2))
    if len(image) != 1:
        raise ValueError("caption: exactly one image can be streamed")
    tokenizer = engine.processor.tokenizer
    ids = tokenizer.encode_prompt(prompts[0]).input_ids.to(engine.device)

    @torch.inference_mode()  # in the thread that runs it
    def generate(**streaming: Any) -> None:
        pixels = engine.processor.image_processor(image, dtype=engine.dtype)
        states = vision_states(engine, pixels)
        cache = prompt_cache(engine, ids, settings)
        static_generate(
            engine.model.generate, visual_features=states, input_ids=ids, past_key_values=cache,
            **settings, **streaming,
        )  # fmt: skip

    return stream_text(generate, tokenizer, stop)


def checked_settings(**given: Any) -> dict[str, Any]:
    """Arguments of transformers' `generate`; lengths as `InternVLModel.generate` counts them."""
    settings, config = merged("caption", **given)
    longest = settings.pop("max_length", None)
    if (
        longest is None
        and config is not None
        and config.max_length != GenerationConfig().max_length
    ):
        longest = config.max_length
    usual = MAX_NEW_TOKENS
    if longest is not None:
        check_whole("caption", "max_length", longest, 2)
        usual = longest - 1  # it counts the BOS
    settings = completed("caption", settings, config, num_beams=1, max_new_tokens=usual)
    least = settings.get("min_new_tokens") or getattr(config, "min_new_tokens", None) or 0
    check_whole("caption", "min_new_tokens", least, 0)
    if least > settings["max_new_tokens"]:
        raise ValueError(
            f"caption: needs min_new_tokens between 0 and max_new_tokens, got {least} and "
            f"{settings['max_new_tokens']}"
        )
    return settings


def checked_texts(name: str, texts: Any) -> list[str]:
    """One text or several as a list."""
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{name}: needs one text or several, none of them empty, got {texts!r}")
    return [str(text) for text in found]
