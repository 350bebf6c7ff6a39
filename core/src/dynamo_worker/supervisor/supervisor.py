"""The first process: owns the signals, the deadlines and the exit code. Policy only; the guardian cleans up."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.supervisor import channel, cleaning_times, frontend, interpreter, linux, process_tree, report, sweep
from dynamo_worker.supervisor.blocked_loop import BlockedLoop
from dynamo_worker.supervisor.early_settings import EarlySettings
from dynamo_worker.supervisor.environment import worker_environment
from dynamo_worker.supervisor.escalation import Escalation
from dynamo_worker.supervisor.exit_kinds import ExitKind
from dynamo_worker.supervisor.final_cleaning import FinalCleaning
from dynamo_worker.supervisor.guardian import become_guardian
from dynamo_worker.supervisor.guardian_link import GuardianLink
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.live_probe import LiveProbe
from dynamo_worker.supervisor.loop import Loop
from dynamo_worker.supervisor.output import open_standard_streams
from dynamo_worker.supervisor.protocol import DEFAULT_FILE_KV, STACK, STATUS_SERVER
from dynamo_worker.supervisor.reactions import Reactions
from dynamo_worker.supervisor.recorder import Recorder, cleaned_fields
from dynamo_worker.supervisor.relay import Relay
from dynamo_worker.supervisor.resource_samples import ResourceSamples
from dynamo_worker.supervisor.run_directory import RunDirectory
from dynamo_worker.supervisor.spawn import fork
from dynamo_worker.supervisor.systemd import Systemd
from dynamo_worker.supervisor.verdict import Ending, Verdict, verdict
from dynamo_worker.supervisor.worker_channel import WorkerChannel
from dynamo_worker.supervisor.worker_process import WorkerProcess
from dynamo_worker.supervisor.worker_status import WorkerStatus, positive

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

#: A wait that ends later than this, in seconds, means that we could not run.
_LATE = 0.2

#: With fewer descriptors the worker could neither serve nor be cleaned up after.
_LEAST_DESCRIPTORS = 64

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Supervisor:
    """Runs one worker from its start until the last trace of it is gone.

    :param command: the worker's whole command line.
    :param argv: the part of it that was given to us, to read the settings that concern us.
    """

    def __init__(self, command: Sequence[str], argv: Sequence[str]) -> None:
        self._command = list(command)
        self._started = time.monotonic()
        settings = EarlySettings(argv)
        as_json = settings.get("log_format", "text").lower() == "json"  # as the worker reads it
        self._log = report.Log("dynamo_worker.supervisor", as_json=as_json)
        self._settings = settings
        self._recorder = Recorder(self._started, self._log)
        self._discovery_root = settings.get("discovery_path", DEFAULT_FILE_KV, variable="DYN_FILE_KV")
        self._systemd = Systemd()
        self._memory_kills = linux.memory_kills()
        self._status = WorkerStatus(
            self._started,
            positive(settings.get("termination_grace_period", ""), 30.0),
            settings.get("termination_message_path", "/dev/termination-log"),
        )
        self._escalation = Escalation()
        self._worker = WorkerProcess()
        self._blocked_loop = BlockedLoop(self._worker, self._status, self._log)

    # -- Life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the worker, clean up after it, and return the exit code for our caller."""
        linux.set_name("dynamo-worker")
        signal.pthread_sigmask(signal.SIG_BLOCK, [*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGCHLD])
        linux.become_subreaper()
        self._recorder.open(self._settings)
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if 0 <= descriptors < _LEAST_DESCRIPTORS:  # negative: no limit
            return self._fail(
                f"expected a limit of {_LEAST_DESCRIPTORS} open files or more, got {descriptors} (ulimit -n)"
            )
        try:
            self._run_directory = RunDirectory.create()
        except OSError as error:
            return self._fail(f"cannot create the worker's private directory: {error.strerror}")
        self._recorder.refer(self._run_directory.descriptor)
        if trouble := self._run_directory.trouble:
            used = self._run_directory.base
            self._log.warning("TMPDIR cannot be used as it is", used=used, reason="; ".join(trouble))
        try:
            self._start()
        except OSError as error:
            self._run_directory.remove(time.monotonic() + 1.0)
            hint = "raise the limits of processes (pids.max, ulimit -u) and of open files (ulimit -n)"
            return self._fail(f"cannot start the worker's guardian process: {error.strerror} ({hint})")
        while not self._over():
            self._pump(self._next_timer())
            self._reactions.act_on_time()
            self._blocked_loop.act_on_time()
            self._samples.act_on_time()
        return self._finish()

    def _fail(self, reason: str) -> int:
        code = int(ExitCode.START_FAILED)
        self._leave_message(reason)
        self._log.error("Worker not started", code=code, reason=reason)
        self._recorder.end(code, ExitKind.START_FAILED, reason, by="supervisor", cleaned={"processes": 0})
        self._recorder.close()
        self._log.drain()
        return code

    def _leave_message(self, text: str) -> None:
        """Tell Kubernetes why the container ends."""
        path = self._status.termination_message_path
        try:
            report.write_termination_message(path, text)
        except (OSError, ValueError) as error:
            self._log.warning("Termination message not written", path=path, reason=error)

    def _start(self) -> None:
        # Children that a shell had before it became us by `exec` are not ours to kill.
        strangers = set(process_tree.descendants(os.getpid()))
        relay = Relay(self._log.output, as_json=self._log.as_json)
        control = self._fork_guardian(relay)
        owners = [
            Process(pid, stat.start) for pid in (os.getpid(), self._guardian.pid) if (stat := linux.read_stat(pid))
        ]
        self._run_directory.record_owners(owners)
        # Signals that our parent ignored (nohup) stay ignored.
        wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._loop = Loop([*wanted, signal.SIGUSR1], lambda number: self._reactions.on_signal(number), self._on_child)
        self._loop.outputs.add(self._log.output)
        self._loop.add(self._guardian.channel.socket.fileno(), self._on_guardian_message)
        self._control = WorkerChannel(
            control,
            self._loop,
            self._status,
            lambda: self._systemd.report(self._status),
            self._log,
            self._on_descriptors,
            self._recorder.take,
        )
        self._samples = ResourceSamples(self._recorder, self._worker, self._status, self._loop)
        self._probe = LiveProbe(
            self._loop, lambda: self._status.state.value, lambda: not self._control.closed and not self._worker.ended
        )
        self._cleaning = FinalCleaning(
            self._guardian,
            self._worker,
            self._status,
            self._escalation,
            run_directory=self._run_directory,
            strangers=strangers,
            relay=relay,
            loop=self._loop,
            wait=lambda seconds, descriptor: self._pump(time.monotonic() + seconds, descriptor),
            log=self._log,
        )
        self._reactions = Reactions(
            self._worker,
            self._status,
            self._escalation,
            control=self._control,
            guardian=self._guardian,
            cleaning=self._cleaning,
            systemd=self._systemd,
            log=self._log,
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            sweep.sweep_in_background(self._run_directory, self._discovery_root, self._log)
        except OSError as error:
            self._log.warning("Cleaning up after an earlier worker failed", error=error)

    def _fork_guardian(self, relay: Relay) -> socket.socket:
        """Fork the guardian, which starts the worker; return our end of the worker's control socket."""
        guardian_end, guardian_channel = channel.pair()
        control_end, control = channel.pair()
        environment = worker_environment(self._run_directory, control.fileno())
        gc.collect()
        gc.freeze()  # keeps the collector of either process off the pages that both share
        pid = fork()
        if pid == 0:
            guardian_end.close()
            control_end.close()
            become_guardian(
                guardian_channel,
                control,
                self._run_directory,
                self._command,
                environment,
                relay,
                self._log,
                self._recorder,
            )
        relay.close_ends()
        guardian_channel.close()
        control.close()
        self._guardian = GuardianLink(pid, guardian_end)
        return control_end

    def _over(self) -> bool:
        """Return whether the worker or the guardian has ended, or one of them has exceeded its time limit."""
        guardian = self._guardian
        now = time.monotonic()
        return guardian.knows_the_end or guardian.exit_code is not None or any(limit <= now for limit in self._limits())

    def _limits(self) -> list[float]:
        """Return the times (monotonic) at which to stop waiting for the guardian to report the worker's end."""
        limits = []
        if self._worker.gone_at is not None:
            limits.append(self._worker.gone_at + cleaning_times.guardian_patience(self._escalation))
        if self._worker.killed_at is not None:
            limits.append(
                cleaning_times.given_up_at(
                    self._escalation,
                    self._status.grace_period,
                    self._worker.killed_at,
                    started=self._worker.process is not None,
                )
            )
        return limits

    def _next_timer(self) -> float | None:
        timers = [*self._limits(), self._reactions.next_timer(), self._blocked_loop.next_timer()]
        timers.append(self._samples.next_timer())
        return min((timer for timer in timers if timer is not None), default=None)

    def _finish(self) -> int:
        """Wait until everything is cleaned up, say why it ended, and return the exit code."""
        gone_at = time.monotonic()
        self._cleaning.begin(gone_at)
        self._control.receive_rest()
        self._samples.close()
        cleaned: dict[str, Any] | None = None
        if not self._guardian.knows_the_end:
            # First: the guardian cannot tell how the worker ended, so we have to see for ourselves.
            cleaned = self._cleaning.take_over()
        code, reason, kind = verdict(self._ending())
        self._record_deaths()
        self._leave_message(f"exit code {code}: {reason}")
        self._systemd.send("STOPPING=1", f"STATUS=cleaning up: {reason}")
        self._cleaning.update_deadlines()
        if cleaned is None:
            cleaned = self._cleaning.await_report(self._pump_with_watchdog)
        if cleaned is None:
            cleaned = self._cleaning.take_over()
        if code == 0 and cleaned.get("frontend"):
            code, reason = int(ExitCode.FATAL), f"the frontend ended before its streams did: {cleaned['frontend']}"
            kind = ExitKind.FRONTEND_FAILED
            self._leave_message(f"exit code {code}: {reason}")
        self._log_end(Verdict(code, reason, kind), gone_at, cleaned)
        self._systemd.send(f"STATUS=stopped: {reason}")
        self._systemd.close()
        self._probe.close()
        self._recorder.close()
        self._blocked_loop.close()
        self._run_directory.close()
        self._loop.close()
        return code

    def _ending(self) -> Ending:
        kills = linux.memory_kills()
        return Ending(
            exit_code=self._worker.exit_code,
            state=self._status.state,
            said=self._status.reason,
            announced_code=self._status.exit_code,
            spawn_failure=self._guardian.spawn_failure,
            kill_cause=self._worker.kill_cause,
            stuck_for=self._reactions.stuck_for,
            stop_level=self._escalation.level,
            last_signal=self._escalation.last_signal,
            guardian_lost=self._cleaning.guardian_lost,
            guardian_failed=bool(self._guardian.exit_code),
            started=self._worker.process is not None,
            error=self._status.error,
            never_served=not self._status.has_served,
            memory_kills=None if kills is None or self._memory_kills is None else kills - self._memory_kills,
        )

    def _record_deaths(self) -> None:
        self._recorder.sample()
        worker, guardian = self._worker, self._guardian
        if worker.pid is not None:
            self._recorder.death("worker", worker.pid, worker.exit_code)
        if guardian.exit_code:
            self._recorder.death("guardian", guardian.pid, guardian.exit_code)

    def _log_end(self, end: Verdict, gone_at: float, cleaned: Mapping[str, Any]) -> None:
        fields: dict[str, Any] = {"code": end.code, "reason": end.reason, "ran": gone_at - self._started}
        asked_at = self._escalation.asked_at
        if asked_at is not None and asked_at <= gone_at:
            fields["stopped_in"] = gone_at - asked_at
        fields |= _cleaned_fields(cleaned)
        (self._log.info if end.code == 0 else self._log.error)("Worker stopped", **fields)
        self._recorder.end(
            end.code,
            end.kind,
            end.reason,
            by="supervisor",
            state=self._status.state.value,
            killed_because=self._worker.kill_cause.value if self._worker.kill_cause is not None else None,
            ran=fields["ran"],
            stopped_in=fields.get("stopped_in"),
            cleaned=cleaned_fields(cleaned),
        )
        self._log.drain()

    # -- Events -------------------------------------------------------------------------------------------------------

    def _on_child(self, pid: int, code: int) -> None:
        guardian, cleaning = self._guardian, self._cleaning
        if pid == guardian.pid and guardian.exit_code is None:
            guardian.exit_code = code
            if guardian.report is None and not guardian.channel.closed:
                self._on_guardian_message()  # what it said last
        elif pid == self._worker.pid and self._worker.exit_code is None:
            self._worker.exit_code = code  # the guardian is dead and we are the parent now
        elif cleaning.frontend_failure is None and not cleaning.has_killed(pid):
            cleaning.frontend_failure = frontend.report_end(self._run_directory.descriptor, pid, code, self._log)

    def _on_descriptors(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Take over what the worker hands over."""
        kind, path = message["type"], message.get("live_path")
        if kind == STATUS_SERVER and isinstance(path, str) and len(descriptors) == 2:
            self._probe.open(descriptors, path)
        elif kind == STACK and len(descriptors) == 1:
            self._blocked_loop.open(descriptors[0])

    def _on_guardian_message(self) -> None:
        self._guardian.receive()
        if self._worker.process is None and self._guardian.worker is not None:
            self._worker.started(self._guardian.worker, self._loop)
            self._log.info("Worker started", pid=self._worker.pid, run_dir=self._run_directory.path)
        if self._guardian.worker_exit_code is not None:
            self._worker.exit_code = self._guardian.worker_exit_code
        if self._guardian.channel.closed:
            self._loop.remove(self._guardian.channel.socket.fileno())

    def _pump(self, until: float | None, descriptor: int | None = None) -> None:
        """Wait for one batch of events, until a point in time (monotonic) at most, and handle it."""
        now = time.monotonic()
        timers = [timer for timer in (until, self._probe.next_timer()) if timer is not None]
        self._loop.pump(max(0.0, min(timers) - now) if timers else None, descriptor)
        self._probe.act_on_time()
        if until is not None and (late := time.monotonic() - max(now, until)) > _LATE:
            self._status.last_beat += late  # we were stopped, or the whole machine: not the worker's fault

    def _pump_with_watchdog(self, until: float) -> None:
        self._pump(min(until, self._systemd.watchdog_due or until))
        self._reactions.tell_systemd(time.monotonic())


def _cleaned_fields(cleaned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the log fields that describe the cleanup."""
    if not cleaned:
        return {"cleaned": "in the background"}
    fields: dict[str, Any] = {
        "cleaned_in": float(cleaned.get("seconds", 0.0)),
        "processes_killed": cleaned.get("processes", 0),
        "segments_removed": cleaned.get("segments", 0),
    }
    if cleaned.get("withdrawn"):
        fields["withdrawn"] = ", ".join(cleaned["withdrawn"])
    if cleaned.get("gpu"):
        fields["gpu_memory"] = cleaned["gpu"]
    if cleaned.get("unkillable"):
        fields["unkillable"] = ", ".join(cleaned["unkillable"])
    return fields


def supervise(argv: Sequence[str], *, command: Sequence[str] | None = None) -> NoReturn:
    """Run a worker under supervision and end this process with the exit code.

    At once: while the interpreter shuts down, signals have their default actions again, and one that came then would
    replace the code.

    :param argv: the command line of ``dynamo-worker``, without its name.
    :param command: what to run instead of ``python -P -m dynamo_worker --no-supervise``; ``argv`` is appended.
    """
    open_standard_streams()
    own = [*interpreter.module_command("dynamo_worker"), "--no-supervise"] if command is None else list(command)
    os._exit(Supervisor([*own, *argv], argv).run())


__all__ = ["Supervisor", "supervise"]
