"""The program of an engine's process: ``python -m dynamo_worker.kit.child_main package.module:Class``.

It loads the class and lets it serve, reports why that fails, and ends it in order when SIGTERM arrives or the worker is
gone. :class:`~dynamo_worker.kit.child_process.ChildProcess` starts it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pkgutil
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.kit.child_messages import VARIABLE, Lines, line, message

if TYPE_CHECKING:
    from dynamo_worker.kit.child_loop import StepEngine
    from dynamo_worker.kit.child_tasks import TaskEngine

_READ_BYTES: Final = 64 * 1024
#: Longest traceback that is sent, in characters; its end tells most.
_TRACEBACK_CHARACTERS: Final = 3000
#: Directories of code between this module and the engine's.
_OURS: Final = (os.path.dirname(__file__), os.path.dirname(importlib.__file__))


class _Terminated(SystemExit):
    """Raised in the main thread by the first SIGTERM, wherever the engine is; asyncio lets it through."""


class _Sigterm:
    """The handler of SIGTERM, which interrupts the engine once, and not while it is closed."""

    def __init__(self) -> None:
        self.armed = True
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise _Terminated


def _first_message(connection: socket.socket) -> tuple[dict[str, Any], Lines]:
    lines = Lines()
    while not (found := lines.feed(connection.recv(_READ_BYTES) or _gone())):
        pass
    return message(found[0]), lines


def _gone() -> bytes:
    raise ConnectionError("the worker is gone")


def _load(target: str, path: list[str]) -> type[StepEngine | TaskEngine]:
    """Return the engine's class, from a module that the worker can import."""
    sys.path += [place for place in path if place not in sys.path]
    found: type[StepEngine | TaskEngine] = pkgutil.resolve_name(target)
    return found


def main() -> int:
    """Run one engine, and return the exit code."""
    sigterm = _Sigterm()
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr may be closed
        faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):  # lines appear when they are written, not when a buffer is full
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    connection = socket.socket(fileno=int(os.environ.pop(VARIABLE)))
    connection.set_inheritable(False)
    engine: StepEngine | TaskEngine | None = None
    code = 0
    try:
        try:
            first, lines = _first_message(connection)
            engine = _load(sys.argv[1], first["path"])()
            engine.serve(connection, first, lines)
        finally:
            sigterm.armed = False
    except _Terminated:
        pass
    except (ConnectionError, BrokenPipeError) as error:
        if _is_connected(connection):
            code = _report(connection, error)
    except BaseException as error:
        code = _report(connection, error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if engine is not None:
        try:
            engine.close()
        except BaseException:
            traceback.print_exc()
            code = code or 1
    connection.close()
    return code


def _is_connected(connection: socket.socket) -> bool:
    """Return whether the worker is still there: an engine's own connections may break, too."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _is_ours(file: str) -> bool:
    """Return whether a frame only leads to the engine's code."""
    return file.startswith("<frozen importlib") or os.path.dirname(file) in _OURS or file == pkgutil.__file__


def _report(connection: socket.socket, error: BaseException) -> int:
    """Say why the engine ends, on stderr and to the worker."""
    if isinstance(error, SystemExit) and not isinstance(error.code, int):
        text = str(error.code)
        print(text, file=sys.stderr)
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame.f_code.co_filename):
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))
        sys.stderr.write(text)
    with contextlib.suppress(OSError):
        connection.settimeout(1.0)  # the worker may not read
        connection.sendall(line({"failed": text.strip()[-_TRACEBACK_CHARACTERS:]}))
    return 1


if __name__ == "__main__":
    sys.exit(main())
