"""Filters output of the Dynamo runtime that cannot be switched off: tracebacks, and a line for every request.

The runtime prints a traceback to ``sys.stderr`` for every exception of a handler (measured on 1.6.1), also for those
raised on purpose: one for every request that was handed off or invalid. The request path has logged all of them
already, in one line or with the traceback of the real error. Native code writes the text from another thread and
offers no hook.
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
from dynamo_worker.supervisor.log_lines import JsonLines

if TYPE_CHECKING:
    from types import FrameType

    from dynamo_worker.logs import UnblockedStream

log = get_logger(__name__)


class NativeOutputFilter:
    """Replaces ``sys.stderr``: output of native code goes to the log at level debug, everything else passes."""

    def __init__(self, stream: IO[str] | UnblockedStream) -> None:
        self._stream = stream
        self._held = ""

    def write(self, text: str) -> int:
        """Write ``text``, unless the only Python code on the stack is the ``traceback`` module."""
        frame: FrameType | None = sys._getframe().f_back  # noqa: SLF001 - the only way to find the caller
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
    """Replace ``sys.stderr`` with the filter in front of ``stream``; log handlers keep the stream itself."""
    sys.stderr = NativeOutputFilter(stream)


class FrontendOutput:
    """Removes from stderr the line that the runtime logs for every request, or makes every line a JSON object.

    For a frontend only, whose interpreter is idle. In a worker, native code that holds the interpreter and fills the
    pipe would block itself, and its last output before an abort would be lost.
    """

    #: Lines with the target ``request_span``; warnings pass. Two spaces: levels are padded to five letters.
    _LINE: Final = re.compile(rb'\S+  INFO (?:\S+: )?request_span: |\{(?=.*"level":"INFO").*"target":"request_span"')
    _COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")
    #: Milliseconds to wait for the reader of stderr. Then output is dropped without waiting, until it reads again.
    _PATIENCE: Final = 50
    #: Size of the pipe in bytes: more than native code writes while it holds the interpreter.
    _PIPE_BYTES: Final = 1 << 20
    #: Bytes read at once, and the longest part of a line that is held until the rest arrives.
    _MOST_BYTES: Final = 64 * 1024
    #: Seconds to empty the pipe at the end.
    _END: Final = 0.5

    def __init__(self, *, quiet: bool = True, as_json: bool = False) -> None:
        """Replace stderr with a pipe, and copy the lines from it to the real one in a thread.

        :param quiet: drop the lines about single requests, which the runtime logs whatever ``DYN_LOG`` says.
        :param as_json: turn lines that are not JSON objects into some.
        """
        self._quiet = quiet
        self._lines = JsonLines() if as_json else None
        self._stderr = os.dup(2)
        self._output, end = os.pipe()
        with contextlib.suppress(OSError):  # the user has too many pipes; it keeps the default size
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, self._PIPE_BYTES)
        self._stuck = False
        self._writable = select.poll()
        self._writable.register(self._stderr, select.POLLOUT)
        self._thread = threading.Thread(target=self._copy, name="stderr", daemon=True)
        self._thread.start()  # before stderr is replaced: if no thread can be started, the error must be visible
        os.dup2(end, 2)
        os.close(end)

    def close(self) -> None:
        """Restore stderr and wait until everything has arrived there."""
        os.dup2(self._stderr, 2)
        self._thread.join(self._END)

    def _copy(self) -> None:
        held = b""
        while data := os.read(self._output, self._MOST_BYTES):
            whole, newline, held = (held + data).rpartition(b"\n")
            lines = (whole + newline).splitlines(keepends=True)
            if len(held) > self._MOST_BYTES:
                lines, held = [*lines, held], b""
            kept = b"".join(line for line in lines if not self._drops(line))
            self._write(kept if self._lines is None else self._lines.feed(kept))
        self._write(held if self._lines is None else self._lines.feed(held) + self._lines.rest())

    def _drops(self, line: bytes) -> bool:
        return self._quiet and b"request_span" in line and self._LINE.match(self._COLOUR.sub(b"", line)) is not None

    def _write(self, data: bytes) -> None:
        for start in range(0, len(data), select.PIPE_BUF):  # a writable pipe takes at least this much
            self._stuck = not self._writable.poll(0 if self._stuck else self._PATIENCE)
            if self._stuck:
                return
            with contextlib.suppress(OSError):
                os.write(self._stderr, data[start : start + select.PIPE_BUF])
