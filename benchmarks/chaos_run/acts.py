"""Commits the faults of the plan: does what a row says, waits for what must follow, and repairs the fleet."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from chaos_run.accounts import Exit
from chaos_run.table import BY_NAME, FRONTEND, SERVER, WORKER
from chaos_run.worker_acts import ACTS, Scene
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.testing import eventually
from dynamo_worker.testing.fault_table import DEBOUNCE
from dynamo_worker.testing.leftovers import marked_processes
from dynamo_worker.testing.random_round import GUARDIAN_TROUBLE, TROUBLE

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from chaos_run.accounts import Accounts, Interval
    from chaos_run.fleet import Fleet, Member, Slot
    from chaos_run.plan import Fault
    from chaos_run.servers import Frontend

#: Seconds after an exit until nothing may be left, and in which requests still learn of it.
_LEFT_SECONDS: Final = 3.0
_NEWS_SECONDS: Final = 1.5
#: Seconds until frontends have seen what is in etcd again.
_SEEN_SECONDS: Final = 5.0
#: Seconds after the return of etcd and the start of the next worker until no entry may be left.
_ENTRIES_SECONDS: Final = 10.0
#: Seconds that a worker which does not end gets beyond its bound, to see how late it is.
_LATE_SECONDS: Final = 15.0
#: The row that leaves everything to the next start.
_ORPHANED: Final = BY_NAME["supervisor and guardian killed"]
#: What a worker says whose record is left to the next start.
_NOT_WITHDRAWN: Final = "Registration not withdrawn"
_STOP: Final = BY_NAME["stop"]
_UPGRADE: Final = BY_NAME["rolling upgrade"]
#: What is done to an additional worker.
_STARTS: Final = "during the start"


class Acts:
    """Commits faults, each in a thread of its own.

    :param slack: seconds added to each bound: this machine does other things, too.
    :param say: prints a line.
    """

    def __init__(
        self, fleet: Fleet, accounts: Accounts, slack: float, stopping: threading.Event, say: Callable[[str], None]
    ) -> None:
        self._fleet = fleet
        self._accounts = accounts
        self._slack = slack
        self._stopping = stopping
        self._say = say

    # --- Permission

    def permitted(self, fault: Fault) -> bool:
        """Claim what a fault hits; return False while that is busy, or while nobody else could take its requests."""
        fleet = self._fleet
        if fault.row.hits == SERVER:
            return fleet.server_busy.acquire(blocking=False)
        if fault.row.hits == FRONTEND:
            others = [frontend for name, frontend in fleet.frontends.items() if name != fault.victim]
            if any(other.busy.locked() for other in others):
                return False
            return fleet.frontends[fault.victim].busy.acquire(blocking=False)
        slot = fleet.slots[fault.victim]
        if slot.member is None or not slot.healthy or not slot.busy.acquire(blocking=False):
            return False
        if fleet.others_healthy(slot):
            return True
        slot.busy.release()
        return False

    def commit(self, fault: Fault) -> None:
        """Commit a permitted fault, and let go of what it has claimed."""
        began = time.monotonic()
        interval = self._accounts.fault(fault.row, str(fault), fault.victim or fault.row.name, began)
        failed = sum(self._accounts.failed.values())
        claimed: threading.Lock | None = self._claimed(fault)
        try:
            if fault.row.hits == SERVER:
                self._hit_server(fault)
            elif fault.row.hits == FRONTEND:
                self._hit_frontend(fault, self._fleet.frontends[fault.victim], interval)
            elif fault.row is _UPGRADE:
                claimed = None  # it lets go of each place in turn
                self._upgrade(fault, self._fleet.slots[fault.victim])
            else:
                self._hit_worker(fault, self._fleet.slots[fault.victim], interval)
        except AssertionError as error:
            self._accounts.fail("recovery", time.monotonic(), f"{fault}: {error}", [str(fault)], row=fault.row)
            if fault.row.hits == WORKER and claimed is not None:
                self._repair(self._fleet.slots[fault.victim])
        finally:
            if interval.end > time.monotonic():
                interval.end = time.monotonic() + _NEWS_SECONDS
            if claimed is not None:
                claimed.release()
        new = sum(self._accounts.failed.values()) - failed
        self._say(f"{fault}, {time.monotonic() - began:.1f} s" + (f"  {new} FAILURES meanwhile" if new else ""))

    def _claimed(self, fault: Fault) -> threading.Lock:
        if fault.row.hits == SERVER:
            return self._fleet.server_busy
        if fault.row.hits == FRONTEND:
            return self._fleet.frontends[fault.victim].busy
        return self._fleet.slots[fault.victim].busy

    # --- Workers

    def _hit_worker(self, fault: Fault, slot: Slot, interval: Interval) -> None:
        row = fault.row
        additional = row.name.endswith(_STARTS)
        target = self._fleet.launch(slot, fault.mode) if additional else slot.member
        assert target is not None
        target.note_segments()
        if row.codes:
            target.fault = str(fault)
        if not additional:
            self._fleet.set_healthy(slot, healthy=False)
        excuse = None
        if row.codes and not row.drains and not slot.engine.moves:
            excuse = self._accounts.excuse(row.name, time.monotonic(), group=slot.place.group)
        try:
            with contextlib.ExitStack() as stack:
                scene = Scene(self._fleet, slot, target, fault, stack, self._slack)
                since = ACTS[row.name](scene)
                if row.codes:
                    self._await_end(fault, target, since, late=scene.late)
        finally:
            now = time.monotonic()
            interval.end = now + _NEWS_SECONDS
            if excuse is not None:
                excuse.end = now + _NEWS_SECONDS
        if not row.codes:
            self._accounts.served_again(row, time.monotonic() - since)
            self._fleet.set_healthy(slot, healthy=not target.ended.is_set())
        elif additional:
            self._search_beside(fault, slot, target, since)
        else:
            self._replace(fault, slot, target, since)

    def _repair(self, slot: Slot) -> None:
        """Replace all workers of a place after a failure: the run goes on."""
        for member in list(slot.living):
            member.fault = member.fault or "killed after a failure"
            self._kill(member)
            slot.living.remove(member)
        slot.member = None
        if self._stopping.is_set():
            return
        with contextlib.suppress(AssertionError):
            slot.member = self._fleet.launch(slot, "complete")
            slot.member.worker.wait_ready()
            self._fleet.wait_routed(slot.member)
            self._fleet.set_healthy(slot, healthy=True)

    def _await_end(self, fault: Fault, target: Member, since: float, *, late: bool = False) -> None:
        """Wait until a worker has ended, judge its end, and kill it if it does not come.

        :param late: whether it may have ended well before the fault had an effect.
        """
        row, bound = fault.row, fault.row.bound + self._slack
        ended = target.ended.wait(max(0.0, since + bound + _LATE_SECONDS - time.monotonic()))
        at = target.ended_at or time.monotonic()
        code = target.worker.wait_gone(5.0) if ended else None
        reason = ""
        if row.reason:
            with contextlib.suppress(AssertionError):  # a guardian that outlives its supervisor writes the last line
                eventually(lambda: target.reason(), _LEFT_SECONDS, "the reason", 0.1)
            reason = target.reason()
        pattern = row.reason.replace("{signal}", fault.signal)
        codes = row.codes
        if late and code == int(ExitCode.STOPPED):
            codes, pattern = codes | {code}, ""
        end = Exit(target.name, str(fault), code, reason, at - since, codes, pattern, bound)
        self._accounts.exited(end, row, at, target.tail())
        if not ended:
            self._kill(target)

    def _kill(self, member: Member) -> None:
        for pid in marked_processes(member.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        member.ended.wait(10.0)

    def _replace(self, fault: Fault | None, slot: Slot, dead: Member, since: float) -> None:
        """Search for what a worker has left, and put the next one in its place.

        What nobody could clean up, or withdraw from an etcd that was away, is left to the next one.
        """
        orphaned = (fault is not None and fault.row is _ORPHANED) or self._indebted(dead, since)
        if not orphaned:
            self._search(fault, slot, dead, since, None)
        if self._stopping.is_set() and not orphaned:
            slot.member = None
            return
        heir = self._fleet.launch(slot, fault.mode if fault else "complete")
        heir.worker.wait_ready()
        slot.member = heir
        if orphaned:
            self._search(fault, slot, dead, since, heir)
        else:
            self._entries(fault, dead, _ENTRIES_SECONDS)
        if not self._stopping.is_set():
            self._fleet.wait_routed(heir)
        self._fleet.set_healthy(slot, healthy=True)

    def _indebted(self, dead: Member, since: float) -> bool:
        """Return whether a worker could not withdraw its entries from an etcd that was away, and has left a record."""
        return self._fleet.outages.away_since(since) and _NOT_WITHDRAWN in dead.worker.log

    def _search_beside(self, fault: Fault, slot: Slot, dead: Member, since: float) -> None:
        """Search for what a worker has left in a place that has another one; start one more if that has to clean."""
        if not self._indebted(dead, since):
            self._search(fault, slot, dead, since, None)
            return
        heir = self._fleet.launch(slot, fault.mode)
        heir.fault = "stopped once it had cleaned up"
        heir.worker.wait_ready()
        self._search(fault, slot, dead, since, heir)
        stopped = time.monotonic()
        heir.worker.signal(signal.SIGTERM)
        heir.ended.wait(_STOP.bound + self._slack)
        self._search(fault, slot, heir, stopped, None)

    def _search(self, fault: Fault | None, slot: Slot, dead: Member, since: float, heir: Member | None) -> None:
        """Search for everything that a worker has left; its entries only if etcd has answered since the fault.

        :param heir: the worker that had to clean up.
        """
        until = time.monotonic() + _LEFT_SECONDS + self._slack
        while (left := self._fleet.left_by(slot, dead)) and time.monotonic() < until:
            time.sleep(0.1)
        row, cause = (fault.row, str(fault)) if fault else (None, "")
        self._accounts.left(dead.name, left, cause, row, time.monotonic(), dead.tail())
        calm = not self._fleet.outages.away_since(since)
        if heir is not None or calm:
            self._entries(fault, dead, _LEFT_SECONDS + self._slack)
        self._check_log(fault, dead, calm=calm)
        if left:
            self._kill(dead)
        slot.living.remove(dead)

    def _entries(self, fault: Fault | None, dead: Member, seconds: float) -> None:
        """Check that a worker's entries leave etcd within some seconds in which that answers."""
        left: list[str] = []

        def gone() -> bool:
            nonlocal left
            try:
                left = self._fleet.entries_of(dead)
            except OSError:
                return False
            return not left

        row, cause = (fault.row, str(fault)) if fault else (None, "")
        deadline = time.monotonic() + seconds
        while not gone():
            answers = self._fleet.outages.answers_since
            if answers is None:
                deadline = time.monotonic() + seconds
            elif time.monotonic() > max(deadline, answers + seconds):
                things = [f"entry {key}" for key in left]
                self._accounts.left(dead.name, things, cause, row, time.monotonic(), dead.tail())
                return
            time.sleep(0.2)

    def _check_log(self, fault: Fault | None, dead: Member, *, calm: bool) -> None:
        """Look for lines that no fault explains.

        :param calm: whether etcd was there all the time.
        """
        row, log = (fault.row if fault else None), dead.worker.log
        troubles = list(TROUBLE) if calm else []
        if row is None or "guardian" not in row.name:
            troubles += GUARDIAN_TROUBLE
        for trouble in troubles:
            if trouble in log:
                line = next(line for line in log.splitlines() if trouble in line)
                causes = [str(fault)] if fault else []
                self._accounts.fail("log", time.monotonic(), f"{dead.name} said {line!r}", causes, dead.tail(), row)

    def surprise(self, slot: Slot, dead: Member) -> None:
        """Record the end of a worker to which nothing was done, and replace it."""
        at = dead.ended_at or time.monotonic()
        code = dead.worker.wait_gone(5.0)
        blamed = ", ".join(interval.why for interval in self._accounts.blamed(at - 15.0, at))
        end = Exit(dead.name, "", code, dead.reason(), 0.0, frozenset(), "", 0.0)
        self._accounts.exited(end, None, at, f"faults at the time: {blamed or 'none'}\n{dead.tail()}")
        with slot.busy:
            if slot.member is dead:
                slot.member = None
                with contextlib.suppress(AssertionError):
                    self._replace(None, slot, dead, at)

    def _upgrade(self, fault: Fault, first: Slot) -> None:
        """Replace the workers of an engine one after the other, each by one that serves already."""
        for slot in self._fleet.slots.values():
            if slot.engine is not first.engine:
                continue
            if slot is not first:
                slot.busy.acquire()
            try:
                if not self._stopping.is_set() and slot.member is not None:
                    self._upgrade_one(fault, slot, slot.member)
            except AssertionError as error:
                self._accounts.fail("recovery", time.monotonic(), f"{fault}: {error}", [str(fault)], row=fault.row)
            finally:
                slot.busy.release()

    def _upgrade_one(self, fault: Fault, slot: Slot, old: Member) -> None:
        new = self._fleet.launch(slot, fault.mode)
        new.worker.wait_ready()
        self._fleet.wait_routed(new)
        old.note_segments()
        old.fault = str(fault)
        slot.member = new
        self._fleet.set_healthy(slot, healthy=True)
        since = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            old.worker.signal(signal.SIGTERM)
        self._await_end(fault, old, since)
        self._search_beside(fault, slot, old, since)

    # --- Frontends

    def _hit_frontend(self, fault: Fault, frontend: Frontend, interval: Interval) -> None:
        row, program = fault.row, frontend.program
        since = time.monotonic()
        if not row.codes:
            program.signal(signal.SIGSTOP)
            time.sleep(fault.seconds)
            program.signal(signal.SIGCONT)
            eventually(frontend.answers, row.bound + self._slack, f"{frontend.name} to answer", 0.1)
            self._accounts.served_again(row, time.monotonic() - since)
            return
        excuse = None
        if row.name != "frontend stopped by SIGTERM":
            # Nobody can finish a stream whose connection is gone.
            excuse = self._accounts.excuse(row.name, since, frontend=frontend.name)
        if row.name == "frontend killed":
            program.signal(signal.SIGKILL)
        else:
            program.signal(signal.SIGTERM)
        if row.name == "frontend gets a second signal":
            time.sleep(DEBOUNCE + fault.moment)
            since = program.signal(signal.SIGTERM)
        program.wait(row.bound + self._slack + _LATE_SECONDS)
        at = program.ended_at or time.monotonic()
        if excuse is not None:
            excuse.end = at + _NEWS_SECONDS
        interval.end = at + _NEWS_SECONDS
        end = Exit(frontend.name, str(fault), program.code, "", at - since, row.codes, "", row.bound + self._slack)
        self._accounts.exited(end, row, at, program.log_tail(30))
        if program.running:
            program.signal(signal.SIGKILL)
            program.wait(5.0)
        frontend.start()
        frontend.wait_models(self._fleet.models)

    # --- Servers

    def _hit_server(self, fault: Fault) -> None:
        fleet, row = self._fleet, fault.row
        server = fleet.nats if row.needs == "nats" else fleet.etcd
        assert server is not None
        of_etcd = server is fleet.etcd
        excuse = None
        if of_etcd:
            fleet.outages.begin()
        since = time.monotonic()
        if row.name.endswith("stopped"):
            server.pause()
            time.sleep(fault.seconds)
            server.resume()
        else:
            server.kill()
            time.sleep(fault.seconds)
            if row.name == "etcd emptied":
                assert fleet.etcd is not None
                fleet.etcd.forget()
                # Frontends see an empty etcd, perhaps before the workers do, and know none until both have seen all.
                excuse = self._accounts.excuse(row.name, time.monotonic(), unbegun=True)
            server.start()
        if of_etcd:
            fleet.outages.end()
            back = time.monotonic()
            try:
                eventually(lambda: not self._missing(), row.bound + self._slack, "all workers to be in etcd again", 0.3)
            finally:
                if excuse is not None:
                    excuse.end = time.monotonic() + _SEEN_SECONDS
            self._accounts.served_again(row, time.monotonic() - back)
        else:
            self._accounts.served_again(row, time.monotonic() - since)

    def _missing(self) -> list[str]:
        """Return the healthy workers to which nothing is being done, and that have no entry in etcd."""
        members = [slot.member for slot in self._fleet.slots.values() if slot.healthy and not slot.busy.locked()]
        try:
            return [member.name for member in members if member and not self._fleet.entries_of(member)]
        except OSError as error:
            return [f"etcd: {error}"]
