"""Shows the progress of a drain: a live line on a terminal, otherwise a log line every few seconds."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.protocol import FORCED_STOP

if TYPE_CHECKING:
    from types import TracebackType

    from rich.live import Live
    from typing_extensions import Self

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.host.config.drain_mode import DrainMode
    from dynamo_worker.host.requests.serving import RequestRegistry

log = get_logger(__name__)

#: Seconds between updates of the live line, and between log lines.
_LIVE_INTERVAL = 0.2
_LOG_INTERVAL = 5.0


class DrainProgress:
    """Shows requests left, time left, and what a second signal does, while the ``with`` block runs."""

    def __init__(self, registry: RequestRegistry, deadline: Deadline, mode: DrainMode) -> None:
        self._registry = registry
        self._deadline = deadline
        self._mode = mode
        self._task: asyncio.Task[None] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if len(self._registry):
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
            log.info("Still draining", in_flight=len(self._registry), left_s=self._deadline.remaining())

    async def _show_live(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as self._live:
            while True:
                left = len(self._registry)
                self._live.update(
                    Text.assemble(
                        ("Draining ", "bold"),
                        f"{left} request{'s' if left != 1 else ''} left, {self._deadline.remaining():.0f} s until "
                        f"the rest is {self._mode.remainder}. ",
                        (f"Ctrl-C again to stop within {FORCED_STOP:g} s.", "dim"),
                    ),
                    refresh=True,
                )
                await asyncio.sleep(_LIVE_INTERVAL)
