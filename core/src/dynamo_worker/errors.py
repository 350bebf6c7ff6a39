"""The errors that users and plugins meet, each with its exit code."""

from __future__ import annotations

import errno
from collections.abc import Sized

from dynamo_worker.exit_codes import ExitCode

#: Error numbers for exhausted memory, processes, files or disk space.
_SHORT_OF = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)

#: Length limit for messages to clients.
_MESSAGE_CHARACTERS = 1000


class WorkerError(Exception):
    """An expected failure, reported as one message without a traceback.

    :param message: what went wrong, why and where, in one or two sentences.
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
    """The command line, the environment or the configuration file is invalid (exit code 2)."""

    exit_code = ExitCode.USAGE


class StartError(WorkerError):
    """The worker cannot start here (exit code 3): a missing package, a port in use, no GPU, no memory."""

    exit_code = ExitCode.START_FAILED


class ServerUnreachableError(WorkerError):
    """A server that the worker needs (etcd, NATS, Kubernetes) cannot be reached (exit code 4). A restart may help."""

    exit_code = ExitCode.UNREACHABLE


class EngineDeadError(WorkerError):
    """The engine failed and cannot recover (exit code 1). ``check_health`` and ``generate`` raise it."""


class EngineStalledError(EngineDeadError):
    """The engine makes no progress and does not answer a canary request."""


class NoThreadsError(WorkerError):
    """The process cannot start another thread (exit code 1): the runtime would leave requests waiting."""


class DiscoveryLostError(WorkerError):
    """The worker lost its lease, connection or entries in discovery and cannot restore them (exit code 1)."""


class InvalidRequestError(ValueError):
    """One request is invalid. Its client gets HTTP 400 with this message; other requests are unaffected."""


def shown(value: object) -> str:
    """Return a short text for an untrusted value, however large it is."""
    if isinstance(value, (str, bytes)):
        return repr(value[:80])
    if isinstance(value, Sized):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"{value!r:.80}"


def describe(error: BaseException) -> str:
    """Return the type and the message of an error in one line. Never raises, even if the error's own methods do."""
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException as broken:
        text = f"its message cannot be read ({type(broken).__name__})"
    return f"{kind}: {text}" if text else kind


def for_client(message: str) -> str:
    """Return a message shortened for a client: some errors quote the rejected value, at any length."""
    return message if len(message) <= _MESSAGE_CHARACTERS else f"{message[:_MESSAGE_CHARACTERS]}…"


def shortage(error: BaseException) -> StartError | None:
    """Return an actionable error if the cause is exhausted memory, processes, files or disk space, otherwise None."""
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
