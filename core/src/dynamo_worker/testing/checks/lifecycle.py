"""Checks of an engine's lifecycle: what creating, stopping and cleaning it up may do, and what is left at the end."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.deadline import Deadline
from dynamo_worker.testing.resource_snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from dynamo_worker.testing.lifecycle import Lifecycle
    from dynamo_worker.testing.trial import Trial


def _expect(lifecycle: Lifecycle, left: object, what: str, where: object = None) -> None:
    lifecycle.trial.expect(not left, f"{what}: {left!r:.300}", where)


class CreationChecks:
    """Creating an engine starts nothing."""

    def test_creating_starts_no_process(self, lifecycle: Lifecycle) -> None:
        """What is created before the start outlives a start that fails."""
        new = {
            pid: lifecycle.created.processes[pid]
            for pid in lifecycle.created.processes.keys() - lifecycle.before.processes.keys()
        }
        for command in new.values():
            raise lifecycle.trial.finding(f"a process runs before start: {command}", lifecycle.where(command))

    def test_creating_starts_no_thread(self, lifecycle: Lifecycle) -> None:
        """A thread that runs before the start survives an engine that was never started."""
        for ident in lifecycle.created.threads.keys() - lifecycle.before.threads.keys():
            name = lifecycle.created.threads[ident]
            raise lifecycle.trial.finding(f"a thread runs before start: {name}", lifecycle.where(name))

    def test_creating_opens_no_descriptor(self, lifecycle: Lifecycle) -> None:
        """A port or a file that is open before the start is held by an engine that may never start."""
        new = [*lifecycle.created.new_descriptors(lifecycle.before, sockets=True)]
        _expect(lifecycle, new, "sockets are open before start", type(lifecycle.trial.engine).__init__)


def _shutdown(lifecycle: Lifecycle) -> Callable[..., object]:
    found: Callable[..., object] = getattr(lifecycle.trial.engine, "shutdown", lifecycle.trial.engine.start)
    return found


def _at(trial: Trial, hook: str) -> object:
    return getattr(trial.engine, "shutdown" if "cleanup" in hook else "drain", None)


class LeftoverChecks:
    """What is left once the engine is cleaned up; its private directory goes with the worker."""

    def test_cleanup_ends_every_process(self, lifecycle: Lifecycle) -> None:
        """A process that is left keeps the GPU's memory, and the next worker does not fit."""
        for pid in lifecycle.after.processes.keys() - lifecycle.before.processes.keys():
            command = lifecycle.after.processes[pid]
            raise lifecycle.trial.finding(
                f"process {pid} is left: {command}", lifecycle.where(command) or _shutdown(lifecycle)
            )

    def test_cleanup_ends_every_thread(self, lifecycle: Lifecycle) -> None:
        """A thread that is left keeps its memory, and can hold up the end of the worker."""
        for ident in lifecycle.after.threads.keys() - lifecycle.before.threads.keys():
            name = lifecycle.after.threads[ident]
            raise lifecycle.trial.finding(f"the thread {name!r} is left", lifecycle.where(name) or _shutdown(lifecycle))

    def test_cleanup_ends_every_task(self, lifecycle: Lifecycle) -> None:
        """A task that goes on uses an engine that is gone."""
        _expect(lifecycle, lifecycle.tasks, "tasks are left", _shutdown(lifecycle))

    def test_cleanup_closes_every_socket(self, lifecycle: Lifecycle) -> None:
        """A socket that is open keeps its port, and the next worker cannot listen there."""
        _expect(
            lifecycle,
            lifecycle.after.new_descriptors(lifecycle.before, sockets=True),
            "sockets are left open",
            _shutdown(lifecycle),
        )

    def test_cleanup_closes_every_descriptor(self, lifecycle: Lifecycle) -> None:
        """Descriptors that are left open add up until none is left."""
        new = [
            target
            for target in lifecycle.after.new_descriptors(lifecycle.before, sockets=False)
            if not target.startswith(lifecycle.tmp)
        ]
        _expect(lifecycle, new, "descriptors are left open", _shutdown(lifecycle))

    def test_cleanup_removes_every_segment(self, lifecycle: Lifecycle) -> None:
        """Shared memory stays until the machine restarts: workers come and go until it is full."""
        left = [path for path in lifecycle.files() if path.startswith("/dev/shm/")]  # noqa: S108
        _expect(lifecycle, left, "shared memory is left", _shutdown(lifecycle))

    def test_cleanup_removes_every_file(self, lifecycle: Lifecycle) -> None:
        """Files outside of the private directory and TMPDIR are removed by nobody."""
        for path in lifecycle.files():
            if not path.startswith("/dev/shm/"):  # noqa: S108
                raise lifecycle.trial.finding(f"a file is left: {path}", lifecycle.where(path))

    def test_signal_handlers_are_left_alone(self, lifecycle: Lifecycle) -> None:
        """SIGTERM and SIGINT belong to the worker: without its handlers it cannot drain."""
        changed = [
            number.name
            for number, handler in lifecycle.running.signals.items()
            if lifecycle.before.signals[number] != handler
        ]
        _expect(lifecycle, changed, "the handlers of signals have changed", lifecycle.trial.engine.start)

    def test_the_current_directory_is_left_alone(self, lifecycle: Lifecycle) -> None:
        """Paths on the command line are relative to it, those of other plugins too."""
        if lifecycle.running.directory != lifecycle.before.directory:
            raise lifecycle.trial.finding(f"it is {lifecycle.running.directory} now", lifecycle.trial.engine.start)


