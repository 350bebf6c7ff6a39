"""Requests to stop: messages from the supervisor or, without one, signals sent to this process."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.exit_codes import SIGNAL_BASE
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.protocol import FORCED_STOP, SIGNAL_DEBOUNCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.host.supervisor_channel import SupervisorChannel

log = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class StopRequests:
    """Receives requests to stop: the first stops the worker gracefully, the second within seconds, the third kills it.

    :ivar level: the number of the latest step, 1 to 3; 0 before any request.
    :ivar signal: the signal that caused the latest request.
    :ivar at: ``time.monotonic()`` of the latest request.
    """

    def __init__(self, control: SupervisorChannel, on_stop: Callable[[int], None]) -> None:
        """Prepare to receive requests; :meth:`listen` starts.

        :param on_stop: called with every new level, 1 or 2.
        """
        self.level = 0
        self.signal = signal.SIGTERM
        self.at = 0.0
        self._control = control
        self._on_stop = on_stop
        self._signal_at = 0.0

    def listen(self) -> None:
        """Take messages and signals in the running event loop from now on."""
        loop = asyncio.get_running_loop()
        self._control.listen(loop, self._on_message)
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                loop.add_signal_handler(number, self._on_signal, number)

    def _on_message(self, message: dict[str, Any]) -> None:
        if message.get("type") == "stop":
            self._take(int(message["level"]), signal.Signals[message["signal"]], float(message["at"]))

    def _on_signal(self, number: signal.Signals) -> None:
        """Take a signal that was sent to this process, not to its supervisor."""
        now = time.monotonic()
        forced = number == signal.SIGQUIT
        if now < self._signal_at + SIGNAL_DEBOUNCE and not (forced and self.level < 2):
            return
        self._signal_at = now
        if forced:
            faulthandler.dump_traceback(all_threads=True)
        level = max(self.level + 1, 2 if forced else 1)
        steps = {1: f"stop gracefully, again to stop within {FORCED_STOP:g} s", 2: "stop now, again to kill"}
        log.info("Received shutdown signal", signal=signal.Signals(number).name, next=steps.get(level, "kill"))
        self._take(level, signal.Signals(number), now)

    def _take(self, level: int, number: signal.Signals, received_at: float) -> None:
        if level <= self.level:
            return
        self.level, self.signal = level, number
        if level <= 2:
            self.at = received_at
            if level == 2 and not self._control.supervised:  # otherwise the supervisor enforces the limit
                asyncio.get_running_loop().call_later(FORCED_STOP, os._exit, SIGNAL_BASE + number)
            self._on_stop(level)
        else:
            os._exit(SIGNAL_BASE + number)
