"""The event loop of supervisor and guardian: signals, children and descriptors, without threads or polling."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dynamo_worker.supervisor.output import Output


#: Seconds of the longest single wait: epoll takes no more than 24.8 days. A longer wait is interrupted.
_LONGEST_WAIT = 3600.0


class Loop:
    """Waits for signals and input, and reaps children.

    :param signals: signals to catch besides SIGCHLD.
    :param on_signal: called with each of them, outside any signal handler.
    :param on_child: called with pid and exit code (negative: minus the signal) of every child that ends.
    """

    def __init__(
        self,
        signals: Iterable[int],
        on_signal: Callable[[int], None],
        on_child: Callable[[int, int], None],
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._signals = frozenset(signals)
        #: Flushed as soon as their readers are ready.
        self.outputs: set[Output] = set()
        self._on_signal = on_signal
        self._on_child = on_child
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        self._other_end = wakeup  # keeps it open
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (*self._signals, signal.SIGCHLD):
            signal.signal(number, _ignore)
        self.add(self._wakeup.fileno(), self._read_signals)

    def add(self, descriptor: int, on_input: Callable[[], object]) -> None:
        """Call ``on_input`` whenever the descriptor is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, (on_input, None))

    def on_output(self, descriptor: int, on_input: Callable[[], None], on_output: Callable[[], None] | None) -> None:
        """Also call ``on_output`` whenever a descriptor passed to ``add`` is writable; None ends that."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if on_output else 0)
        self._selector.modify(descriptor, events, (on_input, on_output))

    def remove(self, descriptor: int) -> None:
        """Forget a descriptor. Call this before closing it."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(descriptor)

    def pump(self, timeout: float | None, descriptor: int | None = None) -> None:
        """Wait once and handle what has happened.

        :param timeout: seconds to wait at most; None: without limit.
        :param descriptor: also ends the wait when it is readable; the caller reads it.
        """
        if timeout is not None:
            timeout = min(timeout, _LONGEST_WAIT)
        watched = descriptor is not None
        if descriptor is not None:
            self.add(descriptor, _nothing)
        pending = [output for output in self.outputs if output.pending]
        for output in pending:
            self._selector.register(output.descriptor, selectors.EVENT_WRITE, (_nothing, output.flush))
        try:
            # The wait of a process that was stopped ends without reporting what has arrived: look again.
            for key, events in self._selector.select(timeout) or self._selector.select(0):
                on_input, on_output = key.data
                if events & selectors.EVENT_READ:
                    on_input()
                if events & selectors.EVENT_WRITE and on_output is not None:
                    on_output()
        finally:
            if watched and descriptor is not None:
                self.remove(descriptor)
            for output in pending:
                self.remove(output.descriptor)

    def reap(self) -> bool:
        """Reap all children that have ended, including adopted ones; return whether no child is left."""
        while True:
            try:
                result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return True
            if result is None:
                return False
            exited = result.si_code == os.CLD_EXITED
            self._on_child(result.si_pid, result.si_status if exited else -result.si_status)

    def close(self) -> None:
        """Stop listening. Signals stay caught, so none ends the process in its last moments."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._wakeup.close()
        self._other_end.close()

    def _read_signals(self) -> None:
        try:
            numbers = self._wakeup.recv(4096)
        except BlockingIOError:
            return
        for number in numbers:
            if number == signal.SIGCHLD:
                self.reap()
            elif number in self._signals:
                self._on_signal(number)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the wake-up descriptor has already delivered the signal."""


def _nothing() -> None:
    """Leave the input to the caller of ``pump``."""


def readable(descriptor: int, timeout: float) -> bool:
    """Return whether a descriptor becomes readable within a number of seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))
