"""Options made from the study's settings: name, default and help stand once, in `buddy.settings`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from buddy.errors import UserError, short, unknown
from buddy.settings import Settings

MOST = 10**9
"""Largest whole number in a list: more blocks, tokens or sequences than any machine holds."""


def with_settings(
    model: type[Settings], leave_out: tuple[str, ...] = (), name: str = "settings", prefix: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option per field of a settings section, and pass it the section.

    Lists are given as comma-separated values. Fields in ``leave_out`` keep their defaults.

    Args:
        model: the section.
        leave_out: fields without an option.
        name: the command's argument that receives the section.
        prefix: begins the options' names, where a command takes several sections: ``--first-epochs``.
    """
    start = f"{prefix}_" if prefix else ""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function, eval_str=True)
        fields = {field: info for field, info in model.model_fields.items() if field not in leave_out}

        @wraps(function)
        def command(**values: Any) -> Any:
            given = {field: values.pop(start + field) for field in fields}
            return function(**values, **{name: _build(model, given, start)})

        parameters = [p for p in own.parameters.values() if p.name != name]
        command.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=parameters + [_parameter(start + field, info) for field, info in fields.items()]
        )
        return command

    return decorate


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(name: str, field: Any) -> inspect.Parameter:
    kind, is_list, allowed = _option_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        default = ...
    elif is_list and default is not None:
        default = ",".join(map(str, default))
    text = field.description + (f" [{'|'.join(map(str, allowed))}]" if allowed else "")
    flag = _flag(name) + (f"/--no-{_flag(name)[2:]}" if kind is bool else "")
    option = typer.Option(default, flag, help=text)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None if default is None else kind
    )


def _option_type(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """(type of the option, whether it is a list, the values allowed)."""
    if get_origin(annotation) is Annotated:
        return _option_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _option_type(next(a for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is list:
        return str, True, _option_type(get_args(annotation)[0])[2]
    if get_origin(annotation) is Literal:
        return str, False, get_args(annotation)
    return annotation, False, ()


def _build(model: type[Settings], given: dict[str, Any], start: str) -> Settings:
    for name, value in given.items():
        _, is_list, allowed = _option_type(model.model_fields[name].annotation)
        if is_list and isinstance(value, str):
            given[name] = value = [part.strip() for part in value.split(",") if part.strip()]
        for part in value if isinstance(value, list) else [value]:
            if allowed and part is not None and part not in allowed:
                raise unknown(_flag(start + name), part, allowed)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # fields that do not go together: the reason names them
            raise UserError(reason) from None
        option = _flag(start + str(first["loc"][0]))
        raise UserError(
            f"{option}: {short(first['input'])} is not allowed ({reason[0].lower() + reason[1:]})"
        ) from None


def within(option: str, value: float, low: float, high: float) -> float:
    """A number between two others, both included; NaN is between none.

    Raises:
        UserError: it is not.
    """
    if not low <= value <= high:
        raise UserError(f"{option}: {value:g} is not between {low:g} and {high:g}")
    return value


def counts(text: str, option: str) -> list[int]:
    """Whole numbers from ``4,8,12``.

    Raises:
        UserError: something else; names the option.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or max(found) > MOST:
        raise UserError(f"{option}: {text!r} is not a list of whole numbers such as 4,8,12")
    return found


def choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check a value that has a fixed set.

    Raises:
        UserError: it is not one of those allowed.
    """
    if value not in allowed:
        raise unknown(option, value, allowed)
