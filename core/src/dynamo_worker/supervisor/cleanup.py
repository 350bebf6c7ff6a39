"""The one routine that takes a tree down and cleans up behind it; guardian, supervisor and sweep all use it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import discovery, gpu, ledger, process_tree, shared_memory
from dynamo_worker.supervisor.helper import Helper

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_worker.supervisor.linux import Process, Stat
    from dynamo_worker.supervisor.process_tree import Wait
    from dynamo_worker.supervisor.report import Log
    from dynamo_worker.supervisor.run_directory import RunDirectory

#: Longest time the whole routine may take when nobody sets a nearer deadline.
LIMIT = 15.0

#: Time that the removal of the run directory gets in any case.
_REMOVAL_LIMIT = 0.3

#: Longest time a withdrawal may take.
_WITHDRAWAL_LIMIT = 4.0


class Withdrawal:
    """Takes the recorded registrations back, in a process of its own, while the caller goes on.

    :param registrations: entries of the ledger.
    """

    def __init__(self, registrations: list[dict[str, Any]]) -> None:
        deadline = time.monotonic() + _WITHDRAWAL_LIMIT

        def withdraw() -> str:
            return json.dumps([discovery.withdraw(registration, deadline) for registration in registrations])

        self._helper = Helper(withdraw, _WITHDRAWAL_LIMIT) if registrations else None

    @property
    def process(self) -> Process | None:
        """The process that does it, if one was needed."""
        return self._helper.process if self._helper is not None else None

    def result(self, wait: Wait, deadline: Callable[[], float]) -> list[str]:
        """Return what was done, in words, one for each registration."""
        if self._helper is None:
            return []
        text = self._helper.result(wait, deadline)
        try:
            return [str(outcome) for outcome in json.loads(text or "")]
        except ValueError:
            return ["failed: no answer in time"]


class Cleanup:
    """Withdraws, kills, waits for the GPUs, and removes shared memory and the run directory.

    :param find: returns the processes that are left of the tree.
    :param reap: reaps our own children; returns True when none is left.
    :param wait: waits for the next thing to happen.
    :param segments: the watch over shared memory, where there is one; else the record counts.
    :param rough: look into no process, because that may hang: the kernel locks the memory map of a process that is
        stuck in a driver. Then everything is killed alike, and shared memory is left to the next start.
    :param worker: pid of the worker if it was killed: it may have held GPU memory itself.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        *,
        find: Callable[[], Mapping[Process, Stat]],
        reap: Callable[[], bool],
        wait: Wait,
        log: Log,
        segments: shared_memory.SegmentWatch | None = None,
        withdrawal: Withdrawal | None = None,
        worker: int | None = None,
        rough: bool = False,
    ) -> None:
        self._run_directory = run_directory
        self._find = find
        self._reap = reap
        self._wait = wait
        self._log = log
        self._segments = segments
        self._withdrawal = withdrawal
        self._worker = worker
        self._rough = rough
        #: When to be done (monotonic); may be moved while it runs.
        self.deadline = time.monotonic() + LIMIT

    def run(self) -> dict[str, Any]:
        """Do it all, each step whatever became of the one before, and return what was done (JSON-compatible)."""
        started = time.monotonic()
        report: dict[str, Any] = {}
        problems: list[str] = []
        path = self._run_directory.path
        if self._withdrawal is None:
            self._withdrawal = Withdrawal(ledger.registrations(path))
        killing = process_tree.Killing(self._find_rest, self._reap, self._wait, spare_trackers=not self._rough)
        segments = dict(self._segments.recorded if self._segments is not None else ledger.read_segments(path))
        if not self._rough:
            segments.update(shared_memory.in_use(killing.freeze(), self._run_directory.made_at))
        stuck = killing.run(lambda: self.deadline)
        report["processes"] = len(killing.seen)
        report["gone_after"] = time.monotonic() - started
        if stuck:
            report["unkillable"] = [process_tree.describe(process) for process in stuck]
            self._log.error(
                "Processes survive SIGKILL; the machine may have to be restarted", processes=report["unkillable"]
            )
        held = self._wait_for_gpus({process.pid for process in killing.seen})
        if held:
            report["gpu"] = held
        report["segments"] = 0 if self._rough else len(shared_memory.remove_unused(segments.items()))
        report["withdrawn"] = self._withdrawal.result(self._wait, lambda: self.deadline)
        for outcome in report["withdrawn"]:
            if ": failed" in outcome or outcome.startswith("failed"):
                self._log.warning("Registration not withdrawn; it ends with its lease", outcome=outcome)
        if stuck:
            problems.append(f"{path}: left for the next start, because processes are left")
        elif self._rough and segments:
            problems.append(f"{path}: left for the next start, because shared memory may be left")
        else:
            problems += self._run_directory.remove(max(self.deadline, time.monotonic() + _REMOVAL_LIMIT))
        if problems:
            report["problems"] = problems
            self._log.warning("Run directory not removed", path=path, reason="; ".join(problems[:3]))
        report["seconds"] = time.monotonic() - started
        return report

    def _find_rest(self) -> Mapping[Process, Stat]:
        """Return what is left of the tree, without our own helper."""
        helper = self._withdrawal.process if self._withdrawal is not None else None
        return {process: stat for process, stat in self._find().items() if process != helper}

    def _wait_for_gpus(self, killed: set[int]) -> str | None:
        """Wait until the driver has taken the killed processes' memory back."""
        if self._worker is not None:
            killed.add(self._worker)
        if not killed or not gpu.present():
            return None
        deadline = min(time.monotonic() + gpu.LIMIT, self.deadline - 0.1)

        def wait_released() -> str:
            try:
                return gpu.wait_released(gpu.Nvml(), killed, deadline, same_pids=gpu.pids_are_the_hosts())
            except (OSError, AttributeError) as error:  # no driver, or one that lacks a function
                return f"unknown: {error}"

        helper = Helper(wait_released, max(0.1, deadline - time.monotonic()) + 0.2)
        return helper.result(self._wait, lambda: min(deadline + 0.1, self.deadline)) or "no answer from the driver"
