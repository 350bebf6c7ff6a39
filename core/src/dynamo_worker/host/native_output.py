"""Keeps out of the log what the Dynamo runtime prints and has no switch for: tracebacks, a line for every request.

It prints a traceback to ``sys.stderr`` for everything that a handler raises (measured on 1.6.1), also for what is
raised on purpose: one for every request that is handed off or was wrong. The request path has logged all of them
already, in one line or with the traceback of the real error. There is no switch for it, and no hook: the text is
written by native code from a thread of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import sys
import threading
import traceback
from typing import IO, TYPE_CHECKING, Any, Final

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from types import FrameType

    from dynamo_worker.logs import UnblockedStream

log = get_logger(__name__)


class NativeOutputFilter:
    """Stands in for ``sys.stderr``: what native code writes goes to the log at level debug, all else passes."""

    def __init__(self, stream: IO[str] | UnblockedStream) -> None:
        self._stream = stream
        self._held = ""

    def write(self, text: str) -> int:
        """Write ``text``, unless no Python code but the printing of tracebacks has asked for it."""
        frame: FrameType | None = sys._getframe().f_back  # noqa: SLF001 - the only way to see who calls
        while frame is not None and frame.f_code.co_filename == traceback.__file__:
            frame = frame.f_back
        if frame is not None:
            return self._stream.write(text)
        *lines, self._held = (self._held + text).split("\n")
        for line in lines:
            log.debug("Runtime printed", text=line)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redirect(stream: UnblockedStream) -> None:
    """Put the filter, in front of ``stream``, in the place of ``sys.stderr``; log handlers keep the stream itself."""
    sys.stderr = NativeOutputFilter(stream)


class RequestLineFilter:
    """Takes the line that the runtime logs for every request, whatever ``DYN_LOG`` says, out of what goes to stderr.

    For a frontend only: its interpreter is idle. In a worker, native code that holds the interpreter and writes more
    than the pipe takes would wait for itself, and what it writes in its last moment, before an abort, would be lost.
    """

    #: Its target is ``request_span``. Warnings with that target pass. Two spaces: it fills levels up to five letters.
    _LINE: Final = re.compile(rb'\S+  INFO (?:\S+: )?request_span: |\{(?=.*"level":"INFO").*"target":"request_span"')
    _COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")
    #: How long a reader of our log may keep us waiting, in milliseconds. Then what it should read is dropped, and more
    #: without waiting until it reads again.
    _PATIENCE: Final = 50
    #: Bytes that native code may be ahead of us: more than it writes while it holds the interpreter.
    _PIPE_BYTES: Final = 1 << 20
    #: Read at once, and the longest part of a line that is held until the rest of it comes.
    _MOST_BYTES: Final = 64 * 1024
    #: Seconds for what is still in the pipe at the end.
    _END: Final = 0.5

    def __init__(self) -> None:
        """Put a pipe in the place of stderr, of which a thread copies all other lines to the real one."""
        self._stderr = os.dup(2)
        self._output, end = os.pipe()
        with contextlib.suppress(OSError):  # the user has too many pipes: then it has the usual size
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, self._PIPE_BYTES)
        self._stuck = False
        self._writable = select.poll()
        self._writable.register(self._stderr, select.POLLOUT)
        self._thread = threading.Thread(target=self._copy, name="stderr", daemon=True)
        self._thread.start()  # before stderr is gone: where there are no more threads the error has to be seen
        os.dup2(end, 2)
        os.close(end)

    def close(self) -> None:
        """Give stderr back and wait until everything has arrived there."""
        os.dup2(self._stderr, 2)
        self._thread.join(self._END)

    def _copy(self) -> None:
        held = b""
        while data := os.read(self._output, self._MOST_BYTES):
            whole, newline, held = (held + data).rpartition(b"\n")
            lines = (whole + newline).splitlines(keepends=True)
            if len(held) > self._MOST_BYTES:
                lines, held = [*lines, held], b""
            self._write(b"".join(line for line in lines if not self._drops(line)))
        self._write(held)

    def _drops(self, line: bytes) -> bool:
        return b"request_span" in line and self._LINE.match(self._COLOUR.sub(b"", line)) is not None

    def _write(self, data: bytes) -> None:
        for start in range(0, len(data), select.PIPE_BUF):  # so much a pipe takes at once if it takes anything
            self._stuck = not self._writable.poll(0 if self._stuck else self._PATIENCE)
            if self._stuck:
                return
            with contextlib.suppress(OSError):
                os.write(self._stderr, data[start : start + select.PIPE_BUF])
