"""What is done to workers: one act for each row of the table that hits one.

An act commits the fault and returns when it did (monotonic), from which the time to the exit counts. An act of a row
that leaves the worker running returns once that serves again.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.processes import is_alive
from dynamo_worker.testing import eventually
from dynamo_worker.testing.fault_table import DEBOUNCE, no_more_processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos_run.fleet import Fleet, Member, Slot
    from chaos_run.plan import Fault

#: Seconds from a signal to the state of the worker that it brings about.
_STATE_SECONDS: Final = 15.0
#: Seconds under load between a limit and what follows.
_LIMITED_SECONDS: Final = 1.0
#: The drawn moment of a drain is within so many seconds.
_DRAIN_SECONDS: Final = 0.5
#: Usual duration of a start in seconds, without the engine's own.
_USUAL_START: Final = 2.0


class Scene:
    """One fault with the worker that it hits.

    :param stack: what has to be undone once the worker has ended.
    """

    def __init__(
        self, fleet: Fleet, slot: Slot, member: Member, fault: Fault, stack: contextlib.ExitStack, patience: float
    ) -> None:
        self.fleet = fleet
        self.slot = slot
        self.member = member
        self.worker = member.worker
        self.fault = fault
        self.stack = stack
        self._patience = patience
        #: Whether the worker had ended its requests before the fault: then it may end well.
        self.late = False

    @property
    def bound(self) -> float:
        """Seconds for a worker that goes on to serve again."""
        return self.fault.row.bound + self._patience

    def process(self) -> int:
        """Return the pid of the engine's process that is hit."""
        return self.worker.engine_process(self.slot.engine.processes[self.fault.process])

    def kill(self, number: signal.Signals, *pids: int) -> float:
        """Send a signal to processes, which may have ended; return when."""
        now = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self.worker.signal(number, pid)
        return now

    def pause(self, pid: int) -> None:
        """Stop a process for the drawn time."""
        self.kill(signal.SIGSTOP, pid)
        time.sleep(self.fault.seconds)
        self.kill(signal.SIGCONT, pid)
        self.serves()

    def go_wrong(self, hook: str, how: str) -> float:
        """Let a hook go wrong from now on; return when."""
        self.member.hooks.write_text(f"{hook}={how}\n", encoding="ascii")
        return time.monotonic()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Send a signal to the supervisor; return when."""
        return self.kill(number, self.worker.pid)

    def draining(self) -> None:
        """Ask for a stop while requests are in flight, and wait until the worker drains."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.worker.metric("dynamo_worker_in_flight") > 0, _STATE_SECONDS, "a request", 0.05)
        self.stop()
        self.worker.wait_log(" Draining ", _STATE_SECONDS)
        time.sleep(self.fault.moment * _DRAIN_SECONDS)
        self.late = "Cleaning up worker" in self.worker.log

    def starting(self) -> int:
        """Wait for the drawn moment of the start; return the pid of the worker's process."""
        found = self.worker.wait_log(r"Worker started pid=(\d+)", _STATE_SECONDS)
        time.sleep(self.fault.moment * _USUAL_START)
        return int(found[1])

    def serves(self) -> None:
        """Wait until the worker is ready; it may have ended, which the fleet's watcher reports.

        :raises AssertionError: it is neither in time.
        """
        eventually(
            lambda: self.member.ended.is_set() or self.worker.status("/health")[0] == 200,
            self.bound,
            f"{self.member.name} to be ready",
            0.1,
        )


ACTS: Final[dict[str, Callable[[Scene], float]]] = {}


def _act(name: str) -> Callable[[Callable[[Scene], float]], Callable[[Scene], float]]:
    def register(function: Callable[[Scene], float]) -> Callable[[Scene], float]:
        ACTS[name] = function
        return function

    return register


def _signal(scene: Scene) -> signal.Signals:
    return signal.Signals[scene.fault.signal]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- Processes that die or stand still


@_act("worker killed")
def _worker_killed(scene: Scene) -> float:
    return scene.kill(signal.SIGKILL, scene.worker.worker_pid)


@_act("worker crashes")
def _worker_crashes(scene: Scene) -> float:
    return scene.kill(_signal(scene), scene.worker.worker_pid)


@_act("worker stands still")
def _worker_stands_still(scene: Scene) -> float:
    return scene.kill(signal.SIGSTOP, scene.worker.worker_pid)


