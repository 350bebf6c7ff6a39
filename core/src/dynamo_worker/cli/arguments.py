"""Parsing a command line: the worker's own flags, the engine's flags, and unknown ones."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.options import ENGINE_ARGS_KEY, OPTIONS
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from dynamo_worker.host.config.config_file import ConfigFile
    from dynamo_worker.host.config.settings import WorkerSettings
    from dynamo_worker.host.plugins.facade import Plugins

#: Flags that are not settings.
SWITCHES: Final = {
    "--help": "Show this text; with --engine NAME, also the engine's own flags.",
    "-h": "",
    "--version": "Show the version.",
    "--print-config": "Show the effective value of every setting and its origin.",
    "--no-supervise": "Run the worker without a supervisor process (for debuggers, tests and other init systems).",
}


@dataclass
class CommandLine:
    """A parsed command line.

    :param values: the worker's settings by field name, as written.
    :param switches: the :data:`SWITCHES` that were given.
    :param rest: everything else, for the engine's own parser.
    """

    values: dict[str, Any] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    rest: list[str] = field(default_factory=list)


def split(argv: Sequence[str], switches: Iterable[str] = SWITCHES) -> CommandLine:
    """Separate the worker's own flags from the engine's.

    Only exact names match, without abbreviations or combined short flags: ``-pp 2`` is the engine's. Everything after
    a bare ``--`` is the engine's, including flags that the worker defines too.

    :raises UsageError: a flag has no value, or a switch has one.
    """
    rows = {flag: row for row in OPTIONS for flag in row.flags}
    own_switches = set(switches)
    line = CommandLine()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            line.rest += words
            break
        flag, has_value, value = word.partition("=")
        if flag in own_switches:
            if has_value:
                raise UsageError(f"{flag} takes no value, got {value!r}")
            line.switches.add(flag)
            continue
        row = rows.get(flag)
        if row is None or (has_value and not flag.startswith("--")):
            line.rest.append(word)
            continue
        if row.kind == "switch" and not has_value:
            line.values[row.name] = flag == row.flag
            continue
        if flag != row.flag and row.kind == "switch":
            raise UsageError(f"{flag} takes no value, got {value!r}")
        if not has_value:
            following = words[0] if words else None
            taken = following is None or following == "--" or following.partition("=")[0] in {*rows, *own_switches}
            if row.bare is not None and (taken or str(following).startswith("-")):
                value = row.bare
            elif taken:
                raise UsageError(f"{flag} requires a value: {row.placeholder}")
            else:
                value = words.pop(0)
        if row.kind == "list":
            line.values.setdefault(row.name, []).append(value)
        else:
            line.values[row.name] = value
    return line


def load_settings(line: CommandLine) -> tuple[WorkerSettings, ConfigFile | None]:
    """Return the settings for a command line, and the configuration file if there is one."""
    from dynamo_worker.host.config import config_file, settings

    path = settings.config_path(line.values, os.environ)
    config = config_file.read_config(path) if path else None
    return settings.load(line.values, os.environ, config), config


class EngineParser(argparse.ArgumentParser):
    """The parser that plugins add their flags to; it raises :class:`UsageError`."""

    def __init__(self, engine: str) -> None:
        super().__init__(
            prog=f"dynamo-worker --engine {engine}" if engine else "dynamo-worker",
            usage=argparse.SUPPRESS,
            add_help=False,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UsageError(message, hint=f"`{self.prog} --help` shows the flags")

    @property
    def flags(self) -> list[str]:
        """Return all flags in the order of their addition."""
        return list(self._option_string_actions)

    def action(self, name: str) -> argparse.Action | None:
        """Return the action of a flag, whose name may lack its dashes or have underscores instead."""
        dashed = name if name.startswith("-") else f"--{name}"
        for flag in (dashed, dashed.replace("_", "-"), dashed.replace("-", "_").replace("__", "--", 1)):
            if flag in self._option_string_actions:
                return self._option_string_actions[flag]
        return None


def engine_parser(plugins: Plugins) -> EngineParser:
    """Return the parser of the engine and the extensions."""
    parser = EngineParser(plugins.engine_name)
    plugins.add_arguments(parser)
    return parser


def parse_engine_args(parser: EngineParser, rest: Sequence[str], config: ConfigFile | None) -> argparse.Namespace:
    """Parse the engine's flags; the command line takes precedence over the configuration file.

    :raises UsageError: a flag is unknown, or a value is invalid.
    """
    words = _words(parser, config) if config is not None else []
    arguments, unknown = parser.parse_known_args([*words, *_respelled(rest, parser)])
    if unknown:
        where = f"{config.path}: {ENGINE_ARGS_KEY}: " if config is not None and unknown[0] in words else ""
        raise UsageError(where + _unknown(unknown[0], parser), hint=f"`{parser.prog} --help` shows all flags")
    return arguments


def _respelled(words: Sequence[str], parser: EngineParser) -> list[str]:
    """Return the command line with every flag in the engine's own spelling.

    Engines' own command lines accept ``--max_model_len`` for ``--max-model-len``, and ``--config.key 3`` for one key of
    a flag whose value is a JSON object.

    :raises UsageError: a flag is given both as a whole and by its keys.
    """
    known = set(parser.flags)
    result: list[str] = []
    parts: dict[str, dict[str, Any]] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if word == "--":
            result += [word, *waiting]
            break
        flag, equals, value = word.partition("=")
        head, dot, path = flag.partition(".")
        dashed = head if head in known else head.replace("_", "-")
        if not word.startswith("-") or dashed not in known:
            result.append(word)
        elif not dot:
            result.append(dashed + equals + value)
        else:
            if not equals:
                value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
            _put(parts.setdefault(dashed, {}), path.split("."), value)
    for flag, given in parts.items():
        if any(word.partition("=")[0] == flag for word in result):
            raise UsageError(f"{flag} is given both as a whole and by its keys ({flag}.{next(iter(given))})")
    # Nothing after a bare `--` is a flag.
    at = result.index("--") if "--" in result else len(result)
    return [*result[:at], *(f"{flag}={json.dumps(given)}" for flag, given in parts.items()), *result[at:]]


def _put(into: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Set one key, at any depth, of a JSON object; text that is not valid JSON becomes a string."""
    *above, last = path
    for key in above:
        inner = into.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{'.'.join(path)}: {key} already has a value")
        into = inner
    try:
        into[last] = json.loads(text)
    except ValueError:
        into[last] = text


