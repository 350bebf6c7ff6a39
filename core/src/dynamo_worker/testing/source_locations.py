"""Places in the code of an engine's author: of a frame, of a blocked event loop, and of what the engine made."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

import dynamo_worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

_OURS = Path(dynamo_worker.__file__).parent
_STDLIB = sysconfig.get_path("stdlib")
_PLUGGY = str(Path(pluggy.__file__).parent)
#: Time in seconds after which an event loop counts as blocked.
BLOCKED_SECONDS = 0.05
#: Seconds between two looks at the event loop.
_LOOK_SECONDS = 0.01


def source_location(frame: FrameType | None) -> str | None:
    """Return the innermost line of the author's code at or above a frame, as ``file:line``; None without one."""
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_authors(name):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _is_authors(name: str) -> bool:
    """Return whether a file is neither the standard library's nor this package's, except for its engines."""
    if name.startswith(("<", _PLUGGY)):
        return False
    if name.startswith(_STDLIB) and "-packages" not in name[len(_STDLIB) :]:
        return False
    path = Path(name)
    return not path.is_relative_to(_OURS) or path.is_relative_to(_OURS / "engines")


class LoopWatch:
    """Notes how long the running event loop is blocked in a ``with`` block, and by which line.

    Time in which the thread waits for a core is not counted, as far as the kernel reports it, and neither is a wait
    in which no code of the author's is on the stack.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._schedstat = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._ended = threading.Event()
        self._beat = time.monotonic()
        self._watcher = threading.Thread(target=self._watch, name="loop-watch", daemon=True)
        self._handle: asyncio.TimerHandle | None = None
        #: The longest block in seconds.
        self.longest = 0.0
        #: The line that ran then.
        self.where = ""

    def __enter__(self) -> LoopWatch:  # noqa: PYI034 - typing.Self needs Python 3.11
        self._tick()
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._watcher.join()
        if self._handle is not None:
            self._handle.cancel()

    def _tick(self) -> None:
        self._beat = time.monotonic()
        self._handle = self._loop.call_later(_LOOK_SECONDS / 2, self._tick)

    def _waited(self) -> float:
        """Return the seconds that the loop's thread has waited for a core."""
        with contextlib.suppress(OSError, IndexError, ValueError), open(self._schedstat, encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
        return 0.0

    def _watch(self) -> None:
        waited = self._waited()
        while not self._ended.wait(_LOOK_SECONDS):
            late = time.monotonic() - self._beat
            if late < 2 * _LOOK_SECONDS:
                waited = self._waited()
                continue
            blocked = late - (self._waited() - waited)
            if blocked > max(self.longest, BLOCKED_SECONDS):
                where = source_location(sys._current_frames().get(self._thread))  # noqa: SLF001
                if where is not None:
                    self.longest, self.where = blocked, where


class Creations:
    """Notes who makes files, threads and processes in this process: where in the author's code."""

    def __init__(self) -> None:
        #: The places by path of a file, by name of a thread, and by command line of a process.
        self.locations: dict[str, str] = {}
        self._open = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Take notes during a ``with`` block. The hook itself stays: Python cannot remove it."""
        sys.addaudithook(self._note)
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._open:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & os.O_CREAT and isinstance(path, (str, bytes, os.PathLike)):
                self._keep(os.path.abspath(os.fsdecode(path)))
        elif event == "os.mkdir":
            self._keep(os.path.abspath(os.fsdecode(arguments[0])))
        elif event == "subprocess.Popen":
            self._keep(" ".join(map(str, arguments[1])))
        elif event in ("_thread.start_new_thread", "_thread.start_joinable_thread"):
            thread = getattr(arguments[0], "__self__", None)
            if isinstance(thread, threading.Thread):
                self._keep(thread.name)

    def _keep(self, name: str) -> None:
        where = source_location(sys._getframe(2))  # noqa: SLF001
        if where is not None:
            self.locations[name] = where
