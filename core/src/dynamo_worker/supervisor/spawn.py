"""Starts the worker in its own session, tied to its parent's life, with clean signals and descriptors."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from dynamo_worker.supervisor import linux, mark

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class SpawnError(Exception):
    """The worker could not be started: no such command, or out of processes or descriptors."""


def reset_signals() -> None:
    """Reset every signal to its default action and unblock all, as a new program expects."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):  # reserved by the C library
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def fork() -> int:
    """Fork with all signals blocked in the child, so our handlers never run there.

    The child calls ``reset_signals``, or installs its own handlers and unblocks. Only for a process without threads.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def close_descriptors(*kept: int) -> None:
    """Close every descriptor above 2 except the given ones. For a child just forked."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(descriptor)


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    keep: int,
    mark_of_tree: int,
    output: Mapping[int, int],
) -> linux.Process:
    """Start a command as a child in a new session, to be killed by the kernel when this process dies.

    Only for a process without threads: the child runs Python between fork and exec.

    :param keep: the only descriptor above 2 that the child inherits.
    :param mark_of_tree: the mark of the child and its descendants.
    :param output: descriptors that become its stdout (1) and stderr (2).
    :raises SpawnError: out of processes or descriptors, or the command cannot be executed.
    """
    parent = os.getpid()
    try:
        report, report_child = os.pipe()
        try:
            pid = fork()
            if pid == 0:
                _become(command, environment, keep, mark_of_tree, output, report_child, parent)
        except OSError:
            os.close(report)
            raise
        finally:
            os.close(report_child)
    except OSError as error:
        raise SpawnError(f"cannot fork the worker process: {error.strerror}") from error
    stat = linux.read_stat(pid)
    with os.fdopen(report, "rb") as file:
        number = file.read()  # ends at once when exec succeeds: the pipe is close-on-exec
    if number:
        os.waitpid(pid, 0)
        raise SpawnError(f"cannot execute {command[0]!r}: {os.strerror(int(number))}")
    return linux.Process(pid, stat.start if stat is not None else 0)


def _become(
    command: Sequence[str],
    environment: Mapping[str, str],
    keep: int,
    mark_of_tree: int,
    output: Mapping[int, int],
    report: int,
    parent: int,
) -> None:
    """Turn the forked child into the command. Never returns."""
    try:
        os.setsid()
        if not linux.on_parent_death(signal.SIGKILL, parent):
            os._exit(128 + signal.SIGKILL)
        reset_signals()
        mark.put_on_ourselves(mark_of_tree)
        for descriptor, end in output.items():
            os.dup2(end, descriptor)
        close_descriptors(keep, report)
        os.set_inheritable(keep, True)
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        os.write(report, str(error.errno).encode())
    except BaseException:
        os.write(report, b"5")  # EIO: should never happen, but a second guardian must not live on
    finally:
        os._exit(1)
