"""Makes what the processes of a worker print fit for a log collector: JSON objects only, or text without colours.

The Dynamo runtime, engines and their libraries print lines of their own: progress bars, tracebacks, messages of native
code. A collector that expects JSON would drop or misread them.
"""

from __future__ import annotations

import json
import re
import time
from typing import Final

#: Bytes of a line that are held until its end arrives; a longer line is cut into several.
_MOST_HELD: Final = 256 * 1024
#: Bytes of an escape sequence that may be cut off at the end of a piece.
_MOST_ESCAPE: Final = 32

#: A control sequence (colours, cursor) or an operating system command (titles, links) for a terminal.
_ESCAPE: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
#: The beginning of one at the end of a piece.
_UNFINISHED: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*)?\x1b?\Z")
#: Where lines of other programs name their level: near the beginning.
_LEVEL: Final = re.compile(r"\b(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)\b")
_LEVELS: Final = {"WARN": "WARNING", "FATAL": "CRITICAL"}
_LEVEL_WITHIN: Final = 80
_TRACEBACK: Final = "Traceback (most recent call last)"
#: Lines of a traceback that are held until it ends.
_MOST_LINES: Final = 500


class PlainText:
    """Removes what only terminals understand from text that comes in pieces."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """Return a piece of output as it may be logged. Holds back an escape sequence that has not ended."""
        if not self._held and b"\x1b" not in piece:
            return piece
        piece = _ESCAPE.sub(b"", self._held + piece)
        unfinished = _UNFINISHED.search(piece, max(0, len(piece) - _MOST_ESCAPE))
        self._held = piece[unfinished.start() :] if unfinished else b""
        return piece[: unfinished.start()] if unfinished else piece

    def rest(self) -> bytes:
        """Return what was held back."""
        held, self._held = self._held, b""
        return held


class JsonLines:
    """Turns every line that is not a JSON object into one, from output that comes in pieces.

    An indented line continues the one before it if both are in one piece. A traceback is one event, although Python
    writes it line by line.
    """

    def __init__(self) -> None:
        self._held = b""
        # The lines of the event that may go on.
        self._event: list[str] = []

    def feed(self, piece: bytes) -> bytes:
        """Return whole lines of output, one JSON object each. Holds back a line or a traceback that has not ended."""
        held = self._held + piece
        whole, newline, self._held = held.rpartition(b"\n")
        objects = self._objects(whole) if newline else b""
        while len(self._held) >= _MOST_HELD:
            objects += self._objects(self._held[:_MOST_HELD])
            self._held = self._held[_MOST_HELD:]
        return objects

    def rest(self) -> bytes:
        """Return what was held back."""
        held, self._held = self._held, b""
        return (self._objects(held) if held else b"") + self._closed()

    def _objects(self, lines: bytes) -> bytes:
        objects = b""
        for line in lines.split(b"\n"):
            if _is_object(line):
                objects += self._closed() + line + b"\n"
                continue
            plain = _plain(line)
            if not _continues(plain, self._event):
                objects += self._closed()
            self._event.append(plain)
        if not _is_open_traceback(self._event):
            objects += self._closed()
        return objects

    def _closed(self) -> bytes:
        """Return the event that has ended, if there is any."""
        text = "\n".join(self._event).rstrip()
        self._event = []
        return _object(text) + b"\n" if text else b""


def _is_object(line: bytes) -> bool:
    if not line.startswith(b"{") or not line.rstrip().endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _plain(line: bytes) -> str:
    """Return a line as a terminal would show it: of what a carriage return has overwritten, the last."""
    return _ESCAPE.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "backslashreplace")


def _continues(line: str, before: list[str]) -> bool:
    """Return whether a line belongs to those before it: it is indented, or the last line of their traceback."""
    return not line or line[0] in " \t" or _is_open_traceback(before)


def _is_open_traceback(lines: list[str]) -> bool:
    """Return whether the line with the error is still missing; without it, a traceback ends after some lines."""
    return (
        bool(lines)
        and lines[0].startswith(_TRACEBACK)
        and (len(lines) == 1 or lines[-1].startswith((" ", "\t")))
        and len(lines) < _MOST_LINES
    )


def _object(text: str) -> bytes:
    """Return a JSON object for a text of one or several lines."""
    now = time.time()
    found = _LEVEL.search(text, 0, _LEVEL_WITHIN)
    level = "ERROR" if text.startswith(_TRACEBACK) else _LEVELS.get(found[1], found[1]) if found else "INFO"
    event = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z",
        "level": level,
        "logger": "output",
        "message": text,
    }
    return json.dumps(event).encode()
