"""The second process: the worker's parent. It cleans up after the worker, and outlives a supervisor that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from dynamo_worker.supervisor import discovery, frontend, ledger, linux, process_tree, shared_memory
from dynamo_worker.supervisor.channel import Channel
from dynamo_worker.supervisor.cleanup import Cleanup, Withdrawal
from dynamo_worker.supervisor.loop import Loop
from dynamo_worker.supervisor.protocol import DEATH_LIMIT
from dynamo_worker.supervisor.report import Log
from dynamo_worker.supervisor.spawn import SpawnError, spawn

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from dynamo_worker.supervisor.linux import Process, Stat
    from dynamo_worker.supervisor.recorder import Recorder
    from dynamo_worker.supervisor.relay import Relay
    from dynamo_worker.supervisor.run_directory import RunDirectory

_NAME = "dw-guardian"

#: Seconds to pause after the machine had no resources for recording.
_SHORTAGE_PAUSE = 1.0

#: Signals that may be sent to the whole group or container, but are not meant for the guardian.
_IGNORED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGPIPE,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


class Guardian:
    """Runs in the forked process until the tree is gone.

    :param supervisor: our end of the channel to the supervisor; its closing means that the supervisor died.
    :param control: the worker's end of its control socket.
    """

    def __init__(
        self,
        supervisor: socket.socket,
        control: socket.socket,
        run_directory: RunDirectory,
        command: Sequence[str],
        environment: Mapping[str, str],
        relay: Relay,
        log: Log,
        recorder: Recorder,
    ) -> None:
        self._recorder = recorder
        self._channel = Channel(supervisor)
        self._control = control
        self._run_directory = run_directory
        self._command = command
        self._environment = environment
        self._relay = relay
        self._log = log
        self._loop = Loop((), self._on_signal, self._on_child)
        self._loop.outputs.add(log.output)
        self._worker: Process | None = None
        self._exit_code: int | None = None
        self._withdrawal: Withdrawal | None = None
        self._segments: shared_memory.SegmentWatch | None = None
        self._record = process_tree.TreeRecord(run_directory.descriptor, self._tree)
        self._records_rest_until = 0.0
        self._cleanup: Cleanup | None = None
        self._deadline: float | None = None
        self._frontend_deadline: float | None = None
        self._orphaned = False
        self._supervisor = os.getppid()
        self._killed_the_worker = False
        self._given_up_at = float("inf")  # while the supervisor lives, it decides
        self._frontend_failure: str | None = None

    def run(self) -> None:
        """Start the worker, wait until it or the supervisor ends, and clean up."""
        self._watch_segments()
        self._relay.start(self._loop)
        self._loop.add(self._channel.socket.fileno(), self._on_message)
        try:
            self._worker = spawn(
                self._command,
                self._environment,
                self._control.fileno(),
                self._run_directory.mark,
                self._relay.ends,
            )
        except SpawnError as error:
            self._channel.send("spawn_failed", reason=str(error))
        else:
            self._channel.send("spawned", pid=self._worker.pid, start=self._worker.start)
        self._control.close()
        self._relay.close_ends()
        discovery.prepare()
        while self._worker is not None and self._exit_code is None and time.monotonic() < self._given_up_at:
            self._pump(min(self._records_due(), self._given_up_at))
        if self._withdrawal is None:  # before anything else: routers send requests to a dead worker
            self._withdrawal = Withdrawal(ledger.registrations(self._run_directory.descriptor), self._log)
        if self._segments is not None:
            with contextlib.suppress(OSError):  # out of descriptors: recorded segments are removed all the same
                self._segments.claim()
        if self._exit_code is not None:
            self._channel.send("exited", code=self._exit_code)
        self._clean()

    def _clean(self) -> None:
        self._cleanup = Cleanup(
            self._run_directory,
            find=self._tree,
            reap=self._loop.reap,
            wait=self._wait,
            log=self._log,
            segments=self._segments,
            withdrawal=self._withdrawal,
            worker=self._worker.pid if self._worker is not None and (self._exit_code or 0) < 0 else None,
            rough=self._worker is not None and self._exit_code is None,  # it hangs in the kernel
        )
        if self._deadline is not None:
            self._cleanup.deadline = self._deadline
        self._cleanup.frontend_deadline = self._frontend_deadline
        report = self._cleanup.run()
        report["frontend"] = self._frontend_failure
        self._relay.finish()
        if self._cleanup.stuck is None:
            raise RuntimeError("the worker's processes could not be killed")  # the supervisor tries again
        self._channel.send("cleaned", report=report)
        if self._channel.deaf:
            self._log.info(
                "Worker stopped by the guardian, without a supervisor",
                processes=report["processes"],
                withdrawn=", ".join(report["withdrawn"]) or None,
                segments=report["segments"],
                seconds=report["seconds"],
            )
            worker = self._worker.pid if self._worker is not None else None
            self._recorder.end_without_supervisor(
                report,
                self._supervisor,
                (worker, self._exit_code),
                while_cleaning=not self._killed_the_worker,
            )

    def _watch_segments(self) -> None:
        try:
            self._segments = shared_memory.SegmentWatch(
                self._run_directory.descriptor, lambda: (process.pid for process in self._tree())
            )
        except OSError as error:
            self._log.warning("Cannot watch shared memory; segments may be left behind", reason=error)
        else:
            self._loop.add(self._segments.descriptor, self._read_segments)

    def _read_segments(self) -> None:
        assert self._segments is not None
        with contextlib.suppress(OSError):  # a segment missed now is found at the end, if it is still in use
            self._segments.read()

    def _tree(self) -> dict[Process, Stat]:
        """Return all processes of the worker's tree: everything below us except our own helper."""
        helper = self._withdrawal.process if self._withdrawal is not None else None
        return process_tree.descendants(os.getpid(), () if helper is None else (helper,))

    def _pump(self, until: float | None, descriptor: int | None = None) -> None:
        """Handle one batch of events, waiting until ``until`` (monotonic) at most."""
        self._loop.pump(None if until is None else max(0.0, until - time.monotonic()), descriptor)
        if self._cleanup is None and self._records_due() <= time.monotonic():
            self._update_records()

    def _records_due(self) -> float:
        """Return when to update the records that cleaning needs (monotonic)."""
        due = self._segments.due() if self._segments is not None else None
        return max(self._record.due if due is None else min(due, self._record.due), self._records_rest_until)

    def _update_records(self) -> None:
        now = time.monotonic()
        try:
            due = self._segments.due() if self._segments is not None else None
            if self._segments is not None and due is not None and due <= now:
                self._segments.look_up()
            if self._record.due <= now:
                self._record.update()
        except OSError:  # out of descriptors or memory for a moment: no reason to end a serving worker
            self._records_rest_until = now + _SHORTAGE_PAUSE

    def _wait(self, seconds: float, descriptor: int | None) -> None:
        self._pump(time.monotonic() + seconds, descriptor)

    def _on_signal(self, number: int) -> None:
        """Do nothing: no signal is meant for us."""

    def _on_child(self, pid: int, code: int) -> None:
        if self._worker is not None and pid == self._worker.pid and self._exit_code is None:
            self._exit_code = code
        elif self._frontend_failure is None and (self._cleanup is None or not self._cleanup.has_killed(pid)):
            self._frontend_failure = frontend.report_end(self._run_directory.descriptor, pid, code, self._log)

    def _on_message(self) -> None:
        for message in self._channel.receive():
            kind = message["type"]
            if kind == "deadline":
                self._deadline, self._frontend_deadline = float(message["at"]), float(message["frontend"])
                if self._cleanup is not None:
                    self._cleanup.deadline = self._deadline
                    self._cleanup.frontend_deadline = self._frontend_deadline
            elif kind == "withdraw" and self._withdrawal is None:
                self._withdrawal = Withdrawal(ledger.registrations(self._run_directory.descriptor), self._log)
        if self._channel.closed and not self._orphaned:
            self._orphaned = True
            self._loop.remove(self._channel.socket.fileno())
            if self._cleanup is None:
                self._log.error("Supervisor died; guardian is killing the worker")
                if self._worker is not None:
                    self._killed_the_worker = True
                    linux.send_signal(self._worker, signal.SIGKILL)
                self._given_up_at = time.monotonic() + DEATH_LIMIT


def become_guardian(
    supervisor: socket.socket,
    control: socket.socket,
    run_directory: RunDirectory,
    command: Sequence[str],
    environment: Mapping[str, str],
    relay: Relay,
    log: Log,
    recorder: Recorder,
) -> NoReturn:
    """Turn a process just forked from the supervisor, with all signals blocked, into the guardian."""
    code = 1
    log.output.forget()
    log = Log("dynamo_worker.guardian", as_json=log.as_json, output=log.output)
    try:
        os.setsid()  # out of reach of the terminal and of a kill of the supervisor's group
        linux.set_name(_NAME)
        recorder.become_guardians(log)
        linux.become_subreaper()
        # If the supervisor is killed while we are stopped, we have to run to notice. Losing the race does no harm.
        linux.on_parent_death(signal.SIGCONT, os.getppid())
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        guardian = Guardian(supervisor, control, run_directory, command, environment, relay, log, recorder)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        guardian.run()
        code = 0
    except BaseException as error:
        log.error("Guardian failed; supervisor takes over", error=f"{type(error).__name__}: {error}")
    finally:
        log.drain()
        os._exit(code)
