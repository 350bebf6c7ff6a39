"""Flags, files and JSON for an engine whose arguments are the fields of a pydantic model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dynamo_worker.errors import StartError, describe, shown
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_LARGEST_FILE: Final = 2**20


def options(field: FieldInfo) -> dict[str, Any]:
    """Return the options of the flag for a field, as ``add_argument`` takes them.

    Only choices are checked when the flag is parsed, everything else by the model.
    """
    kinds = _kinds(field.annotation)
    choices = [value for kind in kinds for value in _values(kind)]
    text = " ".join((field.description or "").split()).replace("%", "%%")
    default = field.default
    if isinstance(default, Enum):
        default = default.value if isinstance(default.value, str) else default.name
    if isinstance(default, (str, int, float)):
        text += f" (default: {default})".replace("%", "%%")
    if len(kinds) == 1 and choices and all(isinstance(choice, str) for choice in choices):
        return {"choices": choices, "help": text}
    if not kinds.isdisjoint({str, Path}):
        return {"metavar": "TEXT", "help": text}
    if bool in kinds:
        return {"type": value, "nargs": "?", "const": True, "metavar": "BOOL", "help": text}
    return {"type": value, "metavar": "NUMBER" if kinds <= {int, float} else "JSON", "help": text}


def value(text: str) -> Any:
    """Read JSON or YAML, as the ``type`` of a flag."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected JSON or YAML, got {shown(text)}: {describe(error)}") from error


def mapping(text: str) -> dict[str, Any]:
    """Read a JSON or YAML object, as the ``type`` of a flag."""
    given = value(text)
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f"expected an object, got {shown(given)}")
    return given


def read_file(flag: str, path: str) -> dict[str, Any]:
    """Return the object in a YAML or JSON file; an empty file has an empty one.

    :param flag: the flag that names the file, for messages.
    :raises StartError: the file cannot be read, is too large, or contains anything else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ValueError(f"expected at most {_LARGEST_FILE} characters")
        return {} if value(text) is None else mapping(text)
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        raise StartError(f"{flag} {path}: {error}") from error


def merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return several objects as one, in which the later ones take precedence, at every depth."""
    result: dict[str, Any] = {}
    for source in sources:
        for key, given in source.items():
            below = result.get(key)
            if isinstance(given, Mapping):
                given = merged(below, given) if isinstance(below, Mapping) else merged(given)
            result[key] = given
    return result


def validate(model: type[BaseModel], sources: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Check arguments against their model.

    :param sources: where they come from, by the names in messages; later ones take precedence.
    :param settings: all of them together.
    :raises StartError: the model rejects them.
    """
    try:
        model(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        where = next((name for name, source in reversed(list(sources.items())) if _has(source, first["loc"])), "")
        where = f"{where}: " if where else ""
        if first["type"] == "extra_forbidden":
            near = suggestion(str(first["loc"][-1]), _names(model))
            raise StartError(f"{where}unknown argument {path}{near}") from error
        message = first["msg"].replace("Input should be", "expected")
        got = f", got {shown(first['input'])}" if path else ""
        raise StartError(f"{where}{path}{': ' if path else ''}{message}{got}") from error
    except Exception as error:
        raise StartError(f"the engine rejects its arguments: {describe(error)}") from error


def _names(model: type[BaseModel]) -> set[str]:
    """Return the names of all fields in a model's module: those of nested models as well."""
    kinds = vars(sys.modules[model.__module__]).values()
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return {name for kind in (model, *models) for name in kind.model_fields}


def _has(source: Any, path: tuple[int | str, ...]) -> bool:
    """Return whether a source contains the value at a path, or the list or text that it is in."""
    for key in path:
        if not isinstance(source, Mapping):
            break
        if key not in source:
            return False
        source = source[key]
    return bool(path)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows, without None."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation} - {type(None)}


def _values(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [member.value for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
