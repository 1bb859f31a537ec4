"""Conversations as one string: the five published templates, and those that a tokenizer brings.

What a template is given are roles with texts; where a picture belongs, the text has `PLACE`. The
sentence of a system comes from the checkpoint or the caller: none ships with this package.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PLACE = "\ufdd0"  # of a picture; a code point that no text has (Unicode keeps it for programs)
PROBE = "\ufdd1"


@dataclass(frozen=True)
class PublishedTemplate:
    """How a published checkpoint writes a conversation.

    Args:
        name: as config.json has it.
        system: before the sentence of the system; `system_end` after it.
        user: before a question; `user_end` after it.
        assistant: before an answer; `assistant_end` after it, at which generation stops.
        gap: between a role and its text; an empty turn ends before the gap's white space.
    """

    name: str
    system: str
    system_end: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    gap: str = ""

    @property
    def separator(self) -> str:
        """What ends an answer."""
        return self.assistant_end.strip()

    def render(self, turns: Sequence[tuple[str, str]], system: str | None, open_turn: bool) -> str:
        """The prompt of (role, text) pairs.

        Args:
            turns: roles "user" and "assistant". An empty text leaves the role alone.
            system: sentence of the system; None and "" keep its markers.
            open_turn: end with the role that is to answer.
        """
        text = self.system + (system or "") + self.system_end
        for role, words in turns:
            head, end = (
                (self.user, self.user_end) if role == "user" else (self.assistant,
                                                                   self.assistant_end)
            )  # fmt: skip
            text += head + self.gap + words + end if words else head + self.gap.rstrip(" ")
        return text + (self.assistant + self.gap.rstrip(" ") if open_turn else "")


def as_jinja(template: PublishedTemplate, system: str | None, image: str) -> str:
    """A published template as a Jinja template of transformers.

    Args:
        template: the published one.
        system: the sentence of the system where a conversation has none.
        image: the token of images.
    """
    system_head, system_end, user, user_end, assistant, assistant_end, gap, start, sentence = (
        json.dumps(text, ensure_ascii=False)
        for text in (
            template.system, template.system_end, template.user, template.user_end,
            template.assistant, template.assistant_end, template.gap, template.gap.rstrip(" "),
            system or "",
        )
    )  # fmt: skip
    return (
        "{%- macro words(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
        "{%- for part in content -%}"
        "{%- if part['type'] == 'image' -%}{{- " + json.dumps(image + "\n") + " -}}"
        "{%- elif part['type'] == 'video' -%}{{- '<video>\\n' -}}"
        "{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{- {system_head} + {sentence} + {system_end} -}}}}"
        "{%- endif -%}{%- for message in messages -%}"
        "{%- set said = words(message['content']) -%}"
        "{%- if message['role'] == 'system' -%}"
        f"{{{{- {system_head} + said + {system_end} -}}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{{{- {user} + ({gap} + said + {user_end} if said else {start}) -}}}}"
        "{%- else -%}"
        f"{{{{- {assistant} + ({gap} + said + {assistant_end} if said else {start}) -}}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {assistant} + {start} -}}}}{{%- endif -%}}"
    )


def _chatml(name: str, end: str) -> PublishedTemplate:
    system, user, assistant = (f"<|im_start|>{role}\n" for role in ("system", "user", "assistant"))
    return PublishedTemplate(name, system, end, user, end, assistant, end)


TEMPLATES = {
    template.name: template
    for template in (
        PublishedTemplate("internvl_zh", "", " ", "<human>", " ", "<bot>", "</s>", gap=": "),
        _chatml("Hermes-2", "<|im_end|>"),
        _chatml("internlm2-chat", "<|im_end|>"),
        PublishedTemplate(
            "phi3-chat", "<|system|>\n", "<|end|>", "<|user|>\n", "<|end|>", "<|assistant|>\n",
            "<|end|>",
        ),
        _chatml("internvl2_5", "<|im_end|>\n"),
    )
}  # fmt: skip


def published_template(name: Any) -> PublishedTemplate:
    """The template of a name.

    Raises:
        ValueError: there is none of that name; the message lists the known.
    """
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(
            f"the conversation template {name!r:.60} is not known; known are "
            f"{', '.join(TEMPLATES)}. Pass template=, or chat_template= with a Jinja template"
        )
    return TEMPLATES[name]


class JinjaTemplate:
    """A chat template of transformers, as it lies in a tokenizer's folder.

    Args:
        source: the Jinja template.
        tokenizer: one of transformers', which gives the template its special tokens.
    """

    name = "chat_template"

    def __init__(self, source: str, tokenizer: Any) -> None:
        self.source, self.tokenizer = source, tokenizer

    @cached_property
    def separator(self) -> str:
        """What ends an answer: what the template writes after one, up to white space."""
        turns = [("user", "?"), ("assistant", PROBE)]
        tail = self.render(turns, None, False).rpartition(PROBE)[2].split()
        return tail[0] if tail else ""

    def render(self, turns: Sequence[tuple[str, Any]], system: str | None, open_turn: bool) -> str:
        """The prompt of (role, content) pairs.

        Args:
            turns: contents as transformers has them: a text, or a list of parts.
            system: sentence of the system, None for none (some templates have their own).
            open_turn: end with the role that is to answer.

        Raises:
            ValueError: the template fails, or refuses the conversation.
        """
        messages = [{"role": role, "content": content} for role, content in turns]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=open_turn,
            )
        except Exception as error:  # templates raise their own, and Python's of every kind
            if isinstance(error, ImportError):
                raise
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


def takes_pictures(source: str) -> bool:
    """Whether a Jinja template says where pictures go; that of a mere language model does not."""
    return "image" in source or "IMG_CONTEXT" in source


def sentence_in(path: Path, template: str) -> str | None:
    """The system's sentence of a template in a checkpoint's conversation.py, which is only read.

    Args:
        path: of the file, as published checkpoints bring it.
        template: name of the template.

    Returns:
        The sentence; None where the file is not there, or has none under that name.
    """
    if not path.is_file():
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            values = {k.arg: k.value.value for k in node.keywords
                      if k.arg and isinstance(k.value, ast.Constant)}  # fmt: skip
            sentence = values.get("system_message")
            if values.get("name") == template and isinstance(sentence, str):
                return sentence
    return None
