"""One stop or one fault, done to one worker, and everything that can be seen of it from outside."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.discovery import VanishedModel
from common.load import Load, LoadError, LoadResult, LoadSpecification
from common.processes import TreeWatch, command_line, pin_and_signal
from common.subjects import OURS, PEER, RealEngine
from common.workbench import (
    Workbench,
    WorkbenchError,
    Worker,
    files_below,
    remove,
    shared_memory_of,
)

#: Tokens per second of a stream of the echo engine: streams of 6 s, longer than any grace period used here.
RATE = 40.0
_names = itertools.count(1)
#: Does something to a worker; returns since when its end counts, on CLOCK_MONOTONIC.
Action = Callable[[Worker], float]


@dataclass(frozen=True)
class Scenario:
    """What is done, to whom, and what dynamo-worker must reach.

    :param name: name on the command line and in the table.
    :param action: what is done.
    :param kinds: which workers it is done to.
    :param busy: whether streams are in flight on the worker.
    :param spare: whether a second worker serves the same model, so that streams can move.
    :param ready: whether the worker is registered before the action; False: it is still starting.
    :param flags: further flags of dynamo-worker.
    :param additions: further environment variables of dynamo-worker.
    :param process_tree: whether the engine runs in processes of its own.
    :param after_grace: whether times count from the end of the grace period.
    :param bound: how long to wait for the end in seconds.
    :param leave: bar: seconds to leave discovery.
    :param gone: bar: seconds until every process is gone.
    :param gone_after_leaving: bar: the same, from when it has left discovery.
    :param code: bar: the exit code.
    :param completed: bar: whether every stream must complete.
    :param loading: for a worker that is still starting: what its log says when the action is due; None: after 1.5 s.
    """

    name: str
    action: Action
    kinds: tuple[str, ...] = (PEER, OURS)
    busy: bool = False
    spare: bool = False
    ready: bool = True
    flags: tuple[str, ...] = ()
    additions: Mapping[str, str] = field(default_factory=dict)
    process_tree: bool = False
    after_grace: bool = False
    bound: float = 20.0
    leave: float | None = None
    gone: float | None = None
    gone_after_leaving: float | None = None
    code: int | None = None
    completed: bool = False
    loading: str | None = None


@dataclass
class ScenarioResult:
    """What was seen of one scenario; times in seconds, None when it did not happen in time.

    :param leave: from the action until the worker is out of the discovery directory.
    :param frontend: from the action until the frontend no longer offers the model (where no other worker serves it).
    :param exited: from the action (or the end of the grace period) until the started program has ended.
    :param gone: the same until every process of its tree is gone.
    :param after_last_answer: from the end of the last stream until every process is gone; None where it goes first.
    """

    scenario: str
    kind: str
    leave: float | None = None
    frontend: float | None = None
    exited: float | None = None
    gone: float | None = None
    after_last_answer: float | None = None
    gone_after_leaving: float | None = None
    code: int | None = None
    streams: int = 0
    completed: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    processes_left: list[str] = field(default_factory=list)
    shared_memory_left: list[str] = field(default_factory=list)
    files_left: list[str] = field(default_factory=list)
    entries_left: list[str] = field(default_factory=list)

    def missed(self, scenario: Scenario) -> list[str]:
        """Return the names of the bars that were missed."""
        missed = []
        for name, value, most in (
            ("leave", self.leave, scenario.leave),
            ("gone", self.gone, scenario.gone),
            ("gone after leaving", self.gone_after_leaving, scenario.gone_after_leaving),
        ):
            if most is not None and (value is None or value > most):
                missed.append(name)
        if scenario.code is not None and self.code != scenario.code:
            missed.append("code")
        if scenario.completed and self.completed != self.streams:
            missed.append("streams")
        if self.processes_left or self.shared_memory_left or self.files_left or self.entries_left:
            missed.append("leftovers")
        return missed


def send(number: int, to: Callable[[Worker], int]) -> Action:
    """Return the action that sends a signal to one process of a worker."""

    def action(worker: Worker) -> float:
        pid = to(worker)
        at = time.monotonic()
        pin_and_signal(pid, number)
        return at

    return action


def to_program(worker: Worker) -> int:
    """The process that was started: the supervisor of a dynamo-worker."""
    return worker.program.pid


def to_worker(worker: Worker) -> int:
    """The process that serves requests."""
    return worker.serving_pid()


def to_guardian(worker: Worker) -> int:
    """The process between supervisor and worker."""
    return worker.supervisor_pids()[1]


def to_engine(worker: Worker) -> int:
    """The engine's first process."""
    return worker.engine_pids()[0]


