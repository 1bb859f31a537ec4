"""The engine of the chat family: conversations about images and videos.

engine = InternVLChat.from_pretrained("OpenGVLab/InternVL3-1B")
engine.chat("photo.jpg", "What is this?")
answer, history = engine.chat("photo.jpg", "What is this?", return_history=True)
engine.chat(question="And the colour?", history=history)
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..processing.message_parts import Message
from .weights import accelerated, passed_as_bytes

if TYPE_CHECKING:
    from ..modeling.chat import VisionLanguageModel
    from ..processing import VisionLanguageProcessor
    from ..schemes import Scheme

OF_PROCESSOR = ("template", "chat_template", "system_message", "max_tiles", "min_tiles", "dynamic",
                "use_thumbnail", "pad2square")  # fmt: skip


class InternVLChat:
    """A chat model with its processor.

    Everything runs under `torch.inference_mode`. An engine may be used by several threads; it
    keeps nothing between calls: a conversation goes on by the history that it is given. A process
    that is forked after the first use hangs, as with PyTorch itself:
    `multiprocessing.get_context("spawn")` passes the engine on.

    Args:
        model: a VisionLanguageModel.
        processor: a VisionLanguageProcessor of the same checkpoint.
        name: what to call the model in messages.
        accelerate: swap eager modules for fused ones; `report` tells which.

    Raises:
        TypeError: a model or processor of another class.
        ValueError: the processor makes tiles or tokens that the model does not take.
    """

    def __init__(
        self,
        model: "VisionLanguageModel",
        processor: "VisionLanguageProcessor",
        *,
        name: str = "",
        accelerate: bool = True,
    ) -> None:
        _check_fit(model, processor)
        self.model, self.processor = model.eval(), processor
        token = processor.img_context_token_id
        self.model.img_context_token_id = self.model.config.img_context_token_id = token
        self.name = name or type(model).__name__
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.report = accelerated(model, "all", "InternVLChat") if accelerate else None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        quantize: "str | Scheme | None" = None,
        accelerate: bool = True,
        processor: "VisionLanguageProcessor | None" = None,
        **options: Any,
    ) -> "InternVLChat":
        """Loads a chat checkpoint, in the published or in transformers' layout, with its processor.

        Args:
            source: a directory, or a hub id "owner/name".
            dtype: of the weights; "auto" is bfloat16 where the device computes in it, else float32.
            device: None is the GPU where there is one, else the CPU.
            quantize: "int8", "int4" or "fp8": hold the large weights in that form; they are
                quantized one at a time while they are read. A checkpoint that `internvl convert
                --quantize` wrote needs no word: it is mapped as it is, in seconds.
            accelerate: swap eager modules for fused ones.
            processor: in place of the one beside the weights.
            options: `template`, `chat_template`, `system_message`, `max_tiles` and other settings
                of the processor; and further ones of `VisionLanguageModel.from_pretrained`:
                device_map, revision ...

        Raises:
            FileNotFoundError, ValueError: no checkpoint there, one of another kind, or a damaged
                one; the message names file and weight.
        """
        from ..checkpoint import check_takes, hub_options
        from ..modeling.chat import VisionLanguageModel
        from ..processing import VisionLanguageProcessor

        folder = Path(source)
        chosen = {name: options.pop(name) for name in OF_PROCESSOR if name in options}
        check_takes(
            folder if folder.exists() else os.fspath(source), VisionLanguageModel, **options
        )
        if processor is None:
            place = folder.parent if folder.is_file() else source
            found = hub_options(options) | chosen
            processor = VisionLanguageProcessor.from_pretrained(place, **found)
        if device is None and options.get("device_map") is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = VisionLanguageModel.from_pretrained(
            source, dtype=dtype, device=device, quantize=quantize, **options
        )
        name = str(folder.resolve()) if folder.exists() else os.fspath(source)
        return cls(model, processor, name=name, accelerate=accelerate)

    @classmethod
    def nano(cls, **options: Any) -> "InternVLChat":
        """The embedded chat model, trained on handwritten digits; works offline."""
        from ..assets import nano_chat_directory

        chosen = {"dtype": torch.float32, **options}
        engine = cls.from_pretrained(nano_chat_directory(), **chosen)
        engine.name = "nano-chat"
        return engine

    @property
    def device(self) -> torch.device:
        """Where inputs go; the hooks of a model that is spread out move them on."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def chat(
        self,
        images: Any = None,
        question: str | Sequence[str] | None = None,
        *,
        messages: Any = None,
        videos: Any = None,
        history: Any = None,
        system_message: str | None = None,
        stream: bool = False,
        return_history: bool = False,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        batch_size: int = 8,
        **generate_kwargs: Any,
    ) -> Any:
        """Answers a question about images, or the last message of a conversation.

        Args:
            images: one image, or several for one question; see `processing.load_image`. They stand
                where the question has `<image>`, else in front of it, numbered where there are
                several. A conversation may come here too, see `messages`.
            question: a text; or several, each with its own item of `images` (an image, a list of
                them, or None), `videos` and `history`. A single one is for all of them.
            messages: one conversation, or several: lists of {"role": "user" | "assistant" |
                "system", "content": ...}, whose content is a text, or a list of parts as OpenAI's
                and transformers' interfaces have them. `images` and `videos` then belong to the
                `<image>` and `<video>` in its texts.
            videos: as images; see `processing.video_frames`. Each frame is one tile.
            history: what came before: the history that an earlier call returned, messages, or
                pairs (question, answer).
            system_message: in place of the checkpoint's sentence.
            stream: return an AnswerStream, which yields the answer in pieces as it is made, and
                has the `history` in the end.
            return_history: return (answer, history) in place of the answer.
            max_new_tokens: of an answer, None is 1024; the context may end it earlier.
            num_beams: beams of the search, None is 1: greedy, unless generate_kwargs sample.
            max_tiles: the most tiles of an image, in place of the checkpoint's.
            num_frames: of each video.
            batch_size: conversations at a time.
            generate_kwargs: any of transformers' `generate`, such as do_sample and temperature;
                a generation_config may be a dict, as the published `chat` takes it.

        Returns:
            The answer to one question or conversation, or a list of answers to several. With
            `return_history` a pair: the answer and the history with it, or a list of pairs.

        Raises:
            ValueError: nothing to answer, other places than pictures (with both numbers), a picture
                that cannot be used, a prompt longer than the context, or more than one
                conversation or beam to stream.
            FileNotFoundError: no such picture.
            TypeError: a question, message or picture of another kind.
        """
        from ..tasks import chat

        work, single = chat.prepare(
            images, question, messages=messages, videos=videos, history=history,
            system_message=system_message, max_new_tokens=max_new_tokens, num_beams=num_beams,
            max_tiles=max_tiles, num_frames=num_frames, batch_size=batch_size, **generate_kwargs,
        )  # fmt: skip
        if stream:
            return AnswerStream(*chat.stream(self, work))
        found = [
            (text, answered(row, text)) if return_history else text
            for text, row in chat.answers(self, work)
        ]
        return found[0] if single else found

    def __repr__(self) -> str:
        return f"InternVLChat({self.name}, {self.dtype}, {self.device})"


