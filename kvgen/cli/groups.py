"""Options that commands share in groups: a command takes a dataclass, and the command line shows its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any, get_type_hints


def takes_groups(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with parameters that are dataclasses: on the command line, each is the options that are its fields.

    They stand where the parameter does. defaults: those that are other ones for this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[Parameter] = []
        groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        hints = get_type_hints(command, include_extras=True)
        for name, parameter in signature(command).parameters.items():
            group = hints[name]
            if not (isinstance(group, type) and is_dataclass(group)):
                parameters.append(parameter.replace(annotation=group))
                continue
            annotations = get_type_hints(group, include_extras=True)
            groups[name] = group, [field.name for field in fields(group)]
            for field in fields(group):
                default, annotation = defaults.get(field.name, field.default), annotations[field.name]
                parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

        @wraps(command)
        def run(**arguments: Any) -> None:
            for name, (group, names) in groups.items():
                arguments[name] = group(**{field: arguments.pop(field) for field in names})
            command(**arguments)

        run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