def to_last_engine(worker: Worker) -> int:
    """The engine's last process: a rank below its core, where the engine has one."""
    return worker.engine_pids()[-1]


def to_named(title: str) -> Callable[[Worker], int]:
    """Return what finds the engine's process whose command line begins with what the pattern `title` matches."""

    def find(worker: Worker) -> int:
        for pid in worker.engine_pids():
            if re.match(title, " ".join(command_line(pid))):
                return pid
        raise WorkbenchError(f"{worker.program.name} has no process {title}")

    return find


def repeated(number: int, count: int, pause: float, stopped: bool = False) -> Action:
    """Return the action that sends a signal to a worker's program several times; its time is that of the last one.

    :param stopped: whether the process that serves is stopped (SIGSTOP) before, so that it cannot act on a signal.
    """

    def action(worker: Worker) -> float:
        if stopped:
            pin_and_signal(worker.serving_pid(), signal.SIGSTOP)
        at = worker.program.signal(number)
        for _ in range(count - 1):
            time.sleep(pause)
            at = worker.program.signal(number)
        return at

    return action


def of_echo() -> list[Scenario]:
    """Return what is done to workers with the echo engine, in the order of the report."""
    terminate = send(signal.SIGTERM, to_program)
    own = (OURS,)
    stall = ("--stall-timeout", "5")
    tree: dict[str, Any] = {"process_tree": True}
    moved: dict[str, Any] = {"busy": True, "spare": True, "completed": True}
    fatal: dict[str, Any] = {"leave": 0.05, "gone": 0.5, "code": 1}
    return [
        Scenario("SIGTERM, idle", terminate, after_grace=True, gone=0.3, code=0),
        Scenario("SIGTERM, idle, process tree", terminate, after_grace=True, code=0, **tree),
        Scenario("SIGTERM, busy, complete, one worker", terminate, busy=True, code=0, completed=True),
        Scenario("SIGTERM, busy, complete, spare worker", terminate, code=0, **moved),
        Scenario(
            "SIGTERM, busy, handoff, spare worker",
            terminate,
            own,
            flags=("--drain", "handoff", "--grace-period", "0"),
            gone=1.0,
            code=0,
            **moved,
        ),
        Scenario(
            "SIGTERM, busy, abort",
            terminate,
            own,
            busy=True,
            flags=("--drain", "abort", "--grace-period", "0"),
            gone=1.0,
            code=0,
        ),
        Scenario("second SIGTERM, busy", repeated(signal.SIGTERM, 2, 0.5), busy=True, gone=2.5),
        Scenario("second SIGTERM, worker stopped", repeated(signal.SIGTERM, 2, 0.5, stopped=True), gone=2.5),
        Scenario("third SIGTERM, worker stopped", repeated(signal.SIGTERM, 3, 0.5, stopped=True), gone=0.5),
        Scenario("SIGTERM, start blocked", terminate, own, ready=False, flags=("--start-seconds", "600"), gone=3.0),
        Scenario("worker killed, idle", send(signal.SIGKILL, to_worker), leave=0.5, gone=0.5, code=137, **tree),
        Scenario(
            "worker killed, busy, spare worker",
            send(signal.SIGKILL, to_worker),
            leave=0.5,
            gone=0.5,
            code=137,
            **moved,
            **tree,
        ),
        Scenario("supervisor killed, busy", send(signal.SIGKILL, to_program), own, gone=1.0, **moved, **tree),
        Scenario("guardian killed, busy", send(signal.SIGKILL, to_guardian), own, gone=1.0, **moved, **tree),
        Scenario("engine process killed, idle", send(signal.SIGKILL, to_engine), **fatal, **tree),
        Scenario("engine process killed, busy", send(signal.SIGKILL, to_engine), **fatal, **moved, **tree),
        Scenario("engine's rank killed, busy", send(signal.SIGKILL, to_last_engine), own, **fatal, **moved, **tree),
        Scenario(
            "engine process stopped, idle, bound 5 s",
            send(signal.SIGSTOP, to_engine),
            flags=stall,
            gone=6.5,
            code=1,
            **tree,
        ),
        Scenario(
            "engine process stopped, busy, bound 5 s",
            send(signal.SIGSTOP, to_engine),
            flags=stall,
            gone=6.5,
            code=1,
            **moved,
            **tree,
        ),
        Scenario(
            "engine's rank stopped, busy, bound 5 s",
            send(signal.SIGSTOP, to_last_engine),
            own,
            flags=stall,
            gone=6.5,
            code=1,
            **moved,
            **tree,
        ),
        Scenario(
            "worker stopped, busy, bound 5 s",
            send(signal.SIGSTOP, to_worker),
            own,
            additions={"DYN_WORKER_HEARTBEAT_TIMEOUT": "5"},
            gone=7.5,
            code=1,
            **moved,
            **tree,
        ),
    ]