def check_spelling(rest: Sequence[str]) -> None:
    """Refuse flags that look like misspelled flags of the worker, when there is no engine to claim them.

    :raises UsageError: the message suggests the right flag, which is clearer than "no engine was chosen".
    """
    own = [name for row in OPTIONS for name in row.flags]
    for word in rest:
        flag = word.partition("=")[0]
        meant = suggestion(flag, [*own, *SWITCHES], cutoff=0.8) if flag.startswith("--") else ""
        if meant:
            raise UsageError(f"unknown flag {flag}{meant}", hint="`dynamo-worker --help` shows all flags")


def _unknown(word: str, parser: EngineParser) -> str:
    """Return the message for a word that neither the worker nor the engine accepts."""
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    flag = word.partition("=")[0]
    own = [name for row in OPTIONS for name in row.flags]
    return f"unknown flag {flag}{suggestion(flag, [*own, *SWITCHES, *parser.flags])}"


def _words(parser: EngineParser, config: ConfigFile) -> list[str]:
    """Return the engine's flags of a configuration file as command-line words."""
    if not isinstance(config.engine_args, Mapping):
        return [str(word) for word in config.engine_args]
    words: list[str] = []
    for key, value in config.engine_args.items():
        action = parser.action(str(key))
        if action is None or not action.option_strings:
            names = [flag.lstrip("-") for flag in parser.flags]
            raise UsageError(f"{config.path}: {ENGINE_ARGS_KEY}: unknown key {str(key)!r}{suggestion(str(key), names)}")
        words += _action_words(action, value)
    return words


def _action_words(action: argparse.Action, value: object) -> list[str]:
    """Return the words that give one flag one value."""
    flag = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
    if value is None:
        return []
    if isinstance(value, bool) and action.nargs == 0:
        negative = next((name for name in action.option_strings if name.startswith("--no-")), None)
        if value:
            return [flag]
        return [negative] if negative else []
    if isinstance(value, Mapping):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, (list, tuple)):
        if action.nargs in ("*", "+") or isinstance(action.nargs, int):
            return [flag, *map(str, value)]
        return [f"{flag}={item}" for item in value]
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return [f"{flag}={text}"] if flag.startswith("--") else [flag, text]
