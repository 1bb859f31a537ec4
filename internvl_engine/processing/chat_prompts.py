"""Conversations to token ids, and ids to answers, by template and tokenizer of a checkpoint.

L tokens of a prompt, n tiles of a picture, num_image_token tokens of a tile
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .chat_labels import ANSWER, ANSWER_END
from .chat_templates import (
    PLACE,
    TEMPLATES,
    JinjaTemplate,
    PublishedTemplate,
    as_jinja,
    published_template,
    takes_pictures,
)
from .message_parts import Message, Picture, counted
from .messages import jinja_turns, pictures_of, published_turns, tiles_of
from .special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

VIDEO = "<video>"


class ChatPrompts:
    """Prompts of a checkpoint.

    Args:
        tokenizer: one of transformers'.
        num_image_token: tokens that stand for a tile.
        template: name of a published conversation template.
        chat_template: a Jinja template, which comes before it; without either the tokenizer's own.

    Raises:
        ValueError: an unknown template, or a tokenizer without the token of images.
    """

    def __init__(
        self, tokenizer: Any, num_image_token: int, template: str | None, chat_template: str | None
    ) -> None:
        self.tokenizer, self.num_image_token = tokenizer, num_image_token
        own = chat_template or getattr(tokenizer, "chat_template", None)
        if isinstance(own, Mapping):  # several by name, as older files have them
            own = own.get("default")
        self.template: PublishedTemplate | JinjaTemplate | None = None
        if template is not None and chat_template is None:
            self.template = published_template(template)
        elif isinstance(own, str):
            self.template = JinjaTemplate(own, tokenizer)
        names = (("context", IMAGE_CONTEXT), ("start", IMAGE_START), ("end", IMAGE_END))
        self.image_token, self.start, self.end = (
            getattr(tokenizer, f"{name}_image_token", None) or default for name, default in names
        )
        known = self._known(self.image_token)
        if known is None:
            raise ValueError(
                f"the tokenizer has no token {self.image_token}; add_special_tokens(tokenizer) "
                "appends those of chat models"
            )
        self.image_token_id = known
        self.ids(
            ""
        )  # a stored padding is switched off by the first call, which threads must not do

    def conversation(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        open_turn: bool | None = None,
        mark: bool = False,
    ) -> str:
        """The prompt of a conversation whose pictures are read.

        Args:
            messages: at least one; the first may be the system's.
            system: sentence where the messages have none.
            open_turn: end with the role that answers; None where the user spoke last.
            mark: put `ANSWER` and `ANSWER_END` around what the assistant says.
        """
        prompt = self._rendered(messages, system, open_turn, mark)
        places = [PLACE, *([self.image_token, VIDEO] if self._takes_parts else [])]
        frame = "Frame" if self._takes_parts else None
        return self._filled(prompt, places, pictures_of(messages), frame)

    def unfilled(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        open_turn: bool | None = None,
    ) -> str:
        """The prompt with a placeholder for every picture, which `finished` fills.

        Args: as `conversation`; pictures need not be read.
        """
        unread = [
            Message(m.role, tuple(p._replace(tiles=None) if isinstance(p, Picture) else p
                                  for p in m.parts))
            for m in messages
        ]  # fmt: skip
        prompt = self._rendered(unread, system, open_turn)
        placed = [p for p in pictures_of(unread) if p.placed or not self._takes_parts]
        pieces = prompt.split(PLACE)
        marks = [*(f"<{picture.kind}>" for picture in placed), ""]
        return "".join(piece + mark for piece, mark in zip(pieces, marks, strict=True))

    def _rendered(
        self,
        messages: Sequence[Message],
        system: str | None,
        open_turn: bool | None,
        mark: bool = False,
    ) -> str:
        """The prompt with `PLACE`, or what a Jinja template writes, where pictures go."""
        if self.template is None:
            raise ValueError(
                "the checkpoint names no conversation template; pass template= one of "
                f"{', '.join(TEMPLATES)}, or chat_template= with a Jinja template"
            )
        if messages[0].role == "system":
            system, messages = messages[0].text, messages[1:]
        if open_turn is None:
            open_turn = not messages or messages[-1].role == "user"
        turns: Any = jinja_turns(messages) if self._takes_parts else published_turns(messages)
        if mark:
            turns = [
                (role, ANSWER + said + ANSWER_END if role == "assistant" and said else said)
                for role, said in turns
            ]
        return self.template.render(turns, system, open_turn)

    @property
    def _takes_parts(self) -> bool:
        """Whether the template places pictures; others take texts that have places for them."""
        return isinstance(self.template, JinjaTemplate) and takes_pictures(self.template.source)

    def places(self, text: str) -> list[str]:
        """The kinds of pictures that a finished prompt has places for, in order."""
        found = re.findall("|".join(map(re.escape, self._marks())), text)
        return ["video" if mark == VIDEO else "image" for mark in found]

    def finished(self, text: str, pictures: Sequence[Picture]) -> str:
        """A finished prompt with the tokens of pictures in its places."""
        frame = "Frame" if isinstance(self.template, JinjaTemplate) else "Frame-"
        return self._filled(text, self._marks(), pictures, frame)

    def ids(self, prompt: str) -> list[int]:
        """Token ids; where the tokenizer begins texts with a token, there is one of it."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error}") from error
        start = getattr(self.tokenizer, "bos_token", None)
        begun = bool(start) and prompt.startswith(str(start))
        return list(self.tokenizer(prompt, add_special_tokens=not begun)["input_ids"])

    @property
    def pad_token_id(self) -> int:
        """The id of padding, which the mask hides."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        return 0

    @property
    def separator(self) -> str:
        """What ends an answer; "" where no template says it."""
        return self.template.separator if self.template is not None else ""

    @property
    def stop_token_id(self) -> int | None:
        """The token that ends an answer; None where it is none of the vocabulary's."""
        return self._known(self.separator) if self.separator else None

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of one row of ids."""
        row = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        if skip_special_tokens:
            special, known = self._special_ids(), len(self.tokenizer)
            row = [i for i in row if i < known and i not in special]  # a head may have more rows
        return self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens)

    def answer(self, ids: Sequence[int] | Tensor) -> str:
        """The answer in new ids: up to what ends it, without white space around it."""
        text = self.decode(ids)
        return (text.split(self.separator)[0] if self.separator else text).strip()

    def names(self) -> dict[str, str]:
        """The tokens that transformers' processor asks its tokenizer for, by name."""
        return {
            "start_image_token": self.start,
            "end_image_token": self.end,
            "context_image_token": self.image_token,
            "video_token": VIDEO,
        }

    def jinja(self, system: str | None) -> str:
        """The template as a Jinja template; "" where there is none.

        Args:
            system: sentence where a conversation has none.
        """
        if isinstance(self.template, PublishedTemplate):
            return as_jinja(self.template, system, self.image_token)
        return self.template.source if self.template is not None else ""

    def _marks(self) -> list[str]:
        return ["<image>", self.image_token, VIDEO]

    def _filled(
        self, text: str, marks: Sequence[str], pictures: Sequence[Picture], frame: str | None
    ) -> str:
        """A text with the tokens of pictures in place of marks.

        Args:
            frame: what the line of a frame begins with; None where each frame has its own mark.
        """
        pieces = re.split("|".join(map(re.escape, marks)), text)
        if frame is None:
            filling = [self._tokens(len(tiles)) for tiles in tiles_of(pictures)]
        else:
            filling = [self._of(picture, frame) for picture in pictures]
        if len(pieces) - 1 != len(filling):
            raise ValueError(
                f"the prompt has {counted(len(pieces) - 1, 'place')} for "
                f"{counted(len(filling), 'picture')}; write <image> or <video> once for each"
            )
        return "".join(p + f for p, f in zip(pieces, [*filling, ""], strict=True))

    def _of(self, picture: Picture, frame: str) -> str:
        if picture.kind == "image":
            return self._tokens(len(picture.tiles))
        lines = [f"{frame}{i}: {self._tokens(1)}" for i in range(1, len(picture.tiles) + 1)]
        return "\n".join(lines)

    def _tokens(self, tiles: int) -> str:
        return self.start + self.image_token * (self.num_image_token * tiles) + self.end

    def _known(self, token: str) -> int | None:
        """The id of a token; `get_vocab` would list 150,000 of them."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        same = found is not None and self.tokenizer.convert_ids_to_tokens(found) == token
        return found if same else None

    @property
    def stop_texts(self) -> list[str]:
        """Texts that end an answer, where no token that is left out of texts does."""
        hidden = self.stop_token_id in self._special_ids()
        return [] if hidden or not self.separator else [self.separator]

    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {*self.tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)}