def of_real(engine: RealEngine, bounds: Sequence[float]) -> list[Scenario]:
    """Return what is done to workers with a real engine, in the order of the report.

    :param bounds: seconds within which a standstill must be noticed; one pair of rows for each.
    """
    terminate = send(signal.SIGTERM, to_program)
    own = (OURS,)
    moved: dict[str, Any] = {"busy": True, "spare": True, "completed": True}
    fatal: dict[str, Any] = {"leave": 0.05, "gone": 1.0, "code": 1}
    found = [
        Scenario("SIGTERM while loading", terminate, ready=False, loading=engine.loading, gone=3.0, bound=90.0),
        Scenario("SIGTERM, idle", terminate, after_grace=True, code=0),
        Scenario("SIGTERM, busy, complete, one worker", terminate, busy=True, code=0, completed=True, bound=60.0),
        Scenario(
            "SIGTERM, busy, handoff, spare worker",
            terminate,
            own,
            flags=("--drain", "handoff", "--grace-period", "0"),
            gone_after_leaving=2.0,
            code=0,
            **moved,
        ),
        Scenario("worker killed, busy, spare worker", send(signal.SIGKILL, to_worker), leave=0.5, gone=1.0, **moved),
        Scenario("supervisor killed, busy, spare worker", send(signal.SIGKILL, to_program), own, gone=1.0, **moved),
    ]
    both = [(name, title, (PEER, OURS)) for name, title in engine.processes.items()]
    for name, title, kinds in [*both, *((name, title, (PEER,)) for name, title in engine.peer_processes.items())]:
        kill, stop = send(signal.SIGKILL, to_named(title)), send(signal.SIGSTOP, to_named(title))
        found.append(Scenario(f"{name} killed, idle", kill, kinds, bound=90.0, **fatal))
        found.append(Scenario(f"{name} killed, busy, one worker", kill, kinds, busy=True, bound=90.0, **fatal))
        found.append(Scenario(f"{name} killed, busy, spare worker", kill, kinds, bound=90.0, **fatal, **moved))
        for bound in bounds:
            stalls: dict[str, Any] = {
                "flags": ("--stall-timeout", f"{bound:g}"),
                "bound": bound + 15.0,
                "gone": bound + 1.0,
                "code": 1,
            }
            found.append(Scenario(f"{name} stopped, idle, bound {bound:g} s", stop, kinds, **stalls))
            found.append(Scenario(f"{name} stopped, busy, bound {bound:g} s", stop, kinds, **stalls, **moved))
    return found


