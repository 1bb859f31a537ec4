"""The tasks as methods of the engine: how they are called, and what they mean."""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..embedding import Embedder, Mode, Outcome

if TYPE_CHECKING:
    from .classifier import Progress
    from .classify import Prediction, Template
    from .describe import Description


class Tasks(Embedder):
    """What an engine does with single images; each task is a file, opened at its first use."""

    def classify(
        self,
        images: Any,
        labels: Iterable[str],
        *,
        templates: "Template | Iterable[Template] | None" = None,
        mode: Mode = "c",
        top_k: int | None = None,
        batch_size: int | None = None,
        cache: str | os.PathLike | bool = True,
        progress: "Progress | None" = None,
    ) -> "list[list[Prediction]]":
        """Zero-shot classification: the labels of images with their probabilities.

        Args:
            images: as `encode_image` takes them.
            labels: K labels, of which each image is taken to have one: a list, array, set, series,
                generator ... Their order is kept, and so are labels that come twice or are empty.
            templates: prompts with {} (or a name, {c}) in the place of the label, or functions
                from a label to a prompt; one or several, whose embeddings are averaged. None is
                "a photo of a {}.".
            mode: "c" or "g".
            top_k: how many labels of each image; None is all.
            batch_size: images at a time; None is what memory allows.
            cache: the folder on disk where the labels' embeddings are kept, if they took long to
                make; True is the user's (see tasks/classifier_files.py), False none.
            progress: called with (prompts done, prompts in all) while labels are embedded.

        Returns:
            One list for each image, also for a single one: its labels as (label, probability), the
            most likely first.

        Raises:
            ValueError: no labels, a template without a place for the label, or what `encode_image`
                and `encode_text` refuse.
        """
        from .classify import classify

        return classify(self, images, labels, templates, mode, top_k, batch_size, cache, progress)

    def classify_each(
        self,
        images: Any,
        labels: Iterable[str],
        *,
        templates: "Template | Iterable[Template] | None" = None,
        mode: Mode = "c",
        top_k: int | None = None,
        batch_size: int | None = None,
        cache: str | os.PathLike | bool = True,
        progress: "Progress | None" = None,
    ) -> Iterator[Outcome]:
        """As `classify`, one image after another, going on where an image cannot be used.

        Yields:
            For every image, in order, (number, value, error): its list, or why there is none.
        """
        from .classify import classify_each

        return classify_each(
            self, images, labels, templates, mode, top_k, batch_size, cache, progress
        )

    def caption(
        self,
        images: Any,
        prompt: str | Iterable[str] | None = None,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        stream: bool = False,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Describes images.

        Args:
            images: as `encode_image` takes them.
            prompt: what the description continues; None is "English caption:". Several prompts are
                continued for every image, which is read once.
            num_beams: beams of the search; None is 1, greedy.
            max_new_tokens, min_new_tokens: of every description; None is 30 and 0.
            stop: a description ends before the first of these texts.
            stream: yield the description of one image in pieces, as it is made.
            batch_size: descriptions at a time.
            generate_kwargs: any of transformers' `generate`, such as do_sample and temperature;
                generation_config may be a dict, and says what is None here.

        Returns:
            A list with one text for each image, also for a single one; for several prompts one list
            of texts for each image; for `stream` an iterator over the pieces of the only text.

        Raises:
            ValueError: no prompt, more than one image, prompt or beam to stream, or what the image
                processor and `generate` refuse.
        """
        from .caption import caption

        return caption(
            self, images, prompt, num_beams=num_beams, max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens, stop=stop, stream=stream, batch_size=batch_size,
            **generate_kwargs,
        )  # fmt: skip

    def caption_each(
        self,
        images: Any,
        prompt: str | Iterable[str] | None = None,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Iterator[Outcome]:
        """As `caption`, one image after another, going on where an image cannot be used.

        Yields:
            For every image, in order and as soon as its batch is done, (number, value, error): its
            text (a list of texts for several prompts), or why there is none.
        """
        from .caption import caption_each

        return caption_each(
            self, images, prompt, num_beams=num_beams, max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens, stop=stop, batch_size=batch_size, **generate_kwargs,
        )  # fmt: skip

    def describe(
        self,
        images: Any,
        prompt: str | Iterable[str] | None = None,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        normalize: bool = True,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> "list[Description]":
        """Captions and embeddings of images from one pass over each.

        Args:
            images, prompt, num_beams, max_new_tokens, min_new_tokens, stop, batch_size,
                generate_kwargs: as `caption` takes them.
            normalize: embeddings of unit length; otherwise as the model gives them.

        Returns:
            One Description for each image, also for a single one: its text (a list of texts for
            several prompts), and its embeddings c and g, (E,) float32 on the model's device.

        Raises:
            ValueError: parts that were not loaded, or what `caption` and `encode_image` refuse.
        """
        from .describe import describe_each

        outcomes = describe_each(
            self, images, prompt, keep=False, normalize=normalize, num_beams=num_beams,
            max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=stop,
            batch_size=batch_size, **generate_kwargs,
        )  # fmt: skip
        return [outcome.value for outcome in outcomes]

    def answer(
        self,
        images: Any,
        questions: str | Iterable[str] | Iterable[Iterable[str]],
        *,
        template: str = "Question: {} Answer:",
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        stream: bool = False,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Answers questions about images.

        Args:
            images: as `encode_image` takes them.
            questions: one question, asked of every image; or several, all asked of a single image,
                or as many as images, one each; or a list of questions for each image.
            template: the prompt, with {} in the place of the question.
            num_beams, max_new_tokens, min_new_tokens, stop, batch_size, generate_kwargs: as
                `caption`.
            stream: yield the answer to one question about one image in pieces, as it is made.

        Returns:
            A list with one answer for each image, or for each question to a single image; where an
            image came with a list of questions, a list of answers. For `stream` an iterator over
            the pieces of the only answer.

        Raises:
            ValueError: as many questions as images are needed, or what `caption` refuses.
        """
        from .caption import answer

        return answer(
            self, images, questions, template=template, num_beams=num_beams,
            max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=stop, stream=stream,
            batch_size=batch_size, **generate_kwargs,
        )  # fmt: skip
