"""The one routine that kills a process tree and cleans up after it. Guardian, supervisor and sweep all use it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import discovery, gpu, ledger, process_tree, shared_memory
from dynamo_worker.supervisor.frontend import Frontend
from dynamo_worker.supervisor.helper import Helper, run_here

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_worker.supervisor.linux import Process, Stat
    from dynamo_worker.supervisor.process_tree import Wait
    from dynamo_worker.supervisor.report import Log
    from dynamo_worker.supervisor.run_directory import RunDirectory

#: Seconds the whole routine may take unless an earlier deadline is set.
LIMIT = 15.0

#: Seconds the kernel gets to end a frontend that is killed at its deadline.
_FRONTEND_KILL_LIMIT = 1.0

#: Least seconds for removing the run directory.
_REMOVAL_LIMIT = 0.3

#: Most seconds a withdrawal may take, and the least that one in this process gets.
_WITHDRAWAL_LIMIT = 4.0
_SHORTEST_WITHDRAWAL = 0.3

#: Killed processes that the report names.
_MOST_NAMED = 8

#: Seconds before the next attempt to kill what is left.
_RETRY_PAUSE = 0.5

#: Seconds after a worker's end during which each start tries again to withdraw its registration. Leases end earlier.
_RETRY_FOR = 3600.0


class Withdrawal:
    """Withdraws the recorded registrations in a separate process, while the caller continues.

    :param registrations: entries of the ledger.
    :param discovery_root: see ``discovery.withdraw``.
    """

    def __init__(self, registrations: list[dict[str, Any]], log: Log, discovery_root: str | None = None) -> None:
        self._registrations = registrations
        self._log = log
        self._discovery_root = discovery_root
        self._helper: Helper | None = None
        self._outcomes: str | None = None
        if registrations:
            try:
                self._helper = Helper(self._withdraw, _WITHDRAWAL_LIMIT)
            except OSError as error:
                log.warning("Cannot fork a process to leave discovery", next="retrying after the kill", reason=error)

    @property
    def process(self) -> Process | None:
        """The helper process, if there is one."""
        return self._helper.process if self._helper is not None else None

    def make_sure(self, *, here: bool, limit: float) -> None:
        """Start now if no process could be forked before: processes killed since then made room.

        :param here: work in this process if there is still no room.
        :param limit: seconds that may take in this process.
        """
        if self._helper is not None or not self._registrations:
            return
        try:
            self._helper = Helper(self._withdraw, _WITHDRAWAL_LIMIT)
        except OSError as error:
            self._log.warning("Cannot fork a process to leave discovery", next="continuing without one", reason=error)
            if here:
                self._outcomes = run_here(self._withdraw, min(limit, _WITHDRAWAL_LIMIT))

    def result(self, wait: Wait, deadline: Callable[[], float]) -> list[str]:
        """Return one description of what was done for each registration."""
        if not self._registrations:
            return []
        text = self._helper.result(wait, deadline) if self._helper is not None else self._outcomes
        try:
            return [str(outcome) for outcome in json.loads(text or "")]
        except ValueError:
            return ["failed: no answer in time"]

    def _withdraw(self) -> str:
        deadline = time.monotonic() + _WITHDRAWAL_LIMIT
        root = self._discovery_root
        return json.dumps([discovery.withdraw(registration, deadline, root) for registration in self._registrations])


class Cleanup:
    """Withdraws, kills, waits for the GPUs, and removes shared memory and the run directory.

    :param find: returns the remaining processes of the tree.
    :param reap: reaps our own children; returns True when none is left.
    :param wait: waits for the next event.
    :param segments: the watch over shared memory; without one, the record on disk counts.
    :param rough: do not look into processes, because that may hang: the kernel locks the memory map of a process that
        is stuck in a driver. Everything is killed alike then, and shared memory is left to the next start.
    :param worker: pid of the worker if it was killed: it may have held GPU memory itself.
    :param patient: whether the frontend beside the worker gets time to finish its streams.
    :param discovery_root: the only directory in which registrations are withdrawn, for records that may be forged; see
        ``discovery.withdraw``.
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
        patient: bool = True,
        discovery_root: str | None = None,
    ) -> None:
        self._run_directory = run_directory
        self._find = find
        self._wait = wait
        self._log = log
        self._segments = segments
        self._withdrawal = withdrawal
        self._worker = worker
        self._rough = rough
        self._patient = patient
        self._discovery_root = discovery_root
        self._frontend: Frontend | None = None
        self._killing = process_tree.Killing(self._find_rest, reap, wait, spare_trackers=not rough)
        self._found: dict[str, int] = {}
        #: The record to keep for the next start, if a registration could not be withdrawn.
        self._keep: str | None = None
        self._report: dict[str, Any] = {"processes": 0, "segments": 0, "withdrawn": []}
        #: When to be done (monotonic); may change while it runs.
        self.deadline = time.monotonic() + LIMIT
        #: When the frontend has to be gone (monotonic), if that is limited; may change while it runs.
        self.frontend_deadline: float | None = None
        #: Processes that could not be killed; None while that is unknown.
        self.stuck: list[Process] | None = None

    def has_killed(self, pid: int) -> bool:
        """Return whether a process was killed here: its exit code means nothing then."""
        return any(process.pid == pid for process in self._killing.seen)

    def run(self) -> dict[str, Any]:
        """Run every step, even if an earlier one failed, and return what was done (JSON-compatible)."""
        started = time.monotonic()
        self._do(self._begin_withdrawal)
        self._do(self._ask_frontend)
        self._do(self._look_for_segments)
        self._do(self._kill)
        while self.stuck is None and time.monotonic() < self.deadline:  # out of descriptors or memory, for a moment
            self._wait(_RETRY_PAUSE, None)
            self._do(self._kill)
        self._do(self._make_sure_of_withdrawal)
        self._do(self._wait_for_gpus)
        self._do(self._remove_segments)
        self._do(self._withdraw)
        self._do(self._wait_for_frontend)
        self._do(self._remove_directory)
        self._report["seconds"] = time.monotonic() - started
        return self._report

    def _do(self, step: Callable[[], None]) -> None:
        """Run one step; a failure must not keep the others from running."""
        try:
            step()
        except Exception as error:
            what = step.__name__.strip("_").replace("_", " ")
            self._log.error("Cleaning step failed", step=what, error=f"{type(error).__name__}: {error}")

    def _begin_withdrawal(self) -> None:
        if self._withdrawal is None:
            recorded = ledger.registrations(self._run_directory.descriptor)
            self._withdrawal = Withdrawal(recorded, self._log, self._discovery_root)

    def _ask_frontend(self) -> None:
        """Ask the frontend to end with its last stream, and exclude it from the kill."""
        self._frontend = Frontend.of(self._run_directory.descriptor) if self._patient else None

    def _wait_for_frontend(self) -> None:
        """Give the frontend its time, now that everything else is released."""
        if self._frontend is None or self._frontend.wait(self._wait, lambda: self.frontend_deadline, self._log):
            return
        self._frontend = None
        self.deadline = max(self.deadline, time.monotonic() + _FRONTEND_KILL_LIMIT)
        self._kill()

    def _look_for_segments(self) -> None:
        """Find out which shared memory the tree uses, while there still is a tree."""
        recorded = self._segments.recorded if self._segments is not None else None
        self._found.update(ledger.read_segments(self._run_directory.descriptor) if recorded is None else recorded)
        if not self._rough:
            self._found.update(shared_memory.in_use(self._killing.freeze(), self._run_directory.made_at))

    def _kill(self) -> None:
        started = time.monotonic()
        self.stuck = self._killing.run(lambda: self.deadline)
        self._report["processes"] = len(self._killing.seen)
        named = list(self._killing.seen.items())[:_MOST_NAMED]
        self._report["killed"] = [f"{process.pid} ({name})" for process, name in named]
        self._report["gone_after"] = time.monotonic() - started
        if self.stuck:
            self._report["unkillable"] = [process_tree.describe(process) for process in self.stuck]
            self._log.error(
                "Processes survived SIGKILL; the machine may need a restart", processes=self._report["unkillable"]
            )

    def _make_sure_of_withdrawal(self) -> None:
        if self._withdrawal is not None:
            limit = max(self.deadline - time.monotonic(), _SHORTEST_WITHDRAWAL)
            self._withdrawal.make_sure(here=not self._rough, limit=limit)

    def _remove_segments(self) -> None:
        if not self._rough:
            self._report["segments"] = len(shared_memory.remove_unused(self._found.items()))

    def _withdraw(self) -> None:
        if self._withdrawal is None:
            return
        self._report["withdrawn"] = self._withdrawal.result(self._wait, lambda: self.deadline)
        for outcome in self._report["withdrawn"]:
            if ": failed" in outcome or outcome.startswith("failed"):
                if self._patient or self._run_directory.untouched_for < _RETRY_FOR:
                    self._keep = ledger.LEDGER
                then = "the next start on this machine tries again" if self._keep else "it ends with its lease"
                self._log.warning("Registration not withdrawn", outcome=outcome, next=then)

    def _remove_directory(self) -> None:
        path = self._run_directory.path
        limit = max(self.deadline, time.monotonic() + _REMOVAL_LIMIT)
        if self.stuck is None or self.stuck:
            problems = [f"{path}: left for the next start, because processes survived"]
        elif self._rough and self._found:
            problems = [f"{path}: left for the next start, because shared memory may remain"]
        else:
            problems = self._run_directory.remove(limit, keep=self._keep)
        if problems:
            self._log.warning("Run directory not removed", path=path, reason="; ".join(problems[:3]))

    def _find_rest(self) -> Mapping[Process, Stat]:
        """Return what is left of the tree, except our own helper and a frontend that may finish its streams."""
        helper = self._withdrawal.process if self._withdrawal is not None else None
        frontend = self._frontend.process if self._frontend is not None else None
        return {process: stat for process, stat in self._find().items() if process not in (helper, frontend)}

    def _wait_for_gpus(self) -> None:
        """Wait until the driver has released the memory of the killed processes."""
        killed = {process.pid for process in self._killing.seen}
        if self._worker is not None:
            killed.add(self._worker)
        if not killed or not gpu.present():
            return
        deadline = min(time.monotonic() + gpu.LIMIT, self.deadline - 0.1)

        def wait_released() -> str:
            try:
                return gpu.wait_released(gpu.Nvml(), killed, deadline, same_pids=gpu.pids_are_the_hosts())
            except (OSError, AttributeError) as error:  # no driver, or one that lacks a function
                return f"unknown: {error}"

        limit = max(0.1, deadline - time.monotonic())
        try:
            helper = Helper(wait_released, limit + 0.2)
        except OSError as error:
            self._log.warning("Cannot fork a process to watch the GPUs", next="continuing without one", reason=error)
            result = None if self._rough else run_here(wait_released, limit)
        else:
            result = helper.result(self._wait, lambda: min(deadline + 0.1, self.deadline))
        self._report["gpu"] = result or "no answer from the driver"
