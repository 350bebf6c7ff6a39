"""Keeps the tracebacks that the Dynamo runtime prints out of the log.

The runtime prints a traceback to ``sys.stderr`` for everything that a handler raises (measured on 1.6.1), also for
what is raised on purpose: one for every request that is handed off or was wrong. The request path has logged all of
them already, in one line or with the traceback of the real error. There is no switch for it, and no hook: the text
is written by native code from a thread of its own.
"""

from __future__ import annotations

import sys
import traceback
from typing import IO, TYPE_CHECKING, Any

from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from types import FrameType

log = get_logger(__name__)


class NativeOutputFilter:
    """Stands in for ``sys.stderr``: what native code writes goes to the log at level debug, all else passes."""

    def __init__(self, stream: IO[str]) -> None:
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


def redirect() -> None:
    """Put the filter in the place of ``sys.stderr``. Log handlers that are set up already keep the stream itself."""
    sys.stderr = NativeOutputFilter(sys.stderr)