@_act("worker pauses")
def _worker_pauses(scene: Scene) -> float:
    since = time.monotonic()
    scene.pause(scene.worker.worker_pid)
    return since


@_act("supervisor killed")
def _supervisor_killed(scene: Scene) -> float:
    return scene.kill(signal.SIGKILL, scene.worker.pid)


@_act("supervisor pauses")
def _supervisor_pauses(scene: Scene) -> float:
    since = time.monotonic()
    scene.pause(scene.worker.pid)
    return since


@_act("guardian killed")
def _guardian_killed(scene: Scene) -> float:
    return scene.kill(signal.SIGKILL, scene.worker.guardian_pid)


@_act("guardian stands still at a stop")
def _guardian_stands_still(scene: Scene) -> float:
    scene.kill(signal.SIGSTOP, scene.worker.guardian_pid)
    return scene.stop()


@_act("supervisor and guardian killed")
def _owners_killed(scene: Scene) -> float:
    owners = (scene.worker.guardian_pid, scene.worker.pid)
    scene.kill(signal.SIGSTOP, *owners)  # neither must have time to act
    since = scene.kill(signal.SIGKILL, *owners)
    # On a busy machine even a killed process takes time to end, and the next start must find no living owner.
    eventually(lambda: not any(map(is_alive, owners)), scene.bound, "the end of supervisor and guardian", 0.01)
    return since


@_act("engine process killed")
def _engine_killed(scene: Scene) -> float:
    return scene.kill(signal.SIGKILL, scene.process())


@_act("engine process stands still")
def _engine_stands_still(scene: Scene) -> float:
    return scene.kill(signal.SIGSTOP, scene.process())


# --- What an engine's author gets wrong


@_act("health check fails")
def _health_fails(scene: Scene) -> float:
    return scene.go_wrong("check_health", "dead")


@_act("health check hangs")
def _health_hangs(scene: Scene) -> float:
    return scene.go_wrong("check_health", "hang")


@_act("health check is broken")
def _health_broken(scene: Scene) -> float:
    since = scene.go_wrong("check_health", "raise")
    time.sleep(scene.fault.seconds)
    scene.member.hooks.unlink(missing_ok=True)
    scene.serves()
    return since


@_act("event loop blocked")
def _loop_blocked(scene: Scene) -> float:
    return scene.go_wrong("check_health", "block")


@_act("event loop blocked for a moment")
def _loop_blocked_shortly(scene: Scene) -> float:
    since = scene.go_wrong("check_health", f"block:{scene.fault.seconds:.2f}")
    time.sleep(scene.fault.seconds + 1.0)
    scene.member.hooks.unlink(missing_ok=True)
    scene.serves()
    return since


@_act("interpreter lock held")
def _interpreter_held(scene: Scene) -> float:
    return scene.go_wrong("check_health", "lock")


def _hook(hook: str, how: str) -> Callable[[Scene], float]:
    def act(scene: Scene) -> float:
        scene.go_wrong(hook, how)
        return scene.stop()

    return act


for _name, _hook_name, _how in (
    ("drain hook raises", "drain", "raise"),
    ("drain hook hangs", "drain", "hang"),
    ("cleanup hook raises", "cleanup", "raise"),
    ("cleanup hook hangs", "cleanup", "hang"),
    ("cleanup hook blocks the loop", "cleanup", "block"),
):
    ACTS[_name] = _hook(_hook_name, _how)


# --- Stops


@_act("stop")
def _stop(scene: Scene) -> float:
    return scene.stop(_signal(scene))


@_act("stop of the worker's own process")
def _stop_of_the_worker(scene: Scene) -> float:
    return scene.kill(_signal(scene), scene.worker.worker_pid)


@_act("guardian gets a signal")
def _guardian_signalled(scene: Scene) -> float:
    since = scene.kill(_signal(scene), scene.worker.guardian_pid)
    time.sleep(_LIMITED_SECONDS)
    scene.serves()
    return since


@_act("SIGQUIT")
def _quit(scene: Scene) -> float:
    return scene.stop(signal.SIGQUIT)


@_act("second signal")
def _second_signal(scene: Scene) -> float:
    scene.stop()
    time.sleep(max(DEBOUNCE, scene.fault.moment))
    scene.late = "Cleaning up worker" in scene.worker.log
    return scene.stop()


