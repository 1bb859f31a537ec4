"""The prompts of a classifier: every label under every template."""

import re
from collections.abc import Callable
from typing import Any

TEMPLATES = ("a photo of a {}.",)
FIELD = re.compile(r"\{\w*\}")  # where a template has its label: {}, {0}, {c}, {label}

Template = str | Callable[[str], str]


def checked_labels(labels: Any) -> tuple[str, ...]:
    """Labels in their order, of anything that can be gone through."""
    names = _several(labels, "labels")
    if not names:
        raise ValueError("classify: needs at least one label and one template")
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"classify: label {number} is {name!r:.60}, a {type(name).__name__}, not a string"
            )
    return tuple(map(str, names))  # NumPy's strings too


def checked_templates(templates: Any) -> list[Template]:
    """Templates in their order; None is TEMPLATES."""
    if templates is None:
        return list(TEMPLATES)
    single = isinstance(templates, str) or callable(templates)
    chosen = [templates] if single else _several(templates, "templates")
    if not chosen:
        raise ValueError("classify: needs at least one label and one template")
    for template in chosen:
        if not callable(template) and not (isinstance(template, str) and FIELD.search(template)):
            raise ValueError(f"classify: template {template!r:.60} has no {{}} for the label")
    return [t if callable(t) else str(t) for t in chosen]


def _several(texts: Any, what: str) -> tuple[Any, ...]:
    try:
        if isinstance(texts, str):
            raise TypeError
        return tuple(texts)
    except TypeError:
        kind = "one string" if isinstance(texts, str) else type(texts).__name__
        raise ValueError(f"classify: {what} are several strings, got {kind}") from None


def fill(template: Template, label: str) -> str:
    """A prompt: {} is the label's place; without one, every other field is."""
    if callable(template):
        prompt = template(label)
        if not isinstance(prompt, str):
            raise ValueError(
                f"classify: a template made {prompt!r:.60} of {label!r}; it must return a string"
            )
        return prompt
    if "{}" in template:
        return template.replace("{}", label)
    return FIELD.sub(lambda _: label, template)