class StopChecks:
    """Draining and cleaning up, in every state of the engine."""

    @pytest.mark.parametrize("what", ["drain", "second drain", "cleanup", "second cleanup"])
    def test_a_hook_of_the_stop_works(self, lifecycle: Lifecycle, what: str) -> None:
        """A hook that fails leaves its work to the supervisor's SIGKILL, and an error in the log of every stop."""
        failure = lifecycle.failures.get(what)
        lifecycle.trial.expect(failure is None, f"{what}: {failure}", _at(lifecycle.trial, what))

    @pytest.mark.parametrize("what", ["drain", "cleanup", "second cleanup"])
    def test_a_hook_of_the_stop_is_prompt(self, lifecycle: Lifecycle, what: str) -> None:
        """An idle engine that takes long to stop uses the time in which requests could finish."""
        limit = {"drain": 1.0, "cleanup": 4.0, "second cleanup": 0.5}[what] * lifecycle.trial.subject.patience
        seconds = lifecycle.seconds[what]
        lifecycle.trial.expect(
            seconds < limit, f"{what} took {seconds:.1f} s; at most {limit}", _at(lifecycle.trial, what)
        )

    def test_a_drained_engine_serves_again(self, lifecycle: Lifecycle) -> None:
        """``dynamo-worker resume`` brings a drained worker back: the drain must end nothing that it needs."""
        answer = lifecycle.after_drain
        well = answer is not None and bool(answer.reasons)
        lifecycle.trial.expect(well, f"after the drain: {answer!r:.200}", _at(lifecycle.trial, "drain"))

    def test_cleanup_keeps_its_deadline(self, fresh: Callable[[], Trial]) -> None:
        """A cleanup beyond its deadline is killed, with whatever it still held."""
        trial = fresh()
        trial.start()

        async def check() -> float:
            answers = [asyncio.ensure_future(trial.ask(trial.request(500, prompt=1))) for _ in range(2)]
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await trial.plugins.cleanup(trial.engine, Deadline.after(2))
            seconds = time.monotonic() - started
            for answer in answers:
                answer.cancel()
            await asyncio.wait(answers, timeout=1)
            return seconds

        try:
            seconds = trial.run(check(), where=_at(trial, "cleanup"))
        finally:
            trial.close(clean=False)
        limit = 2 + 0.5 * trial.subject.patience
        trial.expect(seconds < limit, f"with 2 s left, it took {seconds:.1f} s", _at(trial, "cleanup"))

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
    def test_a_stop_in_the_middle_of_the_start_leaves_nothing(
        self, fresh: Callable[[], Trial], start_seconds: float, share: float
    ) -> None:
        """Pods are stopped while they start, which is when an engine knows least of what it has started."""
        trial = fresh()
        before = Snapshot.take()

        async def check() -> None:
            starting = asyncio.ensure_future(trial.engine.start(1))
            await asyncio.wait({starting}, timeout=start_seconds * share + 0.005)
            starting.cancel()
            await asyncio.wait({starting}, timeout=10)
            if starting.done() and not starting.cancelled():
                starting.exception()
            await trial.cleanup()

        try:
            trial.run(check(), trial.subject.start_seconds, _at(trial, "cleanup"))
        finally:
            trial.close(clean=False)
        deadline = Deadline.after(2.0 * trial.subject.patience)
        while (left := Snapshot.take().processes.items() - before.processes.items()) and not deadline.passed:
            time.sleep(0.02)
        trial.expect(not left, f"processes are left: {sorted(left)}", trial.engine.start)

    def test_an_engine_can_be_started_again(self, fresh: Callable[[], Trial]) -> None:
        """State that the first engine leaves in its modules breaks the next one: tests and tools start several."""
        for _ in range(2):
            trial = fresh()
            try:
                try:
                    trial.start()
                except Exception as error:
                    raise trial.finding(f"the next start raised {error!r}", trial.engine.start) from error
                trial.expect(trial.run(trial.ask(trial.request(2))).reasons, "no answer", trial.engine.start)
            finally:
                trial.close()
