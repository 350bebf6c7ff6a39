"""The fault table: everything that can go wrong with a worker, injected with signals into real process trees.

One table for every engine. A plugin's tests derive from :class:`FaultTable` and say with :class:`Subject` how their
engine is started and what its processes are called::

    class TestFaults(FaultTable):
        @pytest.fixture
        def subject(self) -> Subject:
            return Subject(args=["--engine", "echo", "--process-tree"], processes={"core": r"echo_process core"})

Every test ends with the check for leftovers. The bounds are loose on purpose (``Subject.patience``): machines that run
tests are busy. The real figures come from ``benchmarks/lifecycle.py``.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.testing.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_worker.testing.client import Load
    from dynamo_worker.testing.cluster import Cluster, Worker


@dataclass(frozen=True)
class Subject:
    """An engine as the fault table sees it.

    :param args: arguments of ``dynamo-worker``, ``--engine NAME`` first.
    :param processes: the engine's processes whose death or standstill is fatal: a name for the test, and a pattern
        that matches exactly one command line below the worker.
    :param model: name clients ask for.
    :param stream_tokens: tokens of a stream that lasts several seconds, longer than the grace period of the tests.
    :param streams: streams at once.
    :param expected: returns the exact text of an answer for a prompt and a number of tokens, for engines whose output
        is known; None checks the end of the stream only.
    :param start_seconds: most time until the worker serves.
    :param stall_timeout: seconds in which a standstill must be noticed.
    :param patience: factor on all time limits.
    """

    args: Sequence[str]
    processes: Mapping[str, str] = field(default_factory=dict)
    model: str = "echo"
    stream_tokens: int = 300
    streams: int = 8
    expected: Callable[[str, int], str] | None = None
    start_seconds: float = 30.0
    stall_timeout: float = 5.0
    patience: float = 3.0


class FaultTable:
    """The tests. Every one runs against the subject's real engine, runtime and frontend."""

    #: Shorter than the default, so that the tests are; streams last longer than it.
    GRACE = ("--grace-period", "1")

    @pytest.fixture
    def subject(self) -> Subject:
        """Return what is tested; every deriving class has its own."""
        raise NotImplementedError("a fault table needs a subject")

    @pytest.fixture
    def engine_args(self, subject: Subject) -> list[str]:
        """Start every worker of the cluster with the subject's arguments."""
        return [*subject.args, *self.GRACE]

    @pytest.fixture
    def serving(self, cluster: Cluster, subject: Subject) -> Worker:
        """Return a worker that serves behind a frontend."""
        cluster.model = subject.model
        cluster.start_frontend()
        worker = cluster.start_worker("--stall-timeout", str(subject.stall_timeout))
        worker.wait_ready(subject.start_seconds)
        cluster.wait_model()
        return worker

    def second(self, cluster: Cluster, subject: Subject) -> Worker:
        """Start another worker, to which requests can move: before the load, which a slow start would outlast."""
        worker = cluster.start_worker()
        worker.wait_ready(subject.start_seconds)
        cluster.wait_routed(worker)
        return worker

    def busy(self, cluster: Cluster, subject: Subject) -> Load:
        """Return streams that are in flight."""
        return cluster.load(subject.streams, subject.stream_tokens, prompt=PROMPT)

    def assert_complete(self, load: Load, subject: Subject) -> None:
        """Check that no stream lost anything."""
        results = load.wait()
        assert all(result.ok for result in results), load.summary()
        if subject.expected is not None:
            for number, result in enumerate(results):
                assert result.text == subject.expected(f"{PROMPT}{number}", subject.stream_tokens)

    def assert_gone(self, worker: Worker, since: float, bound: float, subject: Subject) -> int:
        """Wait until the worker is out of discovery and has ended; return the exit code."""
        eventually(lambda: not worker.registered, bound * subject.patience, "out of discovery")
        unregistered = time.monotonic() - since
        code = worker.wait_gone(bound * subject.patience)
        print(f"out of discovery after {unregistered:.3f} s, gone after {time.monotonic() - since:.3f} s, exit {code}")
        return code

    # ------------------------------------------------------------------------------------------------ the engine

    def test_engine_process_killed_idle(self, serving: Worker, subject: Subject) -> None:
        for name, pattern in subject.processes.items():
            worker = serving
            since = worker.signal(signal.SIGKILL, worker.child(pattern))
            assert self.assert_gone(worker, since, 1.0, subject) == 1, name
            assert "Fatal error kind=EngineDeadError" in worker.log
            break

    def test_every_engine_process_is_watched(self, cluster: Cluster, subject: Subject) -> None:
        for pattern in list(subject.processes.values())[1:]:
            worker = cluster.start_worker().wait_ready(subject.start_seconds)
            since = worker.signal(signal.SIGKILL, worker.child(pattern))
            assert self.assert_gone(worker, since, 1.0, subject) == 1, pattern

    def test_engine_process_killed_busy(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        if not subject.processes:
            pytest.skip("this engine has no process of its own")
        self.second(cluster, subject)
        load = self.busy(cluster, subject)
        since = serving.signal(signal.SIGKILL, serving.child(next(iter(subject.processes.values()))))
        assert self.assert_gone(serving, since, 1.0, subject) == 1
        self.assert_complete(load, subject)

    def test_engine_process_stopped_busy(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        if not subject.processes:
            pytest.skip("this engine has no process of its own")
        self.second(cluster, subject)
        load = self.busy(cluster, subject)
        since = serving.signal(signal.SIGSTOP, serving.child(next(iter(subject.processes.values()))))
        assert self.assert_gone(serving, since, subject.stall_timeout + 1.0, subject) == 1
        assert "Fatal error kind=EngineStalledError" in serving.log
        self.assert_complete(load, subject)

    def test_engine_process_stopped_idle(self, serving: Worker, subject: Subject) -> None:
        if not subject.processes:
            pytest.skip("this engine has no process of its own")
        since = serving.signal(signal.SIGSTOP, serving.child(list(subject.processes.values())[-1]))
        assert self.assert_gone(serving, since, subject.stall_timeout + 1.0, subject) == 1
        assert "Fatal error kind=EngineStalledError" in serving.log

    # ------------------------------------------------------------------------------------------------ the worker

    def test_worker_killed_busy(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        self.second(cluster, subject)
        load = self.busy(cluster, subject)
        since = serving.signal(signal.SIGKILL, serving.worker_pid)
        assert self.assert_gone(serving, since, 0.5, subject) == 128 + signal.SIGKILL
        self.assert_complete(load, subject)

    def test_supervisor_killed(self, serving: Worker, subject: Subject) -> None:
        since = serving.signal(signal.SIGKILL)
        assert self.assert_gone(serving, since, 1.0, subject) == 128 + signal.SIGKILL

    def test_guardian_killed(self, serving: Worker, subject: Subject) -> None:
        since = serving.signal(signal.SIGKILL, serving.guardian_pid)
        assert self.assert_gone(serving, since, 1.0, subject) != 0

    # --------------------------------------------------------------------------------------------------- stopping

    def test_sigterm_idle(self, serving: Worker, subject: Subject) -> None:
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 5.0, subject) == 0
        for message in ("Received shutdown signal", "DistributedRuntime shutdown complete", "Cleaning up worker"):
            assert message in serving.log
        for trouble in (" ERROR ", " WARNING ", "Traceback"):
            assert trouble not in serving.log

    def test_sigterm_completes_streams_longer_than_the_grace_period(
        self, cluster: Cluster, serving: Worker, subject: Subject
    ) -> None:
        load = self.busy(cluster, subject)
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 25.0, subject) == 0
        self.assert_complete(load, subject)

    def test_handoff(self, cluster: Cluster, subject: Subject) -> None:
        cluster.model = subject.model
        cluster.start_frontend()
        worker = cluster.start_worker("--drain", "handoff", "--grace-period", "0").wait_ready(subject.start_seconds)
        cluster.wait_model()
        self.second(cluster, subject)
        load = self.busy(cluster, subject)
        since = worker.signal(signal.SIGTERM)
        assert self.assert_gone(worker, since, 3.0, subject) == 0
        self.assert_complete(load, subject)

    def test_abort(self, cluster: Cluster, subject: Subject) -> None:
        cluster.model = subject.model
        cluster.start_frontend()
        worker = cluster.start_worker("--drain", "abort", "--grace-period", "0").wait_ready(subject.start_seconds)
        cluster.wait_model()
        load = self.busy(cluster, subject)
        since = worker.signal(signal.SIGTERM)
        assert self.assert_gone(worker, since, 3.0, subject) == 0
        assert not any(result.ok for result in load.wait())

    def test_second_signal(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        load = self.busy(cluster, subject)
        serving.signal(signal.SIGTERM)
        serving.wait_log("Grace period|Draining")
        time.sleep(DEBOUNCE)
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 2.5, subject) == 128 + signal.SIGTERM
        load.wait()

    def test_third_signal(self, cluster: Cluster, serving: Worker, subject: Subject) -> None:
        load = self.busy(cluster, subject)
        serving.signal(signal.SIGSTOP, serving.worker_pid)
        for _ in range(2):
            serving.signal(signal.SIGTERM)
            time.sleep(DEBOUNCE)
        since = serving.signal(signal.SIGTERM)
        assert self.assert_gone(serving, since, 0.5, subject) == 128 + signal.SIGTERM
        load.wait()

    def test_sigterm_during_the_start(self, cluster: Cluster, subject: Subject) -> None:
        worker = cluster.start_worker()
        worker.wait_log("Starting worker")
        since = worker.signal(signal.SIGTERM)
        code = worker.wait_gone(3.0 * subject.patience)
        print(f"gone after {time.monotonic() - since:.3f} s")
        assert code == 0


#: Signals closer together than 0.1 s count once: a terminal and a script often send two.
DEBOUNCE = 0.2
#: What the streams of the table ask for; a number is added for each.
PROMPT = "The quick brown fox jumps over the lazy dog."
