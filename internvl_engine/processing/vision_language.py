"""Images, videos and conversations together -> the inputs of a chat model.

processor = VisionLanguageProcessor.from_pretrained(directory_or_hub_id)
inputs = processor(messages=[{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                                          {"type": "text", "text": "What?"}]}])
processor.batch_decode(model.generate(**inputs))

B rows, L tokens of the longest, T tiles of all rows in order, S side of a tile
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .chat_files import NAME, config_settings
from .chat_folders import read_processor, write_processor
from .chat_inputs import ChatInputs
from .chat_labels import IGNORED, labelled
from .chat_prompts import ChatPrompts
from .message_parts import Beside, Message, Picture
from .messages import is_conversation, pictures_of, read_conversation, tiles_of
from .padding import pad_rows
from .picture_reading import PictureReading
from .tiles import InternVLTileProcessor


class VisionLanguageProcessor(PictureReading):
    """Prepares the inputs of a chat model, and makes text of its outputs.

    Conversations are written by `chat_template`, else by the published `template`, else by the
    template that the tokenizer brings.

    Args:
        image_processor: cuts images into tiles.
        tokenizer: one of transformers', with the tokens of `add_special_tokens`.
        num_image_token: tokens that stand for a tile.
        template: name of a published conversation template.
        chat_template: a Jinja template.
        system_message: sentence of the system where a conversation brings none.

    Raises:
        ValueError: an unknown template (the message lists the known), no number of tokens, or a
            tokenizer without the token of images.
    """

    model_input_names = ["pixel_values", "input_ids", "attention_mask", "image_flags"]

    def __init__(
        self,
        image_processor: InternVLTileProcessor,
        tokenizer: Any,
        *,
        num_image_token: int = 256,
        template: str | None = None,
        chat_template: str | None = None,
        system_message: str | None = None,
    ) -> None:
        if not isinstance(num_image_token, int) or num_image_token < 1:
            raise ValueError(
                f"{NAME}: num_image_token must be a whole number of 1 or more, got "
                f"{num_image_token!r}"
            )
        super().__init__(image_processor)
        self.tokenizer, self.system_message = tokenizer, system_message
        self.template_name, self.chat_template = template, chat_template
        try:
            self.prompts = ChatPrompts(tokenizer, num_image_token, template, chat_template)
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from error

    @property
    def img_context_token_id(self) -> int:
        """The id in whose places the model puts the features of tiles."""
        return self.prompts.image_token_id

    @property
    def num_image_token(self) -> int:
        return self.prompts.num_image_token

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        messages: Any = None,
        videos: Any = None,
        training: bool = False,
        padding: bool | str = True,
        padding_side: Literal["left", "right"] | None = None,
        system_message: str | None = None,
        add_generation_prompt: bool | None = None,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        return_tensors: str | None = "pt",
    ) -> ChatInputs:
        """Model inputs for prompts with or without pictures, or for pictures alone.

        Args:
            images: one image or many, for the placeholders in order; with several texts or
                conversations also a list for each. None where messages bring theirs.
            text: finished prompts, with `<image>` (or the token of images) and `<video>` once for
                every picture: one or several.
            messages: a conversation, or a list of them, for the template; see `read`.
            videos: as images; each see `video_frames`.
            training: pad on the right, give every row a tile (a white one with flag 0 where it
                has none), let the images of a row share `max_tiles`, and add `image_flags` (T,)
                int64 and for messages `labels` (B, L): answers and what ends them, -100 elsewhere.
            padding: True or "longest"; rows always become a batch.
            padding_side: None is "right" for training and else "left", as `generate` needs it.
            system_message: in place of the processor's; a system message in messages wins.
            add_generation_prompt: whether the prompt ends with the role that answers; None where
                the last message is the user's.
            max_tiles: of each image, in place of the image processor's.
            num_frames: of each video, see `video_frames`.
            dtype: of pixel_values. The model does not cast: give it the dtype of its weights.
            return_tensors: "pt"; other kinds are refused.

        Returns:
            ChatInputs (a dict with `.to(device)`), for `model(**inputs)` and, but for training,
            `model.generate(**inputs)`: input_ids and attention_mask (B, L) int64, and pixel_values
            (T, 3, S, S) where there are pictures. Its `num_patches_list` has the number of tiles
            of each picture (each frame is one).

        Raises:
            ValueError: nothing to prepare, both text and messages, other placeholders than
                pictures (with both numbers), no template, or a picture that cannot be used.
            FileNotFoundError: no such picture.
            TypeError: no text, conversation or picture.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f'{NAME}: gives "pt" tensors, not {return_tensors!r}')
        if padding not in (True, "longest"):
            raise ValueError(f'{NAME}: padding must be True or "longest", got {padding!r}')
        if text is not None and messages is not None:
            raise ValueError(f"{NAME}: text and messages both make input_ids; give one")
        limits: dict[str, Any] = {
            "max_tiles": max_tiles, "num_frames": num_frames, "share": training,
        }  # fmt: skip
        if text is None and messages is None:
            if images is None and videos is None:
                raise ValueError(f"{NAME}: needs images, videos, text or messages")
            return self._inputs({}, [self.pictures(images, videos, **limits)], dtype)
        prompts: list[str]
        if messages is not None:
            rows = self.read_all(messages, images, videos, **limits)
            pictures = [pictures_of(row) for row in rows]
            prompts = [
                self.prompt(row, system_message, add_generation_prompt, mark=training)
                for row in rows
            ]
        else:
            texts, pictures = self.pictures_of_texts(text, images, videos, **limits)
            prompts = [
                self.prompts.finished(t, found) for t, found in zip(texts, pictures, strict=True)
            ]
        side = padding_side or ("right" if training else "left")
        batch = self.encode(prompts, side, labels=training and messages is not None)
        return self._inputs(batch, pictures, dtype, training)

    def prompt(
        self,
        messages: Sequence[Message],
        system_message: str | None = None,
        add_generation_prompt: bool | None = None,
        **options: Any,
    ) -> str:
        """The prompt of a conversation that was `read`; arguments as `__call__`."""
        system = self.system_message if system_message is None else system_message
        return self.prompts.conversation(messages, system, add_generation_prompt, **options)

    def encode(
        self, prompts: Sequence[str], side: Literal["left", "right"] = "left", labels: bool = False
    ) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, L) of finished prompts, and labels of marked ones."""
        if side not in ("left", "right"):
            raise ValueError(f'{NAME}: padding_side must be "left" or "right", got {side!r}')
        words = self.prompts
        rows = [labelled(p, words.ids, words.separator) for p in prompts] if labels else (
            [(words.ids(p), []) for p in prompts]
        )  # fmt: skip
        ids = pad_rows([row for row, _ in rows], side, pad_token_id=words.pad_token_id)
        found = ids._asdict()
        if labels:
            found["labels"] = pad_rows(
                [row for _, row in rows], side, pad_token_id=IGNORED
            ).input_ids
        return found

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = False, return_dict: bool = True, **options: Any
    ) -> Any:
        """As transformers' processors: a prompt as text, or with `tokenize` the model's inputs.

        Args:
            conversation: one or several, see `read`.
            tokenize: make inputs; otherwise the prompt for `__call__`, with a placeholder for
                every picture, which need not be given yet.
            return_dict: False gives input_ids alone.
            options: of `__call__`; without `tokenize` add_generation_prompt (False) and
                system_message.
        """
        if tokenize:
            inputs = self(messages=conversation, **options)
            return inputs if return_dict else inputs["input_ids"]
        single = is_conversation(conversation)
        system = options.get("system_message")
        system = self.system_message if system is None else system
        opened = options.get("add_generation_prompt", False)
        prompts = [
            self.prompts.unfilled(read_conversation(row, Beside(), whole=False), system, opened)
            for row in ([conversation] if single else conversation)
        ]
        return prompts[0] if single else prompts

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of one row of ids."""
        return self.prompts.decode(ids, skip_special_tokens)

    def batch_decode(
        self, batch: Iterable[Sequence[int]] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """Text of every row of a batch; see `decode`."""
        return [self.decode(row, skip_special_tokens) for row in batch]

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, **options: Any
    ) -> "VisionLanguageProcessor":
        """Reads a chat checkpoint in the published or transformers' layout, or a saved processor.

        Args:
            source: directory, or hub id "owner/name". Its chat template is taken where it has
                places for pictures; that of a mere language model, which published checkpoints
                inherit, only where config.json names no template.
            options: `template`, `chat_template`, `system_message` and the arguments of
                InternVLTileProcessor, in place of the stored ones; `subfolder`, `revision`,
                `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            FileNotFoundError: no such directory or repository, or no tokenizer in it.
            ValueError: a damaged file, another kind of checkpoint, or an unknown template.
        """
        return cls(**read_processor(source, options))

    @classmethod
    def from_config(cls, config: Any, tokenizer: Any) -> "VisionLanguageProcessor":
        """The processor of a model that comes from no directory, as of `from_parts`.

        Args:
            config: its VisionLanguageConfig.
            tokenizer: one of transformers', with the tokens of `add_special_tokens`.
        """
        tiles, others = config_settings(config.published_dict())
        return cls(InternVLTileProcessor(**tiles), tokenizer, **others)

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        layout: Literal["published", "transformers"] = "published",
    ) -> list[str]:
        """Writes tokenizer and settings, so that this class and the layout's maker load them.

        Args:
            directory: made where it is not there.
            layout: "published", or "transformers" (whose processor finds a Jinja template of the
                conversation, with the sentence of the system in it).

        Returns:
            The paths.
        """
        return write_processor(self, Path(directory), layout)

    def __repr__(self) -> str:
        template = self.prompts.template
        return (
            f"{type(self).__name__}(\n  {self.image_processor},\n  "
            f"{type(self.tokenizer).__name__}({len(self.tokenizer)} tokens),\n  "
            f"template {template.name if template else None!r}, {self.num_image_token} tokens a "
            "tile,\n)"
        )

    def _inputs(
        self,
        batch: dict[str, Tensor],
        rows: Sequence[Sequence[Picture]],
        dtype: torch.dtype,
        training: bool = False,
    ) -> ChatInputs:
        """Inputs of rows of ids and their pictures, which were read."""
        side = self.image_processor.size
        white = torch.full((1, side, side, 3), 255, dtype=torch.uint8, device="cpu")
        tiles, flags = [], []
        for row in rows:
            found = tiles_of(row) or ([white] if training else [])
            tiles += found
            flags += [int(bool(row))] * sum(map(len, found))
        if tiles:
            batch = {"pixel_values": self.image_processor.pixel_values(tiles, dtype=dtype), **batch}
        if training:
            batch["image_flags"] = torch.tensor(flags, dtype=torch.int64, device="cpu")
        return ChatInputs(batch, [len(found) for row in rows for found in tiles_of(row)])