def measure(bench: Workbench, scenario: Scenario, kind: str, grace: float, streams: int) -> ScenarioResult:
    """Start the workers of a scenario, do it, and see what comes of it.

    :param bench: where the workers are started; nothing of them is left there afterwards.
    :param kind: the kind of worker it is done to.
    :param grace: the grace period in seconds.
    :param streams: number of streams when the worker is busy.
    :raises WorkbenchError: the scenario could not be set up.
    """
    outcome = ScenarioResult(scenario.name, kind)
    # A name of its own for each measurement, so that nothing of the last one is taken for it.
    model = f"{kind}{next(_names)}"
    flags = ["--process-tree"] if scenario.process_tree else []
    additions = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": f"{grace:g}"}
    if kind == OURS:
        flags += scenario.flags
        additions.update(scenario.additions)
    workers: list[Worker] = []
    load: Load | None = None
    watch: TreeWatch | None = None
    try:
        if scenario.ready:
            worker = bench.start(kind, model, flags, additions)
        else:
            program, temporary = bench.launch(kind, model, flags, additions)
            worker = Worker(kind, program, model, "", temporary)
            _wait_loading(worker, scenario.loading, bench.subject.start_seconds)
        workers.append(worker)
        spare_first = scenario.spare and bench.subject.spare_first
        if spare_first:
            workers.append(bench.start(kind, model, flags, additions))
            time.sleep(0.5)
        if scenario.busy:
            load = Load(_load(bench, model, kind, streams))
            load.wait_streaming(20.0)
        if scenario.spare and not spare_first:
            workers.append(bench.start(kind, model, flags, additions))
            time.sleep(0.3)
        tree = worker.program.tree()
        segments = shared_memory_of(tree)
        watch = TreeWatch(tree)
        vanished = None
        if scenario.ready and not scenario.spare:
            vanished = VanishedModel(bench.port, model, scenario.bound)
            time.sleep(0.05)
        begun = time.monotonic()
        at = scenario.action(worker)
        over = grace if scenario.after_grace else 0.0
        left = watch.wait(scenario.bound + over)
        outcome.gone = _after(at + over, watch.gone_at)
        worker.program.wait(0.0 if left else 2.0)
        outcome.exited = _after(at + over, worker.program.ended_at)
        outcome.code = worker.program.code
        if scenario.ready:
            remaining = max(0.0, begun + scenario.bound - time.monotonic())
            left_at = bench.discovery.wait_vanished(worker.instance, remaining)
            outcome.leave = _after(begun, left_at)
            if left_at is not None:
                outcome.gone_after_leaving = _after(left_at, watch.gone_at)
        if vanished is not None:
            outcome.frontend = _after(begun, vanished.join())
        if load is not None:
            result = _end_of(load)
            outcome.streams, outcome.completed, outcome.losses = streams, result.completed, result.losses()
            if result.records:
                last = max(record.ended for record in result.records)
                if watch.gone_at is not None and watch.gone_at >= last:
                    outcome.after_last_answer = watch.gone_at - last
        # What a program leaves behind counts once it is gone itself; one that lives on has not left anything.
        if not worker.program.running:
            outcome.processes_left = [" ".join(command_line(pid)) for pid in sorted(set(left) | set(bench.orphans()))]
            outcome.shared_memory_left = sorted(path for path in segments if Path(path).exists())
            outcome.files_left = files_below(worker.temporary)
            if worker.instance:
                entries = bench.discovery.entries(worker.instance)
                outcome.entries_left = [str(Path(*path.parts[-2:])) for path in entries]
        remove(segments)
        return outcome
    finally:
        if load is not None:
            load.close()
        if watch is not None:
            watch.kill()
            watch.close()
        bench.end(workers)


def _load(bench: Workbench, model: str, kind: str, streams: int) -> LoadSpecification:
    tokens = bench.subject.stream_tokens
    expected = bench.subject.expected(kind, tokens)
    return LoadSpecification(
        bench.ports,
        model,
        streams,
        streams,
        tokens,
        expected=expected,
        count_by_usage=expected is None,
        timeout=90.0,
        time_limit=100.0,
    )


def _wait_loading(worker: Worker, mark: str | None, timeout: float) -> None:
    """Wait until a worker is in the middle of its start."""
    if mark is None:
        time.sleep(1.5)
        return
    deadline = time.monotonic() + timeout
    while mark not in worker.program.log_tail():
        if time.monotonic() > deadline or not worker.program.running:
            raise WorkbenchError(f"{worker.program.name} never says {mark!r}:\n{worker.program.log_tail()}")
        time.sleep(0.02)


def _end_of(load: Load) -> LoadResult:
    with contextlib.suppress(LoadError):
        return load.result(60.0)
    return LoadResult(0.0, 0.0)


def _after(at: float, then: float | None) -> float | None:
    return None if then is None else then - at


def chosen(everything: Sequence[Scenario], names: Sequence[str]) -> list[Scenario]:
    """Return the scenarios whose name contains one of the given texts; all when none is given.

    :raises WorkbenchError: nothing matches one of them.
    """
    found = [scenario for scenario in everything if not names or any(name in scenario.name for name in names)]
    for name in names:
        if not any(name in scenario.name for scenario in everything):
            raise WorkbenchError(f"no scenario's name contains {name!r}; --list names them")
    return found
