"""Shows the progress of a drain: a live line on a terminal, otherwise a log line every few seconds."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.protocol import FORCED_STOP

if TYPE_CHECKING:
    from collections.abc import Sized
    from types import TracebackType

    from rich.live import Live
    from typing_extensions import Self

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.host.config.drain_mode import DrainMode

log = get_logger(__name__)

#: Seconds between updates of the live line, and between log lines.
_LIVE_INTERVAL = 0.2
_LOG_INTERVAL = 5.0


#: What the next signal does during a shutdown.
SECOND_SIGNAL = f"Ctrl-C again to stop within {FORCED_STOP:g} s."


class DrainProgress:
    """Shows requests left, time left, and what Ctrl-C does, while the ``with`` block runs.

    :ivar deadline: when the rest is ended.
    :ivar mode: how it is ended.
    """

    def __init__(self, requests: Sized, deadline: Deadline, mode: DrainMode, hint: str = SECOND_SIGNAL) -> None:
        """Show how many ``requests`` are left; nothing if there are none at the start.

        :param hint: what Ctrl-C does, for a terminal.
        """
        self.deadline = deadline
        self.mode = mode
        self._requests = requests
        self._hint = hint
        self._task: asyncio.Task[None] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if len(self._requests):
            self._task = asyncio.ensure_future(self._show_live() if sys.stderr.isatty() else self._log())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._live is not None:
            self._live.stop()

    async def _log(self) -> None:
        while True:
            await asyncio.sleep(_LOG_INTERVAL)
            log.info("Still draining", in_flight=len(self._requests), left_s=self.deadline.remaining())

    async def _show_live(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as self._live:
            while True:
                left = len(self._requests)
                self._live.update(
                    Text.assemble(
                        ("Draining ", "bold"),
                        f"{left} request{'s' if left != 1 else ''} left, {self.deadline.remaining():.0f} s until "
                        f"the rest is {self.mode.remainder}. ",
                        (self._hint, "dim"),
                    ),
                    refresh=True,
                )
                await asyncio.sleep(_LIVE_INTERVAL)
