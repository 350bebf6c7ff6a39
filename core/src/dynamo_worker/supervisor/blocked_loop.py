"""Says where the worker's event loop is blocked, long before the heartbeat timeout ends the worker.

The worker's main thread writes its stack into a pipe when it gets a signal (``faulthandler``). That needs neither the
event loop nor the GIL, and the thread reads only its own frames.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING

from dynamo_worker.supervisor.protocol import STACK_SIGNAL

if TYPE_CHECKING:
    from dynamo_worker.supervisor.report import Log
    from dynamo_worker.supervisor.worker_process import WorkerProcess
    from dynamo_worker.supervisor.worker_status import WorkerStatus

#: Seconds without a heartbeat after which the event loop counts as blocked: three heartbeats.
_BLOCKED_AFTER = 1.5
#: Seconds for the worker to write its stack.
_WRITE_SECONDS = 0.1
#: Seconds from one report to the next.
_REPORT_INTERVAL = 60.0
#: Bytes of a stack that are read, and frames that are reported, the innermost first.
_MOST_BYTES, _MOST_FRAMES = 64 * 1024, 12
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


class BlockedLoop:
    """Notices that heartbeats stay away, and logs the stack of the worker's main thread.

    :param log: gets one line per block, and at most one in ``_REPORT_INTERVAL`` seconds.
    """

    def __init__(self, worker: WorkerProcess, status: WorkerStatus, log: Log) -> None:
        self._worker = worker
        self._status = status
        self._log = log
        self._pipe: int | None = None
        #: The last heartbeat before the block that was noticed last.
        self._noticed: float | None = None
        self._read_at: float | None = None
        self._silent_until = 0.0
        self._unreported = 0

    def open(self, pipe: int) -> None:
        """Take over the end of the pipe that the stacks come out of."""
        self.close()
        os.set_blocking(pipe, False)
        self._pipe = pipe

    def close(self) -> None:
        """Close the pipe."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def next_timer(self) -> float | None:
        """Return when to call ``act_on_time`` (monotonic), or None."""
        return self._read_at if self._read_at is not None else self._due()

    def act_on_time(self) -> None:
        """Ask for the stack if it is time, or log what has come."""
        now = time.monotonic()
        if self._read_at is not None:
            if now >= self._read_at:
                self._read_at = None
                self._report(now)
        elif (due := self._due()) is not None and now >= due:
            self._noticed = self._status.last_beat
            if now < self._silent_until:
                self._unreported += 1
                return
            self._read()
            if self._worker.catches(STACK_SIGNAL):
                self._worker.signal(STACK_SIGNAL)
            self._read_at = now + _WRITE_SECONDS

    def _due(self) -> float | None:
        """Return when the event loop counts as blocked; None if nobody expects heartbeats, or it was noticed."""
        unresponsive = self._status.beat_due
        last = self._status.last_beat
        if self._pipe is None or unresponsive is None or self._worker.ended or last == self._noticed:
            return None
        due = last + _BLOCKED_AFTER
        return due if due + _WRITE_SECONDS < unresponsive else None  # otherwise all stacks come at once

    def _report(self, now: float) -> None:
        frames = _FRAME.findall(self._read())
        stack = " < ".join(f"{name} ({_short(path)}:{line})" for path, line, name in frames[:_MOST_FRAMES])
        more = {"unreported": self._unreported} if self._unreported else {}
        self._log.warning(
            "Worker event loop is blocked",
            no_heartbeat_s=now - (self._noticed or now),
            state=self._status.state,
            in_flight=self._status.in_flight,
            stack=stack or "unknown",
            **more,
        )
        self._silent_until, self._unreported = now + _REPORT_INTERVAL, 0

    def _read(self) -> str:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                return os.read(self._pipe, _MOST_BYTES).decode("utf-8", "replace")
        return ""


def _short(path: str) -> str:
    """Return the last two parts of a path, which name a module of a package."""
    return "/".join(path.rsplit("/", 2)[-2:])
