"""The first process: owns the signals, the deadline and the exit code; policy only, the guardian does the cleaning."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import stat
import time
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.supervisor import channel, frontend, interpreter, ledger, linux, process_tree, report, sweep
from dynamo_worker.supervisor.channel import Channel
from dynamo_worker.supervisor.cleanup import LIMIT, Cleanup
from dynamo_worker.supervisor.early_settings import EarlySettings
from dynamo_worker.supervisor.guardian import DEATH_LIMIT, become_guardian
from dynamo_worker.supervisor.linux import Process
from dynamo_worker.supervisor.loop import Loop
from dynamo_worker.supervisor.output import Relay, open_standard_streams
from dynamo_worker.supervisor.protocol import (
    CONTROL_FD,
    DEFAULT_FILE_KV,
    FORCED_STOP,
    KILL_RESERVE,
    RUN_DIR,
    SIGNAL_DEBOUNCE,
)
from dynamo_worker.supervisor.run_directory import RunDirectory, check_place, make_directory, real_path
from dynamo_worker.supervisor.spawn import fork

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What is left of the whole process after the third signal.
_AT_ONCE = 0.35

#: When we wake up later than this, it was us who did not run.
_LATE = 0.2

#: With fewer descriptors than that the worker could not serve, nor could be cleaned up behind it.
_LEAST_DESCRIPTORS = 64

#: What the cleaning gets after a third signal from the last who can do it: the guardian, or us in its place.
_LAST_CLEANING = 2.0

#: How long a worker that hangs gets to print where.
_DUMP_TIME = 1.0

#: How long a guardian may take to say that the worker is gone, and to report when its time for cleaning is over.
_GUARDIAN_LIMIT = 1.0

#: Messages of a dead worker that are read: more than a socket holds, so that its last one is among them.
_MOST_AT_THE_END = 1000

#: How late its report may be while the termination grace period runs out.
_LATENESS = 0.2

#: Part of the grace period in which the supervisor could still do the cleaning itself, and the least that needs.
_TAKE_OVER_RESERVE, _SHORTEST_CLEANING = 1.0, 0.5

#: systemd is told so often, during a start or stop, that it takes more time.
_EXTEND_INTERVAL = 10.0

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

#: States in which the worker's event loop must show that it is alive.
_WATCHED = ("SERVING", "UNREGISTERING", "GRACE", "DRAINING")

#: States of a worker that is about to end, for whatever reason.
_ENDING = ("UNREGISTERING", "GRACE", "DRAINING", "CLEANUP", "FATAL")

#: Directories for caches that must outlive the worker although they lie in TMPDIR by default.
_LASTING_CACHES = (("TORCHINDUCTOR_CACHE_DIR", "torchinductor_{user}"),)

#: PyTorch compiles its C++ headers into TMPDIR, whatever its cache directory is: 4 s at every start, for kernels that
#: are in the cache already.
_NO_PRECOMPILED_HEADERS = ("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")


class Supervisor:
    """Runs one worker from its start to the last trace of it.

    :param command: the worker's whole command line.
    :param argv: the part of it that was given to us, to read the settings that concern us.
    """

    def __init__(self, command: Sequence[str], argv: Sequence[str]) -> None:
        self._command = list(command)
        self._started = time.monotonic()
        settings = EarlySettings(argv)
        self._log = report.Log("dynamo_worker.supervisor", as_json=settings.get("log_format", "text") == "json")
        self._termination_message_path = settings.get("termination_message_path", "/dev/termination-log")
        self._grace = _positive(settings.get("termination_grace_period", ""), 30.0)
        self._discovery_root = settings.get("discovery_path", DEFAULT_FILE_KV, variable="DYN_FILE_KV")
        self._notifier = report.Notifier()
        self._memory_kills = linux.memory_kills()

        # What the worker says of itself.
        self._state = "STARTING"
        self._announced: float | None = None
        self._in_flight = 0
        self._farewell: dict[str, Any] = {}
        self._heartbeat_timeout = 0.0
        self._last_beat = self._started
        self._ready = False

        # What was asked of it.
        self._level = 0
        self._stop_at = 0.0
        self._forced_at = 0.0
        self._counted_signal, self._counted_at = 0, 0.0
        self._last_signal = 0
        self._ended_by_itself = False
        self._stuck_at: float | None = None
        self._stuck_for = 0.0
        self._kill_cause: str | None = None
        self._killed_at: float | None = None

        # How it ended.
        self._worker: Process | None = None
        self._worker_watch: int | None = None
        self._worker_gone_at: float | None = None
        self._gone_at = 0.0
        self._exit_code: int | None = None
        self._spawn_failure: str | None = None
        self._guardian = 0
        self._guardian_code: int | None = None
        self._guardian_told = False
        self._guardian_lost = False
        self._frontend_failure: str | None = None
        self._report: dict[str, Any] | None = None
        self._cleanup: Cleanup | None = None
        self._cleaning_deadline = 0.0
        self._frontend_deadline = 0.0
        self._hurried = False
        self._closed_at: float | None = None
        self._next_watchdog = 0.0
        self._next_extension = 0.0

    # -- Life ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the worker and return the exit code of the whole."""
        linux.set_name("dynamo-worker")
        signal.pthread_sigmask(signal.SIG_BLOCK, [*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGCHLD])
        # Children that a shell had before it became us by `exec` are not ours to kill.
        self._strangers = set(process_tree.descendants(os.getpid()))
        linux.become_subreaper()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if 0 <= descriptors < _LEAST_DESCRIPTORS:  # negative: no limit
            return self._fail(f"the limit of open files is {descriptors}; {_LEAST_DESCRIPTORS} are needed (ulimit -n)")
        try:
            self._run_directory = RunDirectory.create()
        except OSError as error:
            return self._fail(f"cannot create the worker's private directory: {error.strerror}")
        if self._run_directory.trouble:
            self._log.warning(
                "TMPDIR cannot be used as it is",
                used=self._run_directory.base,
                reason="; ".join(self._run_directory.trouble),
            )
        try:
            self._start()
        except OSError as error:
            self._run_directory.remove(time.monotonic() + 1.0)
            hint = "raise the limits of processes (pids.max, ulimit -u) and of open files (ulimit -n)"
            return self._fail(f"cannot start the worker's guardian process: {error.strerror} ({hint})")
        while not self._over():
            self._pump(self._next_timer())
            self._act()
        return self._finish()

    def _fail(self, reason: str) -> int:
        code = int(ExitCode.START_FAILED)
        self._leave_message(reason)
        self._log.error("Worker not started", code=code, reason=reason)
        self._log.drain()
        return code

    def _leave_message(self, text: str) -> None:
        """Leave Kubernetes a word on why the container ends."""
        path = self._termination_message_path
        try:
            report.write_termination_message(path, text)
        except (OSError, ValueError) as error:
            self._log.warning("Termination message not written", path=path, reason=error)

    def _start(self) -> None:
        guardian_end, guardian_channel = channel.pair()
        control_end, control = channel.pair()
        environment = _environment(self._run_directory, control.fileno())
        self._relay = Relay(self._log.output)
        gc.collect()
        gc.freeze()  # keeps the collector of either process off the pages that both share
        self._guardian = fork()
        if self._guardian == 0:
            guardian_end.close()
            control_end.close()
            become_guardian(
                guardian_channel,
                control,
                self._run_directory,
                self._command,
                environment,
                self._relay,
                self._log,
            )
        self._relay.close_ends()
        guardian_channel.close()
        control.close()
        self._to_guardian = Channel(guardian_end)
        self._control = Channel(control_end)
        owners = [Process(pid, stat.start) for pid in (os.getpid(), self._guardian) if (stat := linux.read_stat(pid))]
        self._run_directory.record_owners(owners)
        # Signals that whoever started us had ignored (nohup) stay ignored.
        wanted = [number for number in _STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._loop = Loop([*wanted, signal.SIGUSR1], self._on_signal, self._on_child)
        self._loop.outputs.add(self._log.output)
        self._loop.add(self._to_guardian.socket.fileno(), self._on_guardian_message)
        self._loop.add(self._control.socket.fileno(), self._on_worker_message)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            sweep.sweep_in_background(self._run_directory, self._discovery_root, self._log)
        except OSError as error:
            self._log.warning("Not cleaned up behind an earlier worker", error=error)

    def _over(self) -> bool:
        """Return whether the worker is gone, or the guardian, or either does not do what it should."""
        return (
            self._guardian_told
            or self._guardian_code is not None
            or (self._worker_gone_at is not None and time.monotonic() >= self._worker_gone_at + self._patience)
            or (self._given_up_at is not None and time.monotonic() >= self._given_up_at)
        )

    @property
    def _given_up_at(self) -> float | None:
        """When not to wait any more for the end of a worker that was killed, or for a guardian that has started none.

        The kernel has its time, but not that which is left for the cleaning.
        """
        if self._killed_at is None:
            return None
        if self._worker is None:
            return self._killed_at + self._patience
        limit = self._killed_at + DEATH_LIMIT
        if self._level >= 2:
            limit = self._killed_at
        elif self._level:
            limit = min(limit, self._stop_at + self._grace - _TAKE_OVER_RESERVE)
        return max(limit, self._killed_at + _GUARDIAN_LIMIT)

    @property
    def _patience(self) -> float:
        """How long the guardian may take to say that the worker is gone."""
        return _AT_ONCE / 3 if self._hurried else _GUARDIAN_LIMIT

    def _finish(self) -> int:
        """Wait until everything is cleaned, say why it ended, and return the exit code."""
        gone_at = self._gone_at = time.monotonic()
        if not self._control.closed:
            self._on_worker_message(_MOST_AT_THE_END)
        if not self._guardian_told:
            self._take_over()  # first: the guardian cannot tell how the worker ended, so we have to see for ourselves
        code, reason = self._verdict()
        self._leave_message(f"exit code {code}: {reason}")
        self._notifier.send("STOPPING=1", f"STATUS=cleaning up: {reason}")
        self._set_cleaning_deadline()
        self._await_report()
        if self._report is None:
            self._take_over()
        cleaned = self._report or {}
        if code == 0 and cleaned.get("frontend"):
            code, reason = int(ExitCode.FATAL), f"the frontend ended before its streams did: {cleaned['frontend']}"
            self._leave_message(f"exit code {code}: {reason}")
        self._log_end(code, reason, gone_at, cleaned)
        self._notifier.send(f"STATUS=stopped: {reason}")
        self._run_directory.close()
        self._loop.close()
        return code

    def _log_end(self, code: int, reason: str, gone_at: float, cleaned: Mapping[str, Any]) -> None:
        fields: dict[str, Any] = {"code": code, "reason": reason, "ran": gone_at - self._started}
        if self._level and self._stop_at <= gone_at:
            fields["stopped_in"] = gone_at - self._stop_at
        if cleaned:
            fields["cleaned_in"] = float(cleaned.get("seconds", 0.0))
            fields["processes_killed"] = cleaned.get("processes", 0)
            fields["segments_removed"] = cleaned.get("segments", 0)
            if cleaned.get("withdrawn"):
                fields["withdrawn"] = ", ".join(cleaned["withdrawn"])
            if cleaned.get("gpu"):
                fields["gpu_memory"] = cleaned["gpu"]
            if cleaned.get("unkillable"):
                fields["unkillable"] = ", ".join(cleaned["unkillable"])
        else:
            fields["cleaned"] = "in the background"
        (self._log.info if code == 0 else self._log.error)("Worker stopped", **fields)
        self._log.drain()

    # -- Cleaning -----------------------------------------------------------------------------------------------------

    def _set_cleaning_deadline(self) -> None:
        """Tell who cleans by when to be done: before the termination grace period ends, if that is running."""
        now = time.monotonic()
        deadline = now + LIMIT
        if self._level:
            deadline = max(now + _SHORTEST_CLEANING, min(deadline, self._stop_at + self._grace - _TAKE_OVER_RESERVE))
        guardian = deadline
        if self._hurried:  # the guardian goes on without us, but nobody would after us
            guardian = now + _LAST_CLEANING
            deadline = now + _AT_ONCE - 0.1 if self._cleanup is None else guardian
        self._cleaning_deadline = deadline
        self._frontend_deadline = self._frontend_limit(now)
        self._to_guardian.send("deadline", at=guardian, frontend=self._frontend_deadline)
        if self._cleanup is not None:
            self._cleanup.deadline = deadline
            self._cleanup.frontend_deadline = self._frontend_deadline

    def _frontend_limit(self, now: float) -> float:
        """Return when a frontend that still carries streams has to be gone.

        It gets what is left of the termination grace period, or a whole one if the worker ended by itself.
        """
        if self._hurried:
            return now
        if self._level >= 2:
            return self._forced_at + FORCED_STOP
        since = min(self._stop_at, self._gone_at) if self._level else self._gone_at
        return since + self._grace - _TAKE_OVER_RESERVE - _SHORTEST_CLEANING

    def _frontend_lives(self) -> bool:
        """Return whether those who clean are waiting for a frontend, and rightly so."""
        recorded = (
            ledger.frontend(self._run_directory.descriptor) if time.monotonic() < self._frontend_deadline else None
        )
        return recorded is not None and linux.is_alive(recorded[0])

    def _await_report(self) -> None:
        """Wait for the guardian's report, as long as it lives and is within its time."""
        patience = 0.0
        while self._report is None and self._guardian_code is None:
            limit = self._cleaning_deadline + (_LATENESS if self._level else _GUARDIAN_LIMIT)
            if self._frontend_lives():
                patience = min(time.monotonic() + _GUARDIAN_LIMIT, self._frontend_deadline) + _GUARDIAN_LIMIT
            if not self._hurried:
                limit = max(limit, patience)
            if time.monotonic() >= limit:
                break
            self._pump(min(limit, self._watchdog_due() or limit))
            self._tell_systemd(time.monotonic())
        if self._report is None and self._guardian_code is None:
            if self._hurried:
                self._report = {}  # it is at work and finishes without us
            return
        while self._report is not None and self._guardian_code is None:  # it ends right after its report
            limit = time.monotonic() + 0.2
            self._pump(limit)
            if time.monotonic() >= limit:
                break

    def _take_over(self) -> None:
        """Clean up in the place of a guardian that is dead or does not answer."""
        stat = linux.read_stat(self._guardian) if self._guardian_code is None else None
        hangs = stat is not None and stat.state not in "TZX"  # neither dead nor stopped, and yet it does not answer
        self._guardian_lost = self._guardian_code is not None and not self._guardian_told
        if self._guardian_code is None:
            if self._worker is not None and linux.is_alive(self._worker):
                stuck = process_tree.describe(self._worker)
                self._log.error("The worker survives SIGKILL; the supervisor takes over", worker=stuck)
            else:
                self._log.error("The guardian does not answer; the supervisor takes over", pid=self._guardian)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._guardian, signal.SIGKILL)
        else:
            ended = f"killed by {_signal_name(-self._guardian_code)}" if self._guardian_code < 0 else "ended"
            self._log.error("The guardian is gone; the supervisor takes the worker down", guardian=ended)
        if self._worker is not None and self._exit_code is None:
            linux.send_signal(self._worker, signal.SIGKILL)  # the kernel does that, too
        self._relay.start(self._loop)  # the worker's last words
        self._cleanup = Cleanup(
            self._run_directory,
            find=lambda: process_tree.descendants(os.getpid(), self._strangers),
            reap=self._loop.reap,
            wait=self._wait,
            log=self._log,
            worker=self._worker.pid if self._worker is not None else None,
            rough=hangs,
        )
        self._set_cleaning_deadline()
        self._report = {**self._cleanup.run(), "frontend": self._frontend_failure}
        self._relay.finish()

    # -- Verdict ------------------------------------------------------------------------------------------------------

    def _verdict(self) -> tuple[int, str]:
        """Return exit code and reason of the whole."""
        if self._spawn_failure is not None:
            return int(ExitCode.START_FAILED), self._spawn_failure
        code, said = self._exit_code, _text(self._farewell.get("reason"))
        killed_by_us = self._kill_cause is not None and code in (None, -signal.SIGKILL)
        if killed_by_us and self._kill_cause == "stuck":
            return int(ExitCode.FATAL), f"event loop stuck for {self._stuck_for:.0f} s"
        if self._level >= 2:
            return SIGNAL_BASE + self._last_signal, f"forced to stop by {_signal_name(self._last_signal)}"
        if killed_by_us and self._kill_cause == "start":
            return int(ExitCode.STOPPED), "stopped during start"
        if killed_by_us and self._state == "FATAL":
            return int(ExitCode.FATAL), f"{said or 'fatal error'}; killed at its deadline"
        if killed_by_us:
            return int(ExitCode.DEADLINE), f"not stopped by its deadline, killed in state {self._state}"
        if self._guardian_lost and code in (None, -signal.SIGKILL):
            if self._worker is None and self._guardian_code:
                return int(ExitCode.START_FAILED), "the guardian process failed before it could start the worker"
            return int(ExitCode.FATAL), "the guardian process was killed, the worker with it"
        if code is None:
            return SIGNAL_BASE + signal.SIGKILL, "worker is gone, its exit status unknown"
        if code < 0:
            return SIGNAL_BASE - code, self._death_by_signal(-code)
        if code:
            return self._documented(code), said or f"worker exited with code {code}"
        if self._level and not self._ended_by_itself:
            return int(ExitCode.STOPPED), said or f"stopped after {_signal_name(self._last_signal)}"
        if self._farewell.get("code") == 0 or (self._state in _ENDING and self._state != "FATAL"):
            return int(ExitCode.STOPPED), said or "stopped"
        told = self._farewell.get("code")
        if isinstance(told, int) and 0 < told < 256:
            return told, said or f"worker reported code {told}"
        unasked = ExitCode.START_FAILED if self._state == "STARTING" else ExitCode.FATAL
        return int(unasked), f"worker ended by itself in state {self._state}, though nobody had asked it to"

    def _documented(self, code: int) -> int:
        """Return what the worker's exit code means to our caller.

        Unless the worker announced it, or a signal is behind it, a plugin or a library has ended the process.
        """
        if code == self._farewell.get("code") or code - SIGNAL_BASE in signal.valid_signals():
            return code
        if self._state != "STARTING":
            return int(ExitCode.FATAL)
        return code if code == ExitCode.USAGE else int(ExitCode.START_FAILED)

    def _death_by_signal(self, number: int) -> str:
        reason = f"worker killed by {_signal_name(number)}"
        if number == signal.SIGKILL:
            kills = linux.memory_kills()
            if kills is not None and self._memory_kills is not None:
                out_of_memory = kills > self._memory_kills
                return reason + (" (out of memory)" if out_of_memory else " (not for lack of memory)")
            return reason + " (out of memory?)"
        return reason

    # -- Events -------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGUSR1:
            self._log.info("Stack dump requested", state=self._state)
            self._dump_stack()
            return
        if now < self._counted_at + SIGNAL_DEBOUNCE and (number != signal.SIGQUIT or number == self._counted_signal):
            return
        self._counted_signal, self._counted_at = number, now
        name = _signal_name(number)
        if self._exit_code is not None or self._worker_gone_at is not None or self._cleanup is not None:
            self._hurry(name)
            return
        self._last_signal = number
        first = self._level == 0
        if number == signal.SIGQUIT:
            self._dump_stack()
            self._level = max(2, self._level + 1)
        else:
            self._level += 1
        if first:
            self._stop_at = now
        if self._level == 1:
            then = "another one forces the stop within 2 s"
        elif self._level == 2:
            self._forced_at = now
            then = "another one kills at once"
        else:
            then = "killed now"
        limit = self._kill_time()
        self._log.info(
            "Received shutdown signal",
            signal=name,
            stop_level=self._level,
            next=then,
            deadline_s=max(0.0, limit - now) if limit is not None else None,
        )
        if self._level <= 2:
            self._tell_worker_to_stop(name, now)
            seconds = max(0.0, (limit or now) - now) + KILL_RESERVE + 3.0
            self._notifier.send(
                "STOPPING=1", f"STATUS=stopping after {name}", f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}"
            )
        else:
            self._hurried = True
            self._kill("forced")

    def _hurry(self, name: str) -> None:
        """Act on a signal that comes when only cleaning is left: it cannot change the verdict."""
        impatient = self._level > 0 or self._hurried
        if not impatient:
            self._level, self._stop_at = 1, time.monotonic()
            self._ended_by_itself = True
        self._hurried = impatient
        then = "leaving at once" if impatient else "cleaning up; another one leaves at once"
        self._log.info("Received shutdown signal", signal=name, stop_level=self._level, next=then)
        if self._gone_at:  # else it is set soon
            self._set_cleaning_deadline()

    def _tell_worker_to_stop(self, name: str, at: float) -> None:
        self._control.send("stop", level=min(self._level, 2), signal=name, at=at)
        self._watch_output()
        if self._control.deaf and not self._control.closed:
            self._on_worker_message()  # its farewell may be among what it sent last
        if self._control.deaf and "code" not in self._farewell and self._worker is not None:
            self._log.warning("The worker does not listen any more; sending it the signal itself", signal="SIGTERM")
            linux.send_signal(self._worker, signal.SIGTERM)

    def _watch_output(self) -> None:
        """Have what the worker does not take now sent as soon as it does."""
        if not self._control.closed:  # what has ended is not watched any more
            flush = self._flush if self._control.pending and not self._control.deaf else None
            self._loop.on_output(self._control.socket.fileno(), self._on_worker_message, flush)

    def _flush(self) -> None:
        self._control.flush()
        self._watch_output()

    def _on_child(self, pid: int, code: int) -> None:
        if pid == self._guardian and self._guardian_code is None:
            self._guardian_code = code
            if self._report is None and not self._to_guardian.closed:
                self._on_guardian_message()  # what it said last
        elif self._worker is not None and pid == self._worker.pid and self._exit_code is None:
            self._exit_code = code  # the guardian is dead and we are the parent now
        elif self._frontend_failure is None and (self._cleanup is None or not self._cleanup.has_killed(pid)):
            self._frontend_failure = frontend.report_end(self._run_directory.descriptor, pid, code, self._log)

    def _on_guardian_message(self) -> None:
        for message in self._to_guardian.receive():
            kind = message["type"]
            if kind == "spawned":
                self._worker = Process(message["pid"], message["start"])
                self._watch_worker()
                self._log.info("Worker started", pid=self._worker.pid, run_dir=self._run_directory.path)
                if self._kill_cause is not None:
                    linux.send_signal(self._worker, signal.SIGKILL)
            elif kind == "spawn_failed":
                self._spawn_failure = message["reason"]
                self._guardian_told = True
            elif kind == "exited":
                self._exit_code = message["code"]
                self._guardian_told = True
            elif kind == "cleaned":
                self._report = message["report"]
        if self._to_guardian.closed:
            self._loop.remove(self._to_guardian.socket.fileno())

    def _watch_worker(self) -> None:
        """Learn of the worker's end without the guardian, in case that is stopped."""
        assert self._worker is not None
        try:
            self._worker_watch = os.pidfd_open(self._worker.pid)
        except OSError:
            return
        if linux.is_alive(self._worker):
            self._loop.add(self._worker_watch, self._on_worker_end)
        else:
            self._on_worker_end()

    def _on_worker_end(self) -> None:
        if self._worker_watch is not None:
            self._loop.remove(self._worker_watch)
            os.close(self._worker_watch)
            self._worker_watch = None
        if self._worker_gone_at is None:
            self._worker_gone_at = time.monotonic()

    def _on_worker_message(self, most: int = channel.MOST_AT_ONCE) -> None:
        malformed = self._control.malformed
        for message in self._control.receive(most):
            self._last_beat = time.monotonic()
            kind = message["type"]
            if kind == "state":
                self._on_state(message)
            elif kind == "heartbeat":
                self._in_flight = _count(message.get("in_flight"))
            elif kind == "settings":
                self._on_settings(message)
            elif kind == "exit":
                self._farewell = message
        if self._control.malformed and not malformed:
            self._log.warning("Something writes nonsense to the worker's control socket; it is ignored")
        if self._control.closed:
            self._loop.remove(self._control.socket.fileno())
            self._closed_at = time.monotonic()

    def _on_state(self, message: Mapping[str, Any]) -> None:
        state = message.get("state")
        if not isinstance(state, str):
            return
        self._state = state
        self._announced = _number(message.get("deadline"))
        self._in_flight = _count(message.get("in_flight"))
        if state == "FATAL" and message.get("reason"):
            self._farewell.setdefault("reason", message["reason"])
        status = f"STATUS={state}, {self._in_flight} in flight"
        if state == "SERVING" and not self._ready:
            self._ready = True
            self._notifier.send("READY=1", status)
        elif state in _ENDING:
            self._notifier.send("STOPPING=1", status)
        else:
            self._notifier.send(status)

    def _on_settings(self, message: Mapping[str, Any]) -> None:
        grace = _number(message.get("termination_grace_period"))
        if grace is not None and grace > 0:
            self._grace = grace
        self._heartbeat_timeout = _number(message.get("heartbeat_timeout")) or 0.0
        path = message.get("termination_message_path")
        if isinstance(path, str) and path:
            self._termination_message_path = path
        if message.get("log_format") in ("text", "json"):
            self._log.as_json = message["log_format"] == "json"

    # -- Timers -------------------------------------------------------------------------------------------------------

    @property
    def _interrupted_start(self) -> bool:
        """Whether a worker that is to stop has never served, so that no request needs its time."""
        return self._state == "STARTING" or (self._state == "CLEANUP" and not self._ready)

    def _kill_time(self) -> float | None:
        """Return when the worker is to be killed if it is not gone by then."""
        if self._level >= 3:
            return self._stop_at
        if self._stuck_at is not None:
            return self._stuck_at + _DUMP_TIME
        if self._level == 2:
            return self._forced_at + FORCED_STOP
        if self._level == 1:
            if self._interrupted_start:
                return self._stop_at + FORCED_STOP
            last = self._stop_at + self._grace - KILL_RESERVE
            return last if self._announced is None else min(self._announced, last)
        return self._announced

    def _beat_due(self) -> float | None:
        """Return when the next heartbeat is overdue."""
        if self._heartbeat_timeout <= 0 or self._state not in _WATCHED or self._stuck_at is not None:
            return None
        if self._kill_cause is not None:
            return None  # it is to end anyway
        if self._control.closed:
            return None  # it cannot tell us any more how it is
        return self._last_beat + self._heartbeat_timeout

    def _next_timer(self) -> float | None:
        timers: list[float | None] = [self._beat_due()]
        if self._kill_cause is None:
            timers.append(self._kill_time())
        if self._worker_gone_at is not None:
            timers.append(self._worker_gone_at + self._patience)
        timers.append(self._given_up_at)
        if self._closed_at is not None:
            timers.append(self._closed_at + _GUARDIAN_LIMIT)
        timers.append(self._watchdog_due())
        if self._notifier.active and self._state == "STARTING":
            timers.append(self._next_extension)
        return min((timer for timer in timers if timer is not None), default=None)

    def _pump(self, until: float | None, descriptor: int | None = None) -> None:
        """Handle what happens until a point in time, at most once."""
        now = time.monotonic()
        self._loop.pump(None if until is None else max(0.0, until - now), descriptor)
        if until is not None and (late := time.monotonic() - max(now, until)) > _LATE:
            self._last_beat += late  # we were stopped, or the whole machine: not the worker's fault

    def _wait(self, seconds: float, descriptor: int | None) -> None:
        self._pump(time.monotonic() + seconds, descriptor)

    def _act(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        beat_due = self._beat_due()
        if beat_due is not None and now >= beat_due:
            self._give_up_on(now)
        kill_time = self._kill_time()
        if kill_time is not None and now >= kill_time and self._kill_cause is None:
            if self._stuck_at is not None:
                self._kill("stuck")
            elif self._level >= 2:
                self._kill("forced")
            elif self._level == 1 and self._interrupted_start:
                self._kill("start")
            else:
                self._kill("deadline")
        if self._closed_at is not None and now >= self._closed_at + _GUARDIAN_LIMIT:
            self._closed_at = None
            if self._worker_gone_at is None and self._worker is not None and linux.is_alive(self._worker):
                self._log.warning("The worker has closed its control socket; its state and heartbeat are unknown now")
        self._tell_systemd(now)

    def _watchdog_due(self) -> float | None:
        return self._next_watchdog if self._notifier.watchdog_interval is not None else None

    def _tell_systemd(self, now: float) -> None:
        """Give systemd the sign of life it asks for, and ask for more time during a start."""
        interval = self._notifier.watchdog_interval
        if interval is not None and now >= self._next_watchdog:
            self._next_watchdog = now + interval
            if self._stuck_at is None:
                self._notifier.send("WATCHDOG=1")
        if self._notifier.active and self._state == "STARTING" and now >= self._next_extension:
            self._next_extension = now + _EXTEND_INTERVAL
            self._notifier.send(f"EXTEND_TIMEOUT_USEC={3 * _EXTEND_INTERVAL * 1e6:.0f}")

    def _give_up_on(self, now: float) -> None:
        """End a worker whose event loop does not run any more: routers first, then its stack, then itself."""
        self._stuck_at = now
        self._stuck_for = now - self._last_beat
        self._to_guardian.send("withdraw")
        dumped = self._dump_stack()
        self._log.error(
            "The worker's event loop does not run any more",
            no_heartbeat_s=self._stuck_for,
            state=self._state,
            in_flight=self._in_flight,
            stack_dump=dumped,
            next=f"killed in {_DUMP_TIME:.0f} s",
        )

    def _dump_stack(self) -> bool:
        """Have the worker print its threads' stacks (``faulthandler``); never with a signal that would end it."""
        if self._worker is None or not linux.catches(self._worker.pid, signal.SIGUSR1):
            self._log.warning("The worker does not dump its stack: it has no handler for SIGUSR1")
            return False
        return linux.send_signal(self._worker, signal.SIGUSR1)

    def _kill(self, cause: str) -> None:
        self._kill_cause = cause
        self._killed_at = self._killed_at or time.monotonic()
        self._log.warning("Killing the worker", cause=cause, state=self._state, in_flight=self._in_flight)
        if self._worker is not None:
            linux.send_signal(self._worker, signal.SIGKILL)


def _environment(directory: RunDirectory, control: int) -> dict[str, str]:
    """Return the worker's environment."""
    environment = dict(os.environ)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        environment.pop(name, None)
    for variable, name in _LASTING_CACHES:
        place = None if variable in environment else _lasting_cache(directory.base, name.format(user=_user_name()))
        if place is not None:
            environment[variable] = place
    environment.setdefault(*_NO_PRECOMPILED_HEADERS)
    environment.setdefault(interpreter.SAFE_PATH, "1")
    environment[CONTROL_FD] = str(control)
    environment[RUN_DIR] = directory.path
    environment["TMPDIR"] = directory.temporary
    return environment


def _lasting_cache(base: str, name: str) -> str | None:
    """Return a directory for a cache that is run as code, or None: then it lies in TMPDIR and ends with the worker.

    Everybody can guess its usual place, so it has to be this user's alone, and nobody else may be able to put another
    one there. It is made there only where there is no home directory, or that of another user (``sudo -E``): most
    workers compile nothing, and a worker leaves no temporary files.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    usual = os.path.join(base, name)
    lasting = os.path.join(os.path.realpath(cache), "dynamo-worker", name) if os.path.isabs(cache) else None
    for place, make in ((usual, False), (lasting, True), (usual, True)):
        if place is None:
            continue
        with contextlib.suppress(OSError):
            if make:
                os.close(make_directory(place))
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                check_place(descriptor)
                status = os.fstat(descriptor)
                if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    os.fchmod(descriptor, 0o700)
                    return real_path(descriptor)
            finally:
                os.close(descriptor)
    return None


def _user_name() -> str:
    """Return the user's name as PyTorch finds it, for the default place of its cache."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        name = os.environ.get(variable)
        if name:
            break
    else:
        import pwd

        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = str(os.getuid())
    return "".join("_" if character in '\\/:*?"<>|' else character for character in name)


def _positive(text: str, default: float) -> float:
    try:
        return _number(float(text)) or default
    except ValueError:
        return default


def _number(value: object) -> float | None:
    """Return a finite number that is not negative, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        return None
    return float(value)


def _count(value: object) -> int:
    number = _number(value)
    return 0 if number is None else int(number)


def _text(value: object) -> str:
    return value[:2000] if isinstance(value, str) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def supervise(argv: Sequence[str], *, command: Sequence[str] | None = None) -> NoReturn:
    """Run a worker under supervision and end this process with the exit code.

    At once: the interpreter's own end gives signals their default actions back, and one that came then would take the
    place of the code.

    :param argv: the command line of ``dynamo-worker``, without its name.
    :param command: what to run instead of ``python -P -m dynamo_worker --no-supervise``; ``argv`` is appended.
    """
    open_standard_streams()
    own = [*interpreter.module_command("dynamo_worker"), "--no-supervise"] if command is None else list(command)
    os._exit(Supervisor([*own, *argv], argv).run())


__all__ = ["Supervisor", "supervise"]
