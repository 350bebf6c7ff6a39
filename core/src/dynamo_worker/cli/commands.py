"""The names of the commands, and the arguments of those that take no settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dynamo_worker.errors import UsageError
from dynamo_worker.suggest import suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The commands besides running a worker, with their line in ``--help``.
COMMANDS: Final = {
    "engines": "list the installed engines and plugins",
    "check": "import one engine or plugin and report what is wrong with it",
    "new": "write the package of a new engine plugin, with tests",
    "plan": "show the shutdown timeline for the given settings",
    "explain": "tell how a worker ended, from its flight record",
    "top": "watch the workers of a namespace in the terminal",
    "drain": "take a running worker out of service without ending it",
    "resume": "return a drained worker to service",
    "frontend": "run the OpenAI HTTP frontend without a worker",
}


def unknown_command(word: str) -> UsageError:
    """Return the error for a first word that is not a command."""
    from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, discover

    if any(record.name == word for record in discover() if record.group == ENGINE_GROUP):
        return UsageError(f"unknown command {word!r}", hint=f"to run this engine: dynamo-worker --engine {word}")
    return UsageError(
        f"unknown command {word!r}{suggestion(word, COMMANDS)}",
        hint=f"the commands are {', '.join(COMMANDS)}; to run a worker: dynamo-worker --engine NAME",
    )


def only_flags(argv: Sequence[str], allowed: Sequence[str], usage: str) -> set[str]:
    """Return the flags given to a command that takes no settings.

    :param allowed: the flags of the command.
    :param usage: its usage line, for the message.
    :raises UsageError: there is another argument.
    """
    for word in argv:
        if word not in allowed:
            raise UsageError(f"unknown argument {word!r}{suggestion(word, allowed)}", hint=f"usage: {usage}")
    return set(argv)