class AnswerStream(Iterator[str]):
    """The pieces of an answer, as they are made.

    Leaving the iteration ends the generation after its step.

    Args:
        pieces: of the text.
        messages: that it answers.
    """

    def __init__(self, pieces: Iterator[str], messages: list[Message]) -> None:
        self._pieces, self._messages = pieces, messages
        self.answer = ""  # as far as it came

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.answer += piece
        return piece

    def close(self) -> None:
        """Ends the generation."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def history(self) -> list[Message]:
        """The conversation with the answer as far as it came."""
        return answered(self._messages, self.answer)


def answered(messages: list[Message], answer: str) -> list[Message]:
    """A conversation with its answer: the history of the next question."""
    return [*messages, Message("assistant", (answer,))]


def _check_fit(model: Any, processor: Any) -> None:
    if not hasattr(model, "num_image_token") or not hasattr(processor, "img_context_token_id"):
        raise TypeError(
            "InternVLChat: needs a VisionLanguageModel and a VisionLanguageProcessor, got "
            f"{type(model).__name__} and {type(processor).__name__}; from_pretrained makes both"
        )
    made = (processor.image_processor.size, processor.num_image_token)
    taken = (model.config.image_size, model.num_image_token)
    if made != taken:
        raise ValueError(
            f"InternVLChat: the processor makes tiles of {made[0]} pixels and {made[1]} tokens, "
            f"the model takes {taken[0]} pixels and {taken[1]} tokens"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if processor.img_context_token_id >= rows:
        raise ValueError(
            f"InternVLChat: the tokenizer's <IMG_CONTEXT> is id {processor.img_context_token_id}, "
            f"the model has {rows} embeddings; resize them to the tokenizer"
        )


passed_as_bytes(InternVLChat)
