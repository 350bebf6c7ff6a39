"""The frontend beside a worker: from the start of its process to its last stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_worker.errors import WorkerError
from dynamo_worker.host.frontend.frontend_process import FRONTEND_ABORT_SECONDS
from dynamo_worker.host.monitors.engine_monitors import FrontendMonitor
from dynamo_worker.host.monitors.process_watch import ProcessWatch

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import EngineInfo
    from dynamo_worker.host.frontend.frontend_process import FrontendProcess
    from dynamo_worker.host.monitors.monitor_tasks import MonitorTasks


class EmbeddedFrontend:
    """A frontend process, watched until it drains."""

    def __init__(
        self, process: FrontendProcess, monitors: MonitorTasks, on_fatal: Callable[[WorkerError], None]
    ) -> None:
        """Manage ``process``.

        :param monitors: runs the monitor that checks whether the process answers.
        :param on_fatal: called when the process dies or hangs.
        """
        self._process = process
        self._monitors = monitors
        self._on_fatal = on_fatal
        self._watch = ProcessWatch(on_fatal)
        self._monitor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The base URL."""
        return self._process.url

    @property
    def failure(self) -> str | None:
        """How the process failed, in words; None while it runs and after a clean exit."""
        return self._process.failure

    async def wait_ready(self, info: EngineInfo) -> None:
        """Wait until the frontend lists the model, and watch the process from then on.

        :raises StartError: the frontend exited, or was not ready in time.
        """
        await self._process.wait_ready(listed_model(info))
        self._watch.watch([self._process.pid], "frontend process", WorkerError)

    def start_monitor(self, *, interval: float, timeout: float) -> None:
        """Check every ``interval`` seconds that the frontend answers within ``timeout`` seconds."""
        monitor = FrontendMonitor(self._process.check, self._on_hung, interval=interval, timeout=timeout)
        self._monitor = self._monitors.start(monitor.run())

    def drain(self) -> None:
        """Make the frontend stop accepting connections; it exits after its last stream, maybe later than the worker."""
        self._watch.close()
        if self._monitor is not None:
            self._monitors.stop_one(self._monitor)
        self._process.drain()

    async def stop(self, deadline: Deadline, *, abort: bool) -> None:
        """Wait until the process has exited, and kill it at the deadline.

        :param abort: wait for its streams no longer than ``FRONTEND_ABORT_SECONDS``.
        """
        await self._process.stop(deadline.within(FRONTEND_ABORT_SECONDS) if abort else deadline)

    def _on_hung(self, error: WorkerError) -> None:
        self._on_fatal(error)
        self._process.kill()  # it would not react to SIGTERM


def listed_model(info: EngineInfo) -> str | None:
    """Return the name under which a frontend lists the model, or None if it needs other workers to list it."""
    complete = info.worker_type == "aggregated" and not info.needs
    clients = not {"chat", "completions", "embedding"}.isdisjoint(info.endpoint_types)
    return info.model_name if info.model_path is not None and complete and clients else None
