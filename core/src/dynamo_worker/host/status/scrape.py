"""Renders the metrics for a scrape in a thread: neither the event loop nor the runtime waits for that."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dynamo_worker.host.status.http_message import HttpError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds to render everything; engines may read files of many processes.
_PATIENCE = 10.0
#: Seconds within which the runtime asks for the text of a scrape that went through the status server.
_FRESH = 1.0


class Scrape:
    """The text of ``/metrics``, rendered when it is asked for."""

    def __init__(self, render: Callable[[], str], *, patience: float = _PATIENCE) -> None:
        """Take the function that renders the metrics; it is called in a thread, one call at a time.

        :param patience: seconds to render them.
        """
        self._render = render
        self._patience = patience
        self._executor = ThreadPoolExecutor(1, "metrics")
        self._rendering: asyncio.Future[None] | None = None
        #: Scrapes for which the runtime has yet to ask for the text.
        self._announced = 0
        self._text = ""
        self._rendered_at = float("-inf")

    async def refresh(self) -> None:
        """Render the metrics; scrapes that overlap share one rendering.

        :raises HttpError: they cannot be rendered in time, or not at all.
        """
        rendering = self._rendering
        if rendering is None or rendering.done():
            try:
                rendering = asyncio.get_running_loop().run_in_executor(self._executor, self._update)
            except RuntimeError as error:  # no thread can be started
                raise HttpError("503 Service Unavailable", f"the metrics cannot be rendered: {error}") from error
            rendering.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._rendering = rendering
        # When it is done, another scrape may have begun the next one.
        done, _ = await asyncio.wait({rendering}, timeout=self._patience)
        if not done:
            raise HttpError("504 Gateway Timeout", f"the metrics could not be rendered within {self._patience:g} s")
        failure = rendering.exception()
        if failure is not None:
            raise HttpError("500 Internal Server Error", f"the metrics cannot be rendered: {failure}") from failure
        self._announced += 1

    def text(self) -> str:
        """Return the metrics; the runtime calls this on its thread."""
        if self._announced and time.monotonic() - self._rendered_at < _FRESH:
            self._announced -= 1
        else:  # it was asked directly, not through the status server
            self._announced = 0
            self._update()
        return self._text

    def close(self) -> None:
        """Let go of the thread."""
        self._executor.shutdown(wait=False)

    def _update(self) -> None:
        self._text = self._render()
        self._rendered_at = time.monotonic()
