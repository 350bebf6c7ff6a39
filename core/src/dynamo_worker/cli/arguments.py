"""Taking a command line apart: the worker's own flags, and the rest, which is the engine's."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.own_flags import SWITCHES, own_flags
from dynamo_worker.host.config.runtime_options import RUNTIME_OPTIONS
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from dynamo_worker.host.config.config_file import ConfigFile
    from dynamo_worker.host.config.option_types import Option
    from dynamo_worker.host.config.settings import WorkerSettings

_SWITCHES_OF_THE_RUNTIME: Final = {True: "1", False: ""}


@dataclass
class CommandLine:
    """A parsed command line.

    :param values: the worker's settings by field name, as written.
    :param spelled: the flag that gave each of them.
    :param variables: environment variables to set for the Dynamo runtime; the empty ones are to be unset.
    :param switches: the :data:`SWITCHES` that were given.
    :param rest: everything else, for the engine's own parser.
    """

    values: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    rest: list[str] = field(default_factory=list)

    def take(self, row: Option, flag: str, value: str | bool) -> None:
        """Take the value of one of the worker's flags.

        :raises UsageError: it is wrong, and the settings will not see it.
        """
        if row in RUNTIME_OPTIONS:
            try:
                parsed = row.parse(value)
            except ValueError as error:
                raise UsageError(f"{flag} {value}: {error}") from error
            self.variables[row.env] = _SWITCHES_OF_THE_RUNTIME[parsed] if isinstance(parsed, bool) else str(parsed)
            return
        self.spelled[row.name] = flag
        if row.kind == "list":
            self.values.setdefault(row.name, []).append(value)
        else:
            self.values[row.name] = value


def split(
    argv: Sequence[str],
    switches: Iterable[str] = SWITCHES,
    claimed: Collection[str] = frozenset(),
    *,
    keep_separator: bool = False,
) -> CommandLine:
    """Separate the worker's own flags from the engine's.

    Only exact names match, without abbreviations or combined short flags: ``-pp 2`` is the engine's. Everything after
    a bare ``--`` is the engine's, including flags that the worker defines too.

    :param claimed: the flags of the worker that are the engine's.
    :param keep_separator: leave the bare ``--`` in the engine's part, where it separates a command.
    :raises UsageError: a flag has no value, or a switch has one.
    """
    rows = {flag: row for flag, row in own_flags().items() if flag not in claimed}
    own_switches = set(switches)
    line = CommandLine()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            line.rest += [word, *words] if keep_separator else words
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
            line.take(row, flag, flag == row.flag)
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
        line.take(row, flag, value)
    return line


def load_settings(line: CommandLine) -> tuple[WorkerSettings, ConfigFile | None]:
    """Return the settings for a command line, and the configuration file if there is one."""
    from dynamo_worker.host.config import config_file, settings

    path = settings.config_path(line.values, os.environ)
    config = config_file.read_config(path) if path else None
    return settings.load(line.values, os.environ, config, line.spelled), config


def check_spelling(rest: Sequence[str]) -> None:
    """Refuse flags that look like misspelled flags of the worker, when there is no engine to claim them.

    :raises UsageError: the message suggests the right flag, which is clearer than "no engine was chosen".
    """
    own = list(own_flags())
    for word in rest:
        flag = word.partition("=")[0]
        meant = suggestion(flag, [*own, *SWITCHES]) if flag.startswith("--") else ""
        if meant:
            raise UsageError(f"unknown flag {flag}{meant}", hint="`dynamo-worker --help` shows all flags")
