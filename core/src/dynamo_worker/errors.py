"""The errors a person or a plugin can meet, each with the exit code it leads to."""

from __future__ import annotations

import errno
from collections.abc import Sized

from dynamo_worker.exit_codes import ExitCode

#: What an ``OSError`` has run short of: memory, processes, files, disk.
_SHORT_OF = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)

#: So much of a message reaches a client.
_MESSAGE_CHARACTERS = 1000


class WorkerError(Exception):
    """An expected failure: reported as one clear message without a traceback.

    :param message: what went wrong, why and where, in one sentence or two.
    :param hint: what to do next, or None.
    """

    exit_code: ExitCode = ExitCode.FATAL

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n  next: {self.hint}" if self.hint else message


class UsageError(WorkerError):
    """The command line, the environment or the configuration file is wrong (exit code 2)."""

    exit_code = ExitCode.USAGE


class StartError(WorkerError):
    """The worker cannot start here (exit code 3): a missing package, a port in use, no GPU, no memory."""

    exit_code = ExitCode.START_FAILED


class EngineDeadError(WorkerError):
    """The engine is beyond repair (exit code 1). ``check_health`` and ``generate`` raise it."""


class EngineStalledError(EngineDeadError):
    """The engine makes no progress and does not answer a canary request."""


class NoThreadsError(WorkerError):
    """No thread can be started any more (exit code 1): the runtime would leave requests waiting."""


class DiscoveryLostError(WorkerError):
    """The worker is out of discovery and cannot come back: lease, connection or entries are lost (exit code 1)."""


class InvalidRequestError(ValueError):
    """One request is wrong. It ends in HTTP 400 with this message for its client and harms no other request."""


def shown(value: object) -> str:
    """Return what a message says of a value that somebody else has made: short, however large the value is."""
    if isinstance(value, (str, bytes)):
        return repr(value[:80])
    if isinstance(value, Sized):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{value!r:.80}"


def describe(error: BaseException) -> str:
    """Return what kind of error it is and what it says, in one line; never raises, whatever the error is made of."""
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException as broken:
        text = f"its message cannot be read ({type(broken).__name__})"
    return f"{kind}: {text}" if text else kind


def for_client(message: str) -> str:
    """Return as much of a message as a client gets: some errors quote what they refuse, whatever its length."""
    return message if len(message) <= _MESSAGE_CHARACTERS else f"{message[:_MESSAGE_CHARACTERS]}…"


def shortage(error: BaseException) -> StartError | None:
    """Return what to say about an error that says no more than that this machine or container has run short."""
    text = f"{type(error).__name__}: {error}"
    if not (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in _SHORT_OF)
        or (isinstance(error, ImportError) and text.endswith(("map segment from shared object", "allocate memory")))
        or (isinstance(error, RuntimeError) and str(error) == "can't start new thread")
    ):
        return None
    return StartError(
        f"a limit of this machine or container is reached: {text}",
        hint="raise it: the container's memory, processes or disk, or `ulimit` (-v memory, -n files, -u processes)",
    )