@_act("third signal")
def _third_signal(scene: Scene) -> float:
    scene.kill(signal.SIGSTOP, scene.worker.worker_pid)
    for _ in range(2):
        scene.stop()
        time.sleep(DEBOUNCE)
    return scene.stop()


@_act("worker killed while draining")
def _killed_while_draining(scene: Scene) -> float:
    process = scene.worker.worker_pid
    scene.draining()
    return scene.kill(signal.SIGKILL, process)


@_act("supervisor killed while draining")
def _supervisor_killed_while_draining(scene: Scene) -> float:
    scene.draining()
    return scene.kill(signal.SIGKILL, scene.worker.pid)


@_act("engine process killed while draining")
def _engine_killed_while_draining(scene: Scene) -> float:
    process = scene.process()
    scene.draining()
    return scene.kill(signal.SIGKILL, process)


# --- Starts


@_act("stopped during the start")
def _stopped_during_the_start(scene: Scene) -> float:
    scene.starting()
    return scene.stop()


@_act("worker killed during the start")
def _killed_during_the_start(scene: Scene) -> float:
    return scene.kill(signal.SIGKILL, scene.starting())


@_act("supervisor killed during the start")
def _supervisor_killed_during_the_start(scene: Scene) -> float:
    scene.starting()
    return scene.kill(signal.SIGKILL, scene.worker.pid)


@_act("guardian killed during the start")
def _guardian_killed_during_the_start(scene: Scene) -> float:
    return scene.kill(signal.SIGKILL, _parent(scene.starting()))


# --- Resources


def _limited(limit: Callable[[Scene], None], then: Callable[[Scene], float]) -> Callable[[Scene], float]:
    def act(scene: Scene) -> float:
        limit(scene)
        time.sleep(_LIMITED_SECONDS)
        return then(scene)

    return act


def _fill_disk(scene: Scene) -> None:
    scene.slot.fill()
    scene.stack.callback(scene.slot.empty)


def _no_processes(scene: Scene) -> None:
    scene.stack.enter_context(no_more_processes([scene.worker.pid, *scene.worker.children()]))


ACTS["disk full, then a stop"] = _limited(_fill_disk, Scene.stop)
ACTS["disk full, then killed"] = _limited(_fill_disk, _worker_killed)
ACTS["no more processes, then a stop"] = _limited(_no_processes, Scene.stop)
ACTS["no more processes, then killed"] = _limited(_no_processes, _worker_killed)


# --- Operators and discovery


@_act("drained and resumed")
def _drained_and_resumed(scene: Scene) -> float:
    since = time.monotonic()
    mode = scene.fault.mode if scene.slot.engine.moves else "complete"  # refused: nobody would continue the requests
    answer = scene.worker.operate("control/drain", {"mode": mode})
    assert answer.get("status") == "success", f"{scene.member.name} refuses to drain: {answer}"

    def drained() -> bool:
        return scene.member.ended.is_set() or scene.worker.operate("control/drain_status").get("phase") == "drained"

    eventually(drained, scene.bound, f"{scene.member.name} to be drained", 0.2)
    time.sleep(scene.fault.seconds)

    def resumed() -> bool:
        if scene.member.ended.is_set():
            return True
        scene.worker.operate("control/resume")  # fails while etcd is away, and may be asked again
        return scene.worker.status("/health")[0] == 200

    eventually(resumed, scene.bound, f"{scene.member.name} to be resumed", 0.5)
    return since


@_act("registration lost")
def _registration_lost(scene: Scene) -> float:
    fleet = scene.fleet
    assert fleet.etcd is not None
    entries: list[str] = []

    def deleted() -> bool:
        with contextlib.suppress(OSError):
            entries.extend(fleet.entries_of(scene.member))
            for key in entries:
                fleet.etcd.delete(key)  # type: ignore[union-attr]
        return bool(entries)

    eventually(deleted, scene.bound, f"the entries of {scene.member.name}", 0.5)
    since = time.monotonic()

    def back() -> bool:
        with contextlib.suppress(OSError):
            return scene.member.ended.is_set() or set(entries) <= set(fleet.entries_of(scene.member))
        return False

    eventually(back, scene.bound, f"{entries} to be back", 0.2)
    scene.serves()
    return since
