"""Every key of a recipe with its values, default and meaning, as `vpgtrans keys` prints them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from .reading import sections_of
from .values import RecipeError


class Key(NamedTuple):
    """name: as an override has it, N for the number of an item in a list; default: None where a value has to be given."""

    name: str
    values: str
    default: str | None
    meaning: str


def keys_of(recipe: type[BaseModel], beginning: str = "") -> list[Key]:
    """The keys of a kind of recipe that begin with some text, in the recipe's own order; RecipeError where there is none."""
    found = [key for key in _keys(recipe, "") if key.name.startswith(beginning)]
    if not found:
        raise RecipeError(
            f"keys: expected the beginning of one, such as {', '.join(recipe.model_fields)}, got {beginning!r}"
        )
    return found


def _keys(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner = next(sections_of(field.annotation), None)
        if inner is None:
            missing = field.default is PydanticUndefined
            yield Key(
                prefix + name,
                _values(field.annotation),
                None if missing else _shown(field.default),
                field.description or "",
            )
        else:
            many = typing.get_origin(field.annotation) is list
            yield from _keys(inner, f"{prefix}{name}.N." if many else f"{prefix}{name}.")


def _values(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _values(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_values(a) for a in typing.get_args(annotation)))
    names = {type(None): "null", Path: "path", bool: "true | false", str: "text", int: "whole number", float: "number"}
    if annotation in names:
        return names[annotation]
    origin, inside = typing.get_origin(annotation), [_values(a) for a in typing.get_args(annotation) if a is not ...]
    if origin in (list, tuple):
        return f"[{', '.join(inside)}{', ...' if origin is list else ''}]"
    return "mapping" if origin is dict else str(annotation)


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(list(default)) if isinstance(default, tuple) else str(default)
