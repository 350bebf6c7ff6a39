"""One run: the fleet, its clients and the faults of the plan, until the time is up; bounded, and cleaned up."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chaos_run import accounts as outcomes
from chaos_run.accounts import Accounts, Exit
from chaos_run.acts import Acts
from chaos_run.clients import Clients
from chaos_run.fleet import Engine, Fleet
from chaos_run.table import TERMINATION
from common.processes import become_subreaper
from common.report import progress
from dynamo_worker.testing.leftovers import marked_processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chaos_run.plan import Fault, Plan

#: Faults at the same time.
_AT_ONCE: Final = 6
#: Seconds of load before the first fault and after the last one.
_QUIET: Final = 3.0
#: Seconds that a fault may wait until others have let go of what it hits.
_WAIT: Final = 180.0
#: Faults that may wait while later ones go on, and seconds between two looks at them.
_WAITING: Final = 4
_POLL: Final = 0.2
#: Seconds that the end may take, until everything is killed.
_END: Final = 240.0
#: Seconds that a worker may take to stop at the end.
_STOP: Final = 40.0


@dataclass(frozen=True)
class Settings:
    """What a run consists of.

    :param seed: of all draws.
    :param minutes: of faults.
    :param workers: of each engine.
    :param rate: requests per second.
    :param slack: seconds added to each bound.
    :param first: number of the first fault.
    :param only: number of the only fault; None: all.
    :param every: seconds between two lines of progress.
    """

    seed: int
    minutes: float
    workers: int
    frontends: int
    rate: float
    slack: float
    first: int = 0
    only: int | None = None
    every: float = 15.0


class Run:
    """One run.

    :param logs: where all logs are kept; None: they are thrown away.
    """

    def __init__(self, settings: Settings, plan: Plan, engines: Sequence[Engine], logs: Path | None) -> None:
        self.settings = settings
        self._plan = plan
        self.accounts = Accounts(progress)
        self.stopping = threading.Event()
        self.skipped = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._logs = logs
        self._directory = Path(tempfile.mkdtemp(prefix="dwx-"))
        self.fleet = Fleet(self._directory, engines, settings.workers, settings.frontends, self.accounts)
        self._acts = Acts(self.fleet, self.accounts, settings.slack, self.stopping, progress)
        models = list({engine.model.name: engine.model for engine in engines}.values())
        become_subreaper()
        self.clients = Clients(self.accounts, self._urls, models, settings.rate, settings.seed)
        self._surprises = ThreadPoolExecutor(2)
        self.fleet.on_surprise = lambda slot, member: void(self._surprises.submit(self._acts.surprise, slot, member))

    def _urls(self) -> dict[str, str]:
        """Return the frontends that a load balancer knows as ready: it does not notice at once that one is going."""
        frontends = self.fleet.frontends
        return {name: frontend.url for name, frontend in frontends.items() if frontend.ready} or {
            name: frontend.url for name, frontend in frontends.items()
        }

    def play(self) -> None:
        """Start the fleet, commit faults until the time is up, and end everything."""
        last_resort = threading.Timer(self.settings.minutes * 60 + _WAIT + _END + 300, self._give_up)
        last_resort.daemon = True
        last_resort.start()
        try:
            progress(f"starting; this machine can: {', '.join(sorted(self.fleet.abilities)) or 'nothing special'}")
            self.fleet.start()
            self._play()
        finally:
            last_resort.cancel()
            self.stopping.set()
            self.fleet.close()
            self._surprises.shutdown(wait=False, cancel_futures=True)
            if self._logs is not None:
                shutil.copytree(
                    self._directory, self._logs, dirs_exist_ok=True,
                    ignore=lambda _, names: [name for name in names if not name.endswith(".log") and "." in name],
                )  # fmt: skip
            shutil.rmtree(self._directory, ignore_errors=True)

    def _give_up(self) -> None:
        progress("the run does not end: killing everything")
        self.fleet.close()
        os._exit(3)

    def _play(self) -> None:
        self.clients.start()
        for slot in self.fleet.slots.values():
            assert slot.member is not None
            self.fleet.wait_routed(slot.member)
            self.fleet.set_healthy(slot, healthy=True)
        began, used = time.monotonic(), _cpu()
        over = threading.Event()
        teller = threading.Thread(target=self._tell, args=(over,), daemon=True)
        teller.start()
        self.stopping.wait(_QUIET)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for future in self._commit_all(pool, began + self.settings.minutes * 60):
                future.result()
        self.stopping.wait(_QUIET)
        self.stopping.set()
        self.seconds = time.monotonic() - began
        progress("the time is up: stopping clients and fleet")
        if not self.clients.stop():
            self.accounts.fail("lost", time.monotonic(), f"{self.accounts.open} requests do not end")
        self.cpu_seconds = _cpu() - used
        over.set()
        teller.join()
        self._stop_fleet()

    def _faults(self) -> Iterator[Fault]:
        if self.settings.only is not None:
            return iter([self._plan.fault(self.settings.only)])
        return self._plan.faults(self.settings.first)

    def _commit_all(self, pool: ThreadPoolExecutor, end: float) -> list[Future[None]]:
        """Commit faults as they become due; those that are not permitted yet wait, while later ones go on.

        :return: what still runs when the time is up, and what has failed.
        """
        running: list[Future[None]] = []
        waiting: list[tuple[float, Fault]] = []
        faults = self._faults()
        coming = next(faults, None)
        due = time.monotonic()
        while (coming or waiting) and time.monotonic() < end and not self.stopping.is_set():
            if coming and len(waiting) < _WAITING and time.monotonic() >= due + coming.after:
                due = time.monotonic()
                waiting.append((due, coming))
                coming = next(faults, None)
            for since, fault in list(waiting):
                if self._acts.permitted(fault):
                    waiting.remove((since, fault))
                    running.append(pool.submit(self._acts.commit, fault))
                elif time.monotonic() > since + _WAIT:
                    text = f"{fault} has waited {_WAIT:g} s for a healthy fleet"
                    self.accounts.fail("recovery", time.monotonic(), text)
                    self.stopping.set()
            running = [future for future in running if not future.done() or future.exception()]
            self.stopping.wait(_POLL)
        return running

    def _tell(self, over: threading.Event) -> None:
        while not over.wait(self.settings.every):
            progress(self.line())

    def line(self) -> str:
        """Return the state of the run in one line."""
        accounts = self.accounts
        counts = ", ".join(f"{accounts.outcomes[name]} {name}" for name in outcomes.OUTCOMES if accounts.outcomes[name])
        healthy = sum(slot.healthy for slot in self.fleet.slots.values())
        failed = ", ".join(f"{count} {kind}" for kind, count in accounts.failed.items()) or "none"
        return (
            f"== {accounts.faults} faults; {accounts.requests} requests: {counts}, {accounts.open} open; "
            f"{healthy} of {len(self.fleet.slots)} workers healthy; failures: {failed}"
        )

    # --- The end

    def _stop_fleet(self) -> None:
        """Stop all workers and frontends, which must end well, and look for what the whole run has left."""
        fleet, slack = self.fleet, self.settings.slack
        members = [slot.member for slot in fleet.slots.values() if slot.member and not slot.member.ended.is_set()]
        since = time.monotonic()
        for member in members:
            member.note_segments()
            member.fault = "the end of the run"
            with contextlib.suppress(ProcessLookupError):
                member.worker.signal(signal.SIGTERM)
        for member in members:
            member.ended.wait(max(0.0, since + _STOP - time.monotonic()))
            at = member.ended_at or time.monotonic()
            code = member.worker.wait_gone(5.0) if member.ended.is_set() else None
            reason, bound = member.reason(), TERMINATION + slack
            end = Exit(member.name, member.fault, code, reason, at - since, frozenset({0}), "", bound)
            self.accounts.exited(end, None, at, member.tail())
        for frontend in fleet.frontends.values():
            frontend.program.signal(signal.SIGTERM)
        for frontend in fleet.frontends.values():
            program = frontend.program
            code = program.wait(30.0)
            at = program.ended_at or time.monotonic()
            end = Exit(frontend.name, "the end of the run", code, "", at - since, frozenset({0}), "", 60.0)
            self.accounts.exited(end, None, at, program.log_tail(30))
        time.sleep(1.0)
        left = [f"file {path}" for slot in fleet.slots.values() for path in slot.tmp.iterdir()]
        left += [f"segment {name}" for name in fleet.segments_left()]
        assert fleet.etcd is not None
        left += [f"entry {key}" for key in fleet.etcd.entries()]
        servers = {fleet.etcd.process.pid, fleet.nats.process.pid if fleet.nats else 0}
        processes = itertools.chain.from_iterable(marked_processes(marker).items() for marker in fleet.markers)
        left += [f"process {pid}: {command[-100:]}" for pid, command in processes if pid not in servers]
        self.accounts.left("the run", left, "", None, time.monotonic(), "")


def void(_: object) -> None:
    """Take what nobody waits for."""


def _cpu() -> float:
    """Return the CPU seconds of this process and of all below it that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
