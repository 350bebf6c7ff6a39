"""Carries the output of the worker's tree to our own stdout and stderr, without blocking on their readers."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import stat
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor.log_lines import JsonLines, PlainText
from dynamo_worker.supervisor.output import LAST_OUTPUT, Output

if TYPE_CHECKING:
    from dynamo_worker.supervisor.loop import Loop

#: Bytes of the worker's output that are read at a time, and that fit into its pipe while we do something else.
_PIECE, _PIPE_SIZE = 64 * 1024, 1 << 20
_F_SETPIPE_SZ = 1031  # in fcntl since Python 3.10 only where the C library's headers have it


class Relay:
    """Carries what the worker's tree prints to our own stdout and stderr, if those are pipes or sockets.

    A log reader that hangs or dies then affects neither the worker nor the Dynamo runtime nor the engine's processes.
    Terminals are inherited directly, and files unless every line has to be JSON.

    :param stderr: the destination of what is printed to stderr.
    :param as_json: turn lines that are not JSON objects into some.
    """

    def __init__(self, stderr: Output, *, as_json: bool = False) -> None:
        #: Descriptors that become the worker's stdout (1) and stderr (2).
        self.ends: dict[int, int] = {}
        self._sources: dict[int, Output] = {}
        self._lines: dict[int, JsonLines | PlainText] = {}
        places: dict[tuple[int, int], int] = {}
        for descriptor in (stderr.descriptor, 1):
            status = os.fstat(descriptor)
            is_pipe = stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)
            if not is_pipe and not (as_json and stat.S_ISREG(status.st_mode)):
                continue
            place = (status.st_dev, status.st_ino)
            if place not in places:
                reading, places[place] = os.pipe()
                os.set_blocking(reading, False)
                with contextlib.suppress(OSError):
                    fcntl.fcntl(reading, _F_SETPIPE_SZ, _PIPE_SIZE)
                self._sources[reading] = stderr if descriptor == stderr.descriptor else Output(descriptor, stderr.lost)
                self._lines[reading] = JsonLines() if as_json else PlainText()
            self.ends[descriptor] = places[place]

    def close_ends(self) -> None:
        """Close our copies of the writing ends, so only the worker's tree has them."""
        for descriptor in set(self.ends.values()):
            os.close(descriptor)
        self.ends = {}

    def start(self, loop: Loop) -> None:
        """Start carrying."""
        self._loop = loop
        for source, output in self._sources.items():
            loop.add(source, functools.partial(self._carry, source))
            loop.outputs.add(output)

    def finish(self) -> None:
        """Carry what is left after the tree has ended, and give the readers a moment."""
        deadline = time.monotonic() + LAST_OUTPUT
        outputs = set(self._sources.values())
        for source in list(self._sources):
            # Something may still be writing, such as a process that cannot be killed.
            while self._carry(source) and time.monotonic() < deadline:
                pass
            if source in self._lines:
                self._sources[source].write(self._lines[source].rest())
        for output in outputs:
            output.drain(deadline - time.monotonic())

    def _carry(self, source: int) -> bool:
        """Carry one piece; return whether there may be more."""
        try:
            data = os.read(source, _PIECE)
        except BlockingIOError:
            return False
        output, lines = self._sources[source], self._lines[source]
        if not data:
            output.write(lines.rest())
            self._loop.remove(source)
            os.close(source)
            del self._sources[source], self._lines[source]
            return False
        output.write(lines.feed(data))
        return True
