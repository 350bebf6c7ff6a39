"""The fault table: every fault that a worker must handle, injected into real process trees with signals.

All engines share one table. A plugin's tests derive from :class:`FaultTable` and describe the engine with a
:class:`~dynamo_worker.testing.subject.Subject`: how to start it, and the names of its processes::

    @pytest.fixture
    def subject() -> Subject:
        return Subject("echo", ["--process-tree"], processes={"core": r"echo_process:Core"})

    class TestFaults(FaultTable): ...

Every test ends with a check for leftovers. The time limits are generous (``Subject.patience``), because machines that
run tests are busy. ``benchmarks/lifecycle.py`` measures the actual times.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from typing import TYPE_CHECKING, ClassVar

import pytest

from dynamo_worker.supervisor import linux
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.testing.client import Load, chat
from dynamo_worker.testing.limits import pids_cgroup
from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dynamo_worker.testing.client import Result
    from dynamo_worker.testing.cluster import Cluster, Worker
    from dynamo_worker.testing.subject import Subject

    #: Starts a number of workers with extra arguments, and returns them once they are ready.
    Start = Callable[..., list[Worker]]


class FaultTable:
    """The tests. Each one runs the subject's real engine with the real runtime and frontend."""

    #: Shorter than the default, which keeps the tests short. Streams must last longer.
    GRACE = ("--grace-period", "1")
    #: The most rounds of :meth:`each_process`, each of which starts two workers; None: one for each process. An engine
    #: of two processes that takes long to start can do with one: each process is used once, busy or idle.
    ROUNDS: ClassVar[int | None] = None

    @pytest.fixture
    def engine_args(self, subject: Subject) -> list[str]:
        """Return the subject's arguments and the tests' grace period."""
        return [*subject.args, *self.GRACE]

    @pytest.fixture(autouse=True)
    def explained(self, cluster: Cluster) -> Iterator[None]:
        """After each row, check that the flight record explains the end of each worker that has ended."""
        yield
        for worker in cluster.workers:
            if not worker.running:
                worker.check_explained()

    @pytest.fixture
    def start(self, cluster: Cluster) -> Start:
        """Return a function that starts workers behind a frontend, and waits until each has completed a request."""

        def start(count: int, *arguments: str) -> list[Worker]:
            workers = cluster.serve(count, *arguments)
            for worker in workers:
                cluster.wait_routed(worker)
            return workers

        return start

    @pytest.fixture
    def serving(self, start: Start) -> Worker:
        """Return a worker that is ready behind a frontend."""
        return start(1)[0]

    def busy(self, cluster: Cluster, subject: Subject, worker: Worker) -> Load:
        """Start streams, at least one of which is in flight on this worker."""
        load = cluster.load(subject.streams, subject.stream_tokens, prompt=PROMPT)
        assert worker.metric("dynamo_worker_in_flight") > 0, "no stream in flight; do they end too soon?"
        return load

    @contextlib.contextmanager
    def steady(self, cluster: Cluster, subject: Subject) -> Iterator[list[Result]]:
        """Keep streams in flight during a ``with`` block; on exit, the yielded list contains all results."""
        results: list[Result] = []
        over = threading.Event()

        def client(number: int) -> None:
            body = chat(subject.model, f"{PROMPT}{number}", subject.stream_tokens)
            # Pauses, because workers start meanwhile: on two cores an engine that never rests takes minutes for it.
            while not over.wait(STEADY_PAUSE):
                results.extend(Load(cluster.url, [body]).wait())

        clients = [threading.Thread(target=client, args=(number,)) for number in range(STEADY_CLIENTS)]
        for thread in clients:
            thread.start()
        try:
            yield results
        finally:
            over.set()
            for thread in clients:
                thread.join()

    def assert_complete(self, load: Load, subject: Subject) -> None:
        """Check that every stream is complete and has the expected text."""
        results = load.wait()
        assert all(result.ok for result in results), load.summary()
        if subject.expected is not None:
            for number, result in enumerate(results):
                assert result.text == subject.expected(f"{PROMPT}{number}", subject.stream_tokens)

    def assert_continued(self, load: Load, subject: Subject) -> None:
        """Check that every stream is complete although its worker is gone, or tells its client to ask again."""
        if subject.migrates:
            self.assert_complete(load, subject)
            return
        for result in load.wait():
            assert result.ok or "Service temporarily unavailable" in str(result.error), load.summary()

    def assert_gone(self, worker: Worker, since: float, bound: float, subject: Subject) -> int:
        """Wait until the worker has left discovery and has exited; return its exit code."""
        eventually(lambda: not worker.registered, bound * subject.patience, "the worker to leave discovery")
        unregistered = time.monotonic() - since
        code = worker.wait_gone(bound * subject.patience)
        print(f"out of discovery after {unregistered:.3f} s, gone after {time.monotonic() - since:.3f} s, exit {code}")
        return code

    # ------------------------------------------------------------------------------------------------ the engine

    def each_process(
        self, subject: Subject, start: Start, *arguments: str
    ) -> Iterator[tuple[Worker, int, Worker, int]]:
        """Yield a busy worker, a process of its engine, an idle worker, and a process of that one's engine.

        Over all iterations, each process of the engine is used once on a busy and once on an idle worker, unless
        :attr:`ROUNDS` says fewer.
        """
        if not subject.processes:
            pytest.skip("the subject declares no engine processes")
        patterns = list(subject.processes.values())
        for busy, idle in list(zip(patterns, [*patterns[1:], patterns[0]], strict=True))[: self.ROUNDS]:
            worker, spare = start(2, *arguments)
            yield worker, worker.engine_process(busy), spare, spare.engine_process(idle)

    def test_engine_process_killed(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        for worker, process, spare, idle_process in self.each_process(subject, start):
            load = self.busy(cluster, subject, worker)
            since = worker.signal(signal.SIGKILL, process)
            assert self.assert_gone(worker, since, 1.0, subject) == 1
            assert "Fatal error kind=EngineDeadError" in worker.log
            self.assert_continued(load, subject)
            since = spare.signal(signal.SIGKILL, idle_process)
            assert self.assert_gone(spare, since, 1.0, subject) == 1
            assert "Fatal error kind=EngineDeadError" in spare.log

    def test_engine_process_killed_while_draining(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        """The streams end with the engine, as if drained, but the stop is not clean."""
        if not subject.processes:
            pytest.skip("the subject declares no engine processes")
        worker, _ = start(2, "--grace-period", "0")
        process = worker.engine_process(next(iter(subject.processes.values())))
        load = self.busy(cluster, subject, worker)
        worker.signal(signal.SIGTERM)
        worker.wait_log(" Draining ")
        since = worker.signal(signal.SIGKILL, process)
        assert self.assert_gone(worker, since, 1.0, subject) == 1
        assert "Fatal error kind=EngineDeadError" in worker.log
        self.assert_continued(load, subject)

    def test_engine_process_stopped(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        self.check_standstill(cluster, subject, start, subject.stall_timeout)

    @pytest.mark.slow
    def test_engine_process_stopped_at_the_default_bound(
        self, cluster: Cluster, subject: Subject, start: Start
    ) -> None:
        self.check_standstill(cluster, subject, start, None)

    def check_standstill(self, cluster: Cluster, subject: Subject, start: Start, timeout: float | None) -> None:
        """Suspend each process of the engine, busy and idle; both workers must detect the stall in time.

        :param timeout: ``--stall-timeout`` in seconds; None uses the worker's default.
        """
        arguments = [] if timeout is None else ["--stall-timeout", str(timeout)]
        bound = DEFAULT_STALL_TIMEOUT if timeout is None else timeout
        for worker, process, spare, idle_process in self.each_process(subject, start, *arguments):
            load = self.busy(cluster, subject, worker)
            since = worker.signal(signal.SIGSTOP, process)
            assert self.assert_gone(worker, since, bound + 1.0, subject) == 1
            assert "Fatal error kind=EngineStalledError" in worker.log
            self.assert_continued(load, subject)
            since = spare.signal(signal.SIGSTOP, idle_process)
            assert self.assert_gone(spare, since, bound + 1.0, subject) == 1
            assert "Fatal error kind=EngineStalledError" in spare.log

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_no_false_alarm_under_saturating_load(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        (worker,) = start(1, "--stall-timeout", str(subject.stall_timeout))
        until = time.monotonic() + SATURATED_SECONDS
        bodies = [
            chat(subject.model, f"{PROMPT}{number}", subject.stream_tokens) for number in range(32 * subject.streams)
        ]
        while time.monotonic() < until:
            # Most streams queue behind others, and take longer than a single one would.
            load = Load(cluster.url, bodies, timeout=2 * SATURATED_SECONDS)
            assert all(result.ok for result in load.wait(2 * SATURATED_SECONDS)), load.summary()
        assert "Stalled" not in worker.log
        worker.stop()

    # ------------------------------------------------------------------------------------------------ the worker

    def test_worker_killed_busy(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        worker, spare = start(2)
        load = self.busy(cluster, subject, worker)
        since = worker.signal(signal.SIGKILL, worker.worker_pid)
        assert self.assert_gone(worker, since, 0.5, subject) == 128 + signal.SIGKILL
        self.assert_continued(load, subject)
        spare.stop()

    def test_supervisor_killed_and_guardian_killed(self, subject: Subject, start: Start) -> None:
        first, second = start(2)
        since = first.signal(signal.SIGKILL)
        assert self.assert_gone(first, since, 1.0, subject) == 128 + signal.SIGKILL
        since = second.signal(signal.SIGKILL, second.guardian_pid)
        assert self.assert_gone(second, since, 1.0, subject) == 1

    def test_supervisor_and_guardian_killed_at_once(self, subject: Subject, start: Start) -> None:
        """No process is left to clean up; the next start must find everything, whatever the processes are named."""
        (worker,) = start(1)
        stats = {pid: linux.read_stat(pid) for pid in worker.children()}
        tree = [Process(pid, stat.start) for pid, stat in stats.items() if stat is not None]
        run_dir, guardian = worker.run_dir, worker.guardian_pid
        for number in (signal.SIGSTOP, signal.SIGKILL):
            worker.signal(number, guardian)
            worker.signal(number)
        worker.wait_gone()
        (after,) = start(1)
        eventually(lambda: not run_dir.exists(), 20.0 * subject.patience, "its run directory to be removed")
        assert not [process for process in tree if linux.is_alive(process)]
        assert not worker.registered
        after.stop()

    def test_no_more_processes(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        """With the process limit reached, workers are still cleaned up and exit with the right code."""
        first, second, third = start(3)

        def end(worker: Worker, number: signal.Signals, pid: int, bound: float) -> int:
            load = self.busy(cluster, subject, worker)
            with no_more_processes([worker.pid, *worker.children()]):
                since = worker.signal(number, pid)
                code = self.assert_gone(worker, since, bound, subject)
                self.assert_continued(load, subject)
                eventually(lambda: not worker.run_dir.exists(), 5.0 * subject.patience, "its run directory to go")
            return code

        assert end(first, signal.SIGKILL, first.worker_pid, 3.0) == 128 + signal.SIGKILL
        assert end(second, signal.SIGKILL, second.pid, 3.0) == 128 + signal.SIGKILL
        assert end(third, signal.SIGTERM, third.pid, 25.0) == 0

    def test_registration_lost(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        """A worker whose registration disappears reports it and registers again, as after a long suspension."""
        load = self.busy(cluster, subject, serving)
        entries = [path for path in cluster.discovery.rglob(f"*{serving.instance}*") if path.is_file()]
        for path in entries:
            path.unlink()
        eventually(lambda: serving.status("/health")[0] == 503, 3.0 * subject.patience, "/health to answer 503")
        serving.wait_log("In discovery again", 5.0 * subject.patience)
        missing = [path for path in entries if not path.exists()]
        assert not missing, f"expected all of {entries} in discovery again, missing {missing}"
        assert serving.status("/health")[0] == 200
        eventually(lambda: cluster.ask(1).ok, 3.0 * subject.patience, "an answer")
        self.assert_complete(load, subject)
        serving.stop()

    # --------------------------------------------------------------------------------------------------- stopping

    def test_sigterm_idle(self, serving: Worker, subject: Subject) -> None:
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 5.0, subject) == 0
        for message in ("Received shutdown signal", "DistributedRuntime shutdown complete", "Cleaning up worker"):
            assert message in serving.log
        troubles = (" ERROR ", " WARNING dynamo_worker", "Traceback")
        said = [line for line in serving.log.splitlines() if any(trouble in line for trouble in troubles)]
        assert not said, "\n".join(said)

    def test_sigterm_completes_streams_longer_than_the_grace_period(
        self, cluster: Cluster, serving: Worker, subject: Subject
    ) -> None:
        load = self.busy(cluster, subject, serving)
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 25.0, subject) == 0
        self.assert_complete(load, subject)

    def test_handoff(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        worker, spare = start(2, "--drain", "handoff", "--grace-period", "0")
        load = self.busy(cluster, subject, worker)
        since = worker.signal(signal.SIGTERM)
        # Streams that nobody would continue finish first.
        assert self.assert_gone(worker, since, 2.0 if subject.migrates else 25.0, subject) == 0
        self.assert_complete(load, subject)
        spare.stop()

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    @pytest.mark.parametrize("mode", ["complete", "handoff"])
    def test_ten_rolling_restarts(self, cluster: Cluster, subject: Subject, start: Start, mode: str) -> None:
        workers = start(2, "--drain", mode)
        with self.steady(cluster, subject) as results:
            for _ in range(10):
                workers += start(1, "--drain", mode)
                cluster.wait_routed(workers[-1], subject.start_seconds)
                workers.pop(0).stop()
        lost = [result.error or "torn" for result in results if not result.ok]
        print(f"{len(results)} streams, {len(lost)} lost")
        assert not lost
        for worker in workers:
            worker.stop()

    def test_abort(self, cluster: Cluster, subject: Subject, start: Start) -> None:
        (worker,) = start(1, "--drain", "abort", "--grace-period", "0")
        load = self.busy(cluster, subject, worker)
        since = worker.signal(signal.SIGTERM)
        assert self.assert_gone(worker, since, 2.0, subject) == 0
        assert not any(result.ok for result in load.wait())

    def test_second_signal(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        load = self.busy(cluster, subject, serving)
        serving.signal(signal.SIGTERM)
        serving.wait_log("Grace period|Draining")
        time.sleep(DEBOUNCE)
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 2.5, subject) == 128 + signal.SIGTERM
        load.wait()

    def test_third_signal(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        load = self.busy(cluster, subject, serving)
        serving.signal(signal.SIGSTOP, serving.worker_pid)
        for _ in range(2):
            serving.signal(signal.SIGTERM)
            time.sleep(DEBOUNCE)
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 0.5, subject) == 128 + signal.SIGTERM
        load.wait()

    def test_sigterm_during_the_start(self, cluster: Cluster, subject: Subject) -> None:
        for stage in ("Starting worker", *subject.start_stages):
            worker = cluster.start_worker()
            worker.wait_log(stage, subject.start_seconds)
            since = worker.signal(signal.SIGTERM)
            code = worker.wait_gone(3.0 * subject.patience)
            print(f"{stage}: gone after {time.monotonic() - since:.3f} s")
            assert code == 0, worker.log


@contextlib.contextmanager
def no_more_processes(pids: Iterable[int]) -> Iterator[None]:
    """Make every fork of these processes fail, as if a limit on processes or threads were reached."""
    if os.geteuid() != 0:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NPROC, (0, 0))
        yield
        return
    # Root is exempt from RLIMIT_NPROC, but not from a cgroup's limit.
    parent = pids_cgroup()
    if parent is None:
        pytest.skip("needs a cgroup with a pids controller that this user can write to")
    group = parent / f"dynamo-worker-test-{os.urandom(4).hex()}"
    group.mkdir()
    try:
        (group / "pids.max").write_text("0")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (group / "pids.max").write_text("max")
        eventually(lambda: not (group / "cgroup.procs").read_text(), 10.0, "the cgroup to be empty")
        group.rmdir()


#: Time between two signals, in seconds. The worker counts signals less than 0.1 s apart once.
DEBOUNCE = 0.2
#: The worker's default ``--stall-timeout``, in seconds.
DEFAULT_STALL_TIMEOUT = 30.0
#: Rows that show the worker itself: they pass with every engine if they pass with one.
OF_THE_WORKER = frozenset(
    {
        *("test_supervisor_killed_and_guardian_killed", "test_supervisor_and_guardian_killed_at_once"),
        *("test_no_more_processes", "test_registration_lost", "test_abort", "test_second_signal", "test_third_signal"),
    }
)
#: Rows that differ from the others only in when a signal comes: they pass with every engine if they pass with a few.
OF_A_MOMENT = frozenset({"test_engine_process_killed_while_draining", "test_handoff"})
#: Number of clients that send streams one after the other during rolling restarts, and their pause in seconds.
STEADY_CLIENTS = 4
STEADY_PAUSE = 3.0
#: Duration of the saturating load, in seconds.
SATURATED_SECONDS = 180.0
#: Prompt of all streams; each appends its number.
PROMPT = "The quick brown fox jumps over the lazy dog."
