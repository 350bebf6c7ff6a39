"""The engine's part of a command line: its parser, and the words that are given to it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dynamo_worker.cli.peer_words import peer_flags, without_peer_flags
from dynamo_worker.cli.spelling import respelled, unabbreviated
from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.config_file import read_flags
from dynamo_worker.host.config.options import ENGINE_ARGS_KEY
from dynamo_worker.host.config.own_flags import SWITCHES, own_flags
from dynamo_worker.host.plugins.engine_flags import EngineFlags
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from dynamo_worker.host.config.config_file import ConfigFile
    from dynamo_worker.host.plugins.facade import Plugins


class EngineParser(argparse.ArgumentParser):
    """The parser that plugins add their flags to; it raises :class:`UsageError`.

    :ivar declared: what the engine's plugin says about the engine's own command line.
    """

    def __init__(self, engine: str, declared: EngineFlags | None = None) -> None:
        self.engine = engine
        self.declared = declared or EngineFlags()
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
        if not self.declared.abbreviated:
            return None
        (flag,) = unabbreviated([dashed], self._option_string_actions, ())
        return self._option_string_actions.get(flag)

    def in_full(self, words: Sequence[str]) -> list[str]:
        """Return words with the engine's flags as the parser knows them."""
        known = self._option_string_actions
        if self.declared.abbreviated:
            others = {*own_flags(), *SWITCHES, *peer_flags(self.engine)} - known.keys()
            words = unabbreviated(words, known, others)
        return respelled(words, known)


def engine_parser(plugins: Plugins) -> EngineParser:
    """Return the parser of the engine and the extensions."""
    parser = EngineParser(plugins.engine_name, plugins.engine_flags)
    plugins.add_arguments(parser)
    return parser


def parse_engine_args(parser: EngineParser, rest: Sequence[str], config: ConfigFile | None) -> argparse.Namespace:
    """Parse the engine's flags.

    The command line takes precedence over the engine's own file of flags, and that over the worker's configuration
    file.

    :raises UsageError: a flag is unknown or refused, or a value is invalid.
    """
    words = _words(parser, config.engine_args, f"{config.path}: {ENGINE_ARGS_KEY}") if config is not None else []
    given = [*words, *parser.in_full(_with_file(parser, rest))]
    arguments, unknown = parser.parse_known_args(without_peer_flags(given, parser.engine, parser.flags))
    if unknown:
        where = f"{config.path}: {ENGINE_ARGS_KEY}: " if config is not None and unknown[0] in words else ""
        raise UsageError(where + _unknown(unknown[0], parser), hint=f"`{parser.prog} --help` shows all flags")
    return arguments


def _with_file(parser: EngineParser, rest: Sequence[str]) -> list[str]:
    """Return the command line with the flags of the engine's own file, if it names one, at its beginning.

    :raises UsageError: the file cannot be read or has unknown keys, or several files are named.
    """
    flag = parser.declared.file
    at = [i for i, word in enumerate(rest) if flag and word.partition("=")[0] == flag]
    if not at:
        return list(rest)
    if len(at) > 1:
        raise UsageError(f"{flag} is given {len(at)} times; expected one file")
    _, equals, path = rest[at[0]].partition("=")
    end = at[0] + (1 if equals else 2)
    if end > len(rest):
        raise UsageError(f"{flag} requires a value: FILE")
    path = path if equals else rest[end - 1]
    return [*_words(parser, read_flags(flag, Path(path)), f"{flag} {path}"), *rest[: at[0]], *rest[end:]]


def _unknown(word: str, parser: EngineParser) -> str:
    """Return the message for a word that neither the worker nor the engine accepts."""
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    flag = word.partition("=")[0]
    meant = suggestion(flag, {*own_flags(), *SWITCHES, *parser.flags, *peer_flags(parser.engine)})
    return f"unknown flag {flag}{meant}"


def _words(parser: EngineParser, flags: Mapping[str, object] | Sequence[object], where: str) -> list[str]:
    """Return the engine's flags of a file as command-line words.

    :param where: the file, for messages.
    :raises UsageError: a key is unknown.
    """
    if not isinstance(flags, Mapping):
        return [str(word) for word in flags]
    words: list[str] = []
    for key, value in flags.items():
        action = parser.action(str(key))
        flag = f"--{str(key).replace('_', '-')}"
        if action is not None and action.option_strings:
            words += _action_words(action, value)
        elif flag in peer_flags(parser.engine):
            words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [f"{flag}={value}"]
        else:
            names = [name.lstrip("-") for name in parser.flags]
            raise UsageError(f"{where}: unknown key {str(key)!r}{suggestion(str(key), names)}")
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
