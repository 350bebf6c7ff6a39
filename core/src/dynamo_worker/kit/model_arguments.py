"""Flags, files and JSON for an engine whose arguments are the fields of a pydantic model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dynamo_worker.errors import StartError, describe, shown
from dynamo_worker.kit.engine_arguments import refuse_without_effect
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_LARGEST_FILE: Final = 2**20


@dataclass(frozen=True)
class CommandLine:
    """The command line of an engine whose arguments are the fields of a pydantic model.

    The arguments come from flags, from a file and from objects; later ones take precedence, key by key. Environment
    variables are defaults of flags.

    :param model: describes the arguments.
    :param prefix: of the environment variables: ``DYN_TOY_`` for ``DYN_TOY_MAX_SEQ_LEN``.
    :param file: the flag that names a file of arguments, and its help.
    :param objects: the flags that take an object of arguments, and their help.
    :param parts: flags for single keys of an argument that is an object: the argument and the key.
    :param aliases: further flags of an argument.
    :param no_flags: arguments that no text can state.
    :param required: arguments that have to be given, and how.
    :param without_effect: arguments that nothing in a worker reads, and why.
    :param supported: arguments of which only some values are supported: those, and why no others.
    """

    model: type[BaseModel]
    prefix: str
    file: tuple[str, str]
    objects: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    no_flags: Collection[str] = ()
    required: Mapping[str, str] = field(default_factory=dict)
    without_effect: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    supported: Mapping[str, tuple[Collection[object], str]] = field(default_factory=dict)

    def add_flag(self, group: argparse._ArgumentGroup, name: str, *aliases: str, **options: Any) -> None:
        """Add one flag, whose default is in the environment.

        :param options: as ``add_argument`` takes them.
        """
        given = os.environ.get(f"{self.prefix}{name.upper()}")
        default = {"default": given} if given else {}
        group.add_argument(_flag(name), *aliases, dest=name, **{**options, **default})

    def add_sources(self, group: argparse._ArgumentGroup) -> None:
        """Add the flags for the file, the objects and single keys."""
        name, text = self.file
        self.add_flag(group, name, metavar="FILE", help=text)
        for name, text in self.objects.items():
            self.add_flag(group, name, type=mapping, metavar="JSON", help=text)
        for name, (argument, key) in self.parts.items():
            self.add_flag(group, name, type=value, metavar="NUMBER", help=f"`{key}` of {_flag(argument)}")

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        """Add a flag for each argument."""
        for name, described in self.model.model_fields.items():
            if name not in self.no_flags:
                given = options(described)
                if name in self.supported:
                    given.pop("choices", None)  # `read` says the reason
                self.add_flag(group, name, *self.aliases.get(name, ()), **given)

    def read(self, args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments that are given, and those that a worker sets itself.

        :param defaults: what a worker sets unless the operator does.
        :raises StartError: the file cannot be read, or an argument is missing, unknown, wrong, not supported or without
            effect.
        """
        given, fields = vars(args), self.model.model_fields
        flags = {name: given[name] for name in given if name in fields and given[name] is not None}
        parts = [
            {argument: {key: given[name]}} for name, (argument, key) in self.parts.items() if given[name] is not None
        ]
        file, path = _flag(self.file[0]), given[self.file[0]]
        sources = {
            "the command line": merged(flags, *parts),
            f"{file} {path}": read_file(file, path) if path else {},
            **{_flag(name): given[name] or {} for name in self.objects},
        }
        settings = merged(defaults, *sources.values())
        for name, hint in self.required.items():
            if not settings.get(name):
                raise StartError(f"the {name} is missing", hint=hint)
        usual = {name: described.default for name, described in fields.items()}
        for names, why in self.without_effect.items():
            refuse_without_effect(
                argparse.Namespace(**settings), lambda parser: parser.set_defaults(**usual), names, why
            )
        for name, (supported, why) in self.supported.items():
            if name in settings and settings[name] not in supported:
                raise StartError(f"{name} = {shown(settings[name])} is not supported: {why}")
        validate(self.model, sources, settings)
        return settings


def options(described: FieldInfo) -> dict[str, Any]:
    """Return the options of the flag for a field, as ``add_argument`` takes them.

    Only choices are checked when the flag is parsed, everything else by the model.
    """
    kinds = _kinds(described.annotation)
    choices = [value for kind in kinds for value in _values(kind)]
    text = " ".join((described.description or "").split()).replace("%", "%%")
    default = described.default
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
