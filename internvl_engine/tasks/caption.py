"""Captions of images and answers about them: prompts that QLLaMA continues.

    captions   "English caption:"           the published prompt; "Chinese caption:" works too
    answers    "Question: {} Answer:"

The published captions were made with num_beams=5, max_new_tokens=30, min_new_tokens=8 and images
resized without regard to their aspect. The default here is greedy, several times cheaper.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..generation import KVCache
from ..processing.images import is_one_image
from ..processing.text import CAPTION_PROMPT
from .batches import image_batches
from .embedder import Embedder
from .streaming import StopAtText, cut, stream_text

QUESTION = "Question: {} Answer:"


def caption(
    engine: Embedder,
    images: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    num_beams: int = 1,
    max_new_tokens: int = 30,
    min_new_tokens: int = 0,
    stop: Sequence[str] = (),
    stream: bool = False,
    batch_size: int = 8,
    **generate_kwargs: Any,
) -> Any:
    """Describes images.

    Args:
        engine: with the parts for captions.
        images: as `Embedder.encode_image` takes them.
        prompt: what the description continues; None is "English caption:". Several prompts are
            continued for every image, which is read once.
        num_beams: beams of the search; 1 is greedy.
        max_new_tokens, min_new_tokens: of every description.
        stop: a description ends before the first of these texts.
        stream: yield the description of one image in pieces, as it is made.
        batch_size: descriptions at a time.
        generate_kwargs: any of transformers' `generate`, such as do_sample and temperature.

    Returns:
        One text for each image; for several prompts one list of texts for each image; for `stream`
        an iterator over the pieces of the only text.

    Raises:
        ValueError: no prompt, more than one image, prompt or beam to stream, or what the image
            processor and `generate` refuse.
    """
    prompts = _texts("caption", CAPTION_PROMPT if prompt is None else prompt)
    settings = generate_kwargs | {
        "num_beams": num_beams,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
    }
    if stream:
        if len(prompts) != 1 or num_beams != 1:
            raise ValueError("caption: only one prompt can be streamed, with num_beams=1")
        return _stream(engine, images, prompts[0], stop, settings)
    texts = list(_describe(engine, images, [prompts], stop=stop, batch_size=batch_size, **settings))
    return [row[0] for row in texts] if prompt is None or isinstance(prompt, str) else texts


def answer(
    engine: Embedder,
    images: Any,
    questions: str | Sequence[str] | Sequence[Sequence[str]],
    *,
    template: str = QUESTION,
    **options: Any,
) -> Any:
    """Answers questions about images.

    Args:
        engine: with the parts for captions.
        images: as `Embedder.encode_image` takes them.
        questions: one question, asked of every image; or several, all asked of a single image, or
            as many as images, one each; or a list of questions for each image.
        template: the prompt, with {} in the place of the question.
        options: of `caption`: num_beams, stop, stream, batch_size ...

    Returns:
        One answer for each image, or for each question to a single image; where an image came with
        a list of questions, a list of answers. For `stream` an iterator over the only answer.

    Raises:
        ValueError: as many questions as images are needed, or what `caption` refuses.
    """
    if "{}" not in template:
        raise ValueError(f"answer: template {template!r} has no {{}} for the question")
    if isinstance(questions, str):
        return caption(engine, images, template.replace("{}", questions), **options)
    if is_one_image(images):
        prompts = [template.replace("{}", text) for text in _texts("answer", questions)]
        found = caption(engine, images, prompts, **options)
        return found if options.get("stream") else found[0]
    images = list(images)
    if len(images) != len(questions):
        raise ValueError(
            f"answer: {len(images)} images came with {len(questions)} questions; give one each"
        )
    if options.pop("stream", False):
        raise ValueError("answer: only one image can be streamed")
    asked = [[template.replace("{}", text) for text in _texts("answer", q)] for q in questions]
    texts = _describe(engine, images, asked, **options)
    return [row[0] if isinstance(q, str) else row for row, q in zip(texts, questions, strict=True)]


def _describe(
    engine: Embedder,
    images: Any,
    prompts: Sequence[Sequence[str]],
    *,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[list[str]]:
    """The texts of each image: one for each of its prompts, or of the only prompts for all."""
    engine.require("captions")
    settings, stop = _checked(**settings), _texts("caption", stop) if stop else []
    of_image = iter(prompts) if len(prompts) > 1 else iter(lambda: prompts[0], None)
    for states in _vision_states(engine, images, batch_size):
        asked = list(islice(of_image, len(states)))
        rows = [(place, text) for place, texts in enumerate(asked) for text in texts]
        found: list[str] = []
        for start in range(0, len(rows), batch_size):
            places, texts = zip(*rows[start : start + batch_size], strict=True)
            found += _continue(engine, states[list(places)], texts, stop, settings)
        answers = iter(found)
        yield from (list(islice(answers, len(texts))) for texts in asked)


def _vision_states(engine: Embedder, images: Any, batch_size: int) -> Iterator[Tensor]:
    """(batch, N, C_v) vision features, one pass over each image."""
    processor = engine.processor.image_processor
    for pixels in image_batches(processor, images, batch_size, engine.dtype):
        with torch.no_grad():
            yield engine.model.vision_model(pixel_values=pixels.to(engine.device))[0]


def _continue(
    engine: Embedder,
    states: Tensor,
    prompts: Sequence[str],
    stop: Sequence[str],
    settings: dict[str, Any],
) -> list[str]:
    """The continuation of each prompt, after the vision features of its row."""
    tokenizer = engine.processor.tokenizer
    ids, mask = (t.to(engine.device) for t in tokenizer.encode_prompt(list(prompts)))
    if stop:
        settings = settings | {"stopping_criteria": [StopAtText(tokenizer, stop)]}
    ids = engine.model.generate(
        visual_features=states,
        input_ids=ids,
        attention_mask=mask,
        past_key_values=_cache(engine, ids, settings),
        **settings,
    )
    return [cut(text, stop).strip() for text in tokenizer.batch_decode(ids)]


def _cache(engine: Embedder, ids: Tensor, settings: dict[str, Any]) -> KVCache:
    """A cache for the queries, the prompts ids (B, L) and what is to come."""
    config = engine.model.config
    length = config.num_query_token + ids.shape[1] + settings["max_new_tokens"]
    return KVCache(config.qllama_config, length)


def _stream(
    engine: Embedder, images: Any, prompt: str, stop: Sequence[str], settings: dict[str, Any]
) -> Iterator[str]:
    """Everything is checked here, and runs when the first piece is asked for."""
    engine.require("captions")
    image = [images] if is_one_image(images) else list(islice(images, 2))
    if len(image) != 1:
        raise ValueError("caption: exactly one image can be streamed")
    settings, stop = _checked(**settings), _texts("caption", stop) if stop else []
    tokenizer = engine.processor.tokenizer
    ids = tokenizer.encode_prompt(prompt).input_ids.to(engine.device)

    def generate(**streaming: Any) -> None:
        (states,) = _vision_states(engine, image, 1)
        cache = _cache(engine, ids, settings)
        engine.model.generate(
            visual_features=states, input_ids=ids, past_key_values=cache, **settings, **streaming
        )

    return stream_text(generate, tokenizer, stop)


def _checked(
    num_beams: int = 1, max_new_tokens: int = 30, min_new_tokens: int = 0, **others: Any
) -> dict[str, Any]:
    """Arguments of transformers' `generate`."""
    for name in ("num_return_sequences", "return_dict_in_generate", "stopping_criteria"):
        if others.get(name):
            raise ValueError(f"caption: {name} is not for texts; call model.generate for it")
    if num_beams < 1 or max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            "caption: needs num_beams and max_new_tokens of 1 or more, and min_new_tokens between "
            f"0 and max_new_tokens, got {num_beams}, {max_new_tokens} and {min_new_tokens}"
        )
    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, **others}
    return settings | ({"min_new_tokens": min_new_tokens} if min_new_tokens else {})


def _texts(name: str, texts: Any) -> list[str]:
    """One text or several as a list."""
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{name}: needs one text or several, none of them empty, got {texts!r}")
    return found
