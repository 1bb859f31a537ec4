"""Options that several commands share, written down once as the fields of a NamedTuple."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def flatten_options(function: Callable) -> Callable:
    """The function with every NamedTuple among its parameters spread into its fields.

    A command `f(model: ModelOptions)` becomes `f(*, model, device, dtype)`, which is what typer
    makes options from.
    """
    parameters = inspect.signature(function).parameters
    groups = {name: p.annotation for name, p in parameters.items() if _is_group(p.annotation)}
    flat: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        of = _fields(groups[name]) if name in groups else [parameter]
        flat += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in of]

    def call(**options: Any) -> Any:
        for name, group in groups.items():
            options[name] = group(**{field: options.pop(field) for field in group._fields})
        return function(**options)

    return _described(call, function, flat)


def described_as(run: Callable, function: Callable) -> Callable:
    """`run(*, own, **options)` with the name, the help and also the options of a function."""
    own = [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return _described(run, function, [*inspect.signature(function).parameters.values(), *own])


def _described(call: Callable, function: Callable, parameters: list[inspect.Parameter]) -> Callable:
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _is_group(annotation: Any) -> bool:
    return inspect.isclass(annotation) and hasattr(annotation, "_field_defaults")


def _fields(group: Any) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=group._field_defaults.get(name, inspect.Parameter.empty),
            annotation=annotation,
        )
        for name, annotation in get_type_hints(group, include_extras=True).items()
    ]
