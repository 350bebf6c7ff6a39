"""The engines of one conformance class: one that all checks share, and those that single checks use up."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from dynamo_worker.testing.crash import Crash
from dynamo_worker.testing.lifecycle import Lifecycle
from dynamo_worker.testing.trial import Trial, load_plugins

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from dynamo_worker.testing.subject import Subject

    T = TypeVar("T")


class SuiteEngines:
    """Starts engines when a check needs one. At most one runs at any time: engines share their modules' state."""

    def __init__(self) -> None:
        self._shared: Trial | None = None
        self._key: object = None
        self._lived = False
        self._records: dict[object, object] = {}
        #: Duration of the last start in seconds.
        self.start_seconds = 0.0

    def shared(self, subject: Subject) -> Trial:
        """Return the engine that all checks share, started; one that a check has broken is replaced."""
        key = (subject.engine, *subject.flags)
        trial = self._shared
        if trial is not None and (key != self._key or (trial.suspect and not trial.well())):
            self.close()
            trial = None
        if trial is None:
            trial = Trial(subject, load_plugins(subject.engine))
            started = time.monotonic()
            try:
                trial.start()
            except BaseException:
                trial.close()
                raise
            self.start_seconds = time.monotonic() - started
            self._shared, self._key, self._lived = trial, key, True
        trial.suspect = False
        return trial

    def fresh(self, subject: Subject) -> Trial:
        """Return an engine that is created and not started, for one check alone; the caller closes it."""
        self.close()
        self._lived = True
        return Trial(subject, load_plugins(subject.engine))

    def lifecycle(self, subject: Subject) -> Lifecycle:
        """Return the record of one life of the engine.

        It is not the first in this process: libraries keep threads and descriptors of their own once they are used.
        """

        def observe() -> Lifecycle:
            if not self._lived:
                self.shared(subject)
            self.close()
            return Lifecycle(subject)

        return self._recorded(("lifecycle", subject.engine, *subject.flags), observe)

    def crash(self, subject: Subject) -> Crash:
        """Return the record of the death of one of the engine's processes."""

        def kill() -> Crash:
            trial = self.fresh(subject)
            trial.start()
            return Crash(trial)

        return self._recorded(("crash", subject.engine, *subject.flags), kill)

    def _recorded(self, key: object, record: Callable[[], T]) -> T:
        """Return a record that is made once; a failure to make it is raised each time."""
        if key not in self._records:
            try:
                self._records[key] = record()
            except Exception as error:
                self._records[key] = error
        found = self._records[key]
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """End the shared engine."""
        trial, self._shared = self._shared, None
        if trial is not None:
            trial.close()
        asyncio.set_event_loop(None)
