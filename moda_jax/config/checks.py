"""Checks of a dataclass's fields; every error names the class, the field and the value."""

import dataclasses
import math
import types
import typing
from typing import Any

_KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a finite number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
}


def require(owner: Any, field: str, ok: bool, expected: str) -> None:
    """Raises ValueError that names `field` of the dataclass `owner` unless `ok`."""
    if not ok:
        value = getattr(owner, field)
        raise ValueError(f"{type(owner).__name__}.{field}: expected {expected}, got {value!r}")


def require_types(owner: Any) -> None:
    """Checks every field against its annotation: no NaN, no 2.5 layers, no unknown choice.

    The command line converts, but a config file may hold anything.
    """
    annotations = typing.get_type_hints(type(owner))
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        is_union = typing.get_origin(annotations[field.name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(annotations[field.name]) if is_union else ()
        kinds = kinds or (annotations[field.name],)
        expected = " or ".join(_describe(kind) for kind in kinds)
        require(owner, field.name, any(_fits(value, kind) for kind in kinds), expected)


def require_positive(owner: Any, *fields: str) -> None:
    """Checks numbers; None and the choices of a field that is not always a number pass."""
    for field in fields:
        value = getattr(owner, field)
        ok = not isinstance(value, int | float) or value > 0
        require(owner, field, ok, "a positive number")


def _fits(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(x, typing.get_args(kind)[0]) for x in value)
    if kind not in _KINDS:
        return isinstance(value, kind)
    ok = isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))
    return ok and (kind is not float or math.isfinite(value))


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {typing.get_args(kind)}"
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each {_describe(typing.get_args(kind)[0])}"
    return _KINDS[kind][1] if kind in _KINDS else f"a {kind.__name__}"
