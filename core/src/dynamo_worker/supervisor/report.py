"""The supervisor's log lines and the Kubernetes termination message."""

from __future__ import annotations

import errno
import json
import os
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor.files import open_regular
from dynamo_worker.supervisor.output import LAST_OUTPUT, Output
from dynamo_worker.supervisor.text import continued, escaped, format_value, redacted, safe, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Bytes of a log line: a pipe takes that many at once or not at all.
_MOST_BYTES = 4000

#: Characters of a field: longer texts are cut, so JSON stays valid.
_MOST_CHARACTERS = 700

#: Bytes of a termination message that the kubelet reads.
_MOST_TERMINATION_BYTES = 4096


class Log:
    """Writes log lines in the worker's format to stderr; never blocks and never raises.

    :param name: the logger's name, below ``dynamo_worker``.
    :param as_json: write one JSON object per line.
    :param output: shared with another log of this process; None: a new one.
    """

    def __init__(self, name: str, *, as_json: bool = False, output: Output | None = None) -> None:
        self.name = name
        self.as_json = as_json
        #: Descriptor 2.
        self.output = Output(2, self._lost) if output is None else output
        #: Called with each line: level, message, fields. It must not log.
        self.tap: Callable[[str, str, Mapping[str, Any]], None] | None = None

    def info(self, message: str, /, **fields: Any) -> None:
        """Log normal operation."""
        self._write("INFO", message, fields)

    def warning(self, message: str, /, **fields: Any) -> None:
        """Log a problem that does not end the worker."""
        self._write("WARNING", message, fields)

    def error(self, message: str, /, **fields: Any) -> None:
        """Log a failure."""
        self._write("ERROR", message, fields)

    def drain(self) -> None:
        """Give the reader a moment to take waiting output."""
        self.output.drain(LAST_OUTPUT)

    def _lost(self, lines: int) -> bytes:
        return self._line("WARNING", "Log lines lost: the reader is not keeping up", {"lines": lines})

    def _write(self, level: str, message: str, fields: dict[str, Any]) -> None:
        self.output.write(self._line(level, message, fields))
        if self.tap is not None:
            self.tap(level, message, fields)

    def _line(self, level: str, message: str, fields: dict[str, Any]) -> bytes:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
        if self.as_json:
            event: dict[str, object] = {
                "time": stamp,
                "level": level,
                "logger": self.name,
                "message": redacted(message, _MOST_BYTES),
            }
            event |= {name: without_secrets(name, value, _MOST_CHARACTERS) for name, value in fields.items()}
            line = escaped(json.dumps(event, ensure_ascii=False))
        else:
            line = f"{stamp} {level} {self.name}: {continued(message, _MOST_BYTES)}"
            line += "".join(f" {name}={format_value(value, name, _MOST_CHARACTERS)}" for name, value in fields.items())
        return line.encode("utf-8", "replace")[:_MOST_BYTES].decode("utf-8", "ignore").encode() + b"\n"


def write_termination_message(path: str, text: str) -> None:
    """Tell Kubernetes why the container ends, if there is a file for that.

    The file is a mount: it is overwritten in place, never created or replaced. A link in its place could lead to any
    file that we may write.

    :raises OSError: it cannot be written, or is not a regular file with one name.
    """
    try:
        descriptor = open_regular(path, os.O_WRONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if os.fstat(descriptor).st_nlink != 1:
            raise OSError(errno.EMLINK, "File has more than one name", path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, safe(text, _MOST_TERMINATION_BYTES).encode("utf-8", "replace")[:_MOST_TERMINATION_BYTES])
    finally:
        os.close(descriptor)
