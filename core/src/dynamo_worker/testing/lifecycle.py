"""One whole life of an engine, observed: created, started, asked, drained, asked again, cleaned up twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
import uuid
from typing import TYPE_CHECKING

from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import describe
from dynamo_worker.testing.leftovers import MARKER
from dynamo_worker.testing.resource_snapshot import Snapshot
from dynamo_worker.testing.source_locations import Creations
from dynamo_worker.testing.trial import Trial, load_plugins, private_directories

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_worker.host.plugins.calling import HookOutcome
    from dynamo_worker.testing.subject import Subject
    from dynamo_worker.testing.trial import Answer

#: Seconds for what ends after the cleanup, such as threads that have been told to.
_SETTLE = 2.0
#: Signals that a worker handles; Python handles SIGINT.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _stop(number: int, _: object) -> None:
    """End this process, as the default action would."""
    sys.exit(128 + number)


class Lifecycle:
    """What there was before, during and after one life of the engine, and what its hooks did.

    :param subject: describes the engine. No other engine may run in this process.
    """

    def __init__(self, subject: Subject) -> None:
        self.creations = Creations()
        #: Failures and durations of hooks, by what was done.
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.after_drain: Answer | None = None
        self.pids: list[int] = []
        self.tasks: list[str] = []
        plugins = load_plugins(subject.engine)
        with self._surroundings(), self.creations.noted():
            gc.collect()
            loop = asyncio.new_event_loop()
            self.before = Snapshot.take(self.tmp)
            self.trial = Trial(subject, plugins, loop=loop)
            self.created = Snapshot.take(self.tmp)
            self.trial.start()
            self.pids = list(self.trial.engine.processes())
            self.trial.loop.run_until_complete(self._live())
            self.trial.close(clean=False)
            self.after = self._settled()

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Set a temporary directory and signal handlers as a worker does it, and mark child processes."""
        keys = ("TMPDIR", MARKER)
        saved, directory = {key: os.environ.get(key) for key in keys}, os.getcwd()
        with tempfile.TemporaryDirectory(prefix="dwl-", ignore_cleanup_errors=True) as self.tmp:
            os.environ["TMPDIR"], os.environ[MARKER] = self.tmp, uuid.uuid4().hex
            tempfile.tempdir = None
            handlers = {number: signal.signal(number, _stop) for number in _SIGNALS}
            try:
                yield
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                os.chdir(directory)
                tempfile.tempdir = None
                for key, value in saved.items():
                    if value is None:
                        os.environ.pop(key, None)
                    else:
                        os.environ[key] = value

    async def _live(self) -> None:
        trial = self.trial
        for number in (1, 2):
            await trial.ask(trial.request(5, prompt=number))
        name = trial.name()
        await trial.cancelled(2, name)
        await asyncio.wait({asyncio.ensure_future(trial.engine.abort(name))}, timeout=5)
        await self._hooks("drain", lambda: trial.plugins.drain(trial.engine, Deadline.after(5)))
        await self._hooks("second drain", lambda: trial.plugins.drain(trial.engine, Deadline.after(5)))
        with contextlib.suppress(Exception):
            self.after_drain = await asyncio.wait_for(trial.ask(trial.request(3)), 10)
        self.running = Snapshot.take(self.tmp)
        await self._hooks("cleanup", lambda: trial.plugins.cleanup(trial.engine, Deadline.after(15)))
        await self._hooks("second cleanup", lambda: trial.plugins.cleanup(trial.engine, Deadline.after(5)))
        await asyncio.sleep(0.05)
        own = asyncio.current_task()
        self.tasks = [str(task.get_coro()) for task in asyncio.all_tasks() if task is not own and not task.done()]

    async def _hooks(self, what: str, call: object) -> None:
        started = time.monotonic()
        outcomes: list[HookOutcome] = await call()  # type: ignore[operator]
        self.seconds[what] = time.monotonic() - started
        for outcome in outcomes:
            if outcome.error is not None:
                self.failures[what] = describe(outcome.error)

    def _settled(self) -> Snapshot:
        """Return what is left once nothing ends any more."""
        deadline = Deadline.after(_SETTLE * self.trial.subject.patience)
        while True:
            gc.collect()
            now = Snapshot.take(self.tmp)
            gone = not (now.processes.keys() - self.before.processes.keys()) and not (
                now.threads.keys() - self.before.threads.keys()
            )
            if gone or deadline.passed:
                return now
            time.sleep(0.02)

    def where(self, name: str) -> str | None:
        """Return where a file, a thread or a process was made; None if it was not seen."""
        return self.creations.locations.get(name)

    def files(self) -> list[str]:
        """Return the files and segments that the engine made or used outside of its own directories, and left."""
        made = {path for path in self.creations.locations if path.startswith(("/tmp/", "/var/tmp/", "/dev/shm/"))}  # noqa: S108
        left = {path for path in made | self.running.shared if os.path.exists(path) and path not in self.before.shared}
        return sorted(path for path in left if not path.startswith((self.tmp, private_directories())))
