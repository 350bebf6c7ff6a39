"""The faults of a random round, drawn from a seed, and the exit codes that the documentation allows for them."""

from __future__ import annotations

import calendar
import random
import re
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_worker.exit_codes import SIGNAL_BASE, ExitCode
from dynamo_worker.testing.limits import AMOUNTS

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Moments in the life of a worker, in order.
MOMENTS = ("start", "idle", "busy", "grace", "draining", "cleanup")
#: Processes of every worker; added to these are the subject's own, and the embedded frontend if there is one.
OWNERS = ("supervisor", "guardian", "worker")
DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
#: SIGKILL and SIGTERM are drawn more often, because they are the most common in practice.
_SIGNALS = (*DEADLY, *STOPPING, signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)

#: Termination grace period, heartbeat timeout and grace period of the worker under test, in seconds.
TERMINATION, HEARTBEAT, GRACE = 12.0, 4.0, 0.6
#: Uncertainty of the times in the log, in seconds: lines are written slightly late.
_MARGIN = 0.15


@dataclass(frozen=True)
class Hit:
    """One signal to one process.

    :param after: delay after the previous hit, in seconds.
    :param stopped: time between SIGSTOP and SIGCONT, in seconds; 0 for other signals.
    """

    victim: str
    number: signal.Signals
    after: float
    stopped: float = 0.0

    def __str__(self) -> str:
        stopped = f" for {self.stopped:.2f} s" if self.stopped else ""
        return f"{self.number.name}{stopped} to {self.victim} after {self.after:.3f} s"


@dataclass(frozen=True)
class Draw:
    """The plan of one round.

    :param fraction: the moment during startup, as a fraction of the usual startup time.
    :param amount: amount of the limited resource from the start on; None if it runs short with the first hit.
    :param frontend: whether the worker has an embedded frontend.
    """

    seed: int
    number: int
    moment: str
    fraction: float
    hits: tuple[Hit, ...]
    limit: str
    amount: int | None
    drain: str
    frontend: bool

    def __str__(self) -> str:
        where = f"{self.moment} ({self.fraction:.2f})" if self.moment == "start" else self.moment
        limit = f", {self.limit} {'short' if self.amount is None else self.amount}" if self.limit != "none" else ""
        frontend = ", frontend" if self.frontend else ""
        return f"{where}, {self.drain}{frontend}{limit}: {'; '.join(map(str, self.hits))}"


def draw(seed: int, number: int, processes: Sequence[str], stall_timeout: float) -> Draw:
    """Draw one round.

    :param processes: names of the engine's own processes.
    :param stall_timeout: time in seconds after which a stall is detected; some suspensions last longer.
    """
    rng = random.Random(f"{seed}/{number}")
    moment = rng.choice(MOMENTS)
    frontend = rng.random() < 0.3
    victims = [*OWNERS, *processes, *(["frontend"] if frontend else [])]
    hits = []
    for position in range(rng.choice((1, 2))):
        chosen = rng.choice(_SIGNALS)
        after = rng.choice((0.0, 0.001, 0.02, rng.uniform(0, 0.3))) if position else rng.uniform(0, 0.3)
        if moment == "cleanup":
            after /= 10
        long = rng.random() < 0.1
        stopped = rng.uniform(1.5, 1.8) * max(HEARTBEAT, stall_timeout) if long else rng.uniform(0.01, 0.8)
        hits.append(Hit(rng.choice(victims), chosen, after, stopped if chosen == signal.SIGSTOP else 0.0))
    if rng.random() < 0.05:  # no process is left to clean up: the next start has to
        hits = [Hit("supervisor", signal.SIGKILL, hits[0].after), Hit("guardian", signal.SIGKILL, 0.0)]
    limit = rng.choice(tuple(AMOUNTS)) if rng.random() < 0.35 else "none"
    return Draw(
        seed=seed,
        number=number,
        moment=moment,
        fraction=rng.uniform(0, 1.1),
        hits=tuple(hits),
        limit=limit,
        amount=rng.choice(AMOUNTS[limit]),
        drain=rng.choice(("complete", "complete", "handoff")),
        frontend=frontend,
    )


#: Exit codes of a worker that is short of a resource: it cannot start, or cannot continue.
_SHORT = {int(ExitCode.FATAL), int(ExitCode.START_FAILED)}
#: Native libraries abort the process when an allocation fails.
_ABORTED = _SHORT | {SIGNAL_BASE + number for number in DEADLY}


def codes_of(hit: Hit, stage: str, stall_timeout: float, *, again: bool) -> set[int]:
    """Return the exit codes that the documentation allows for a single hit.

    :param stage: stage of the worker at that time, see :func:`stages_between`.
    :param again: whether a stop was requested before.
    """
    stopped, fatal, number = int(ExitCode.STOPPED), int(ExitCode.FATAL), SIGNAL_BASE + hit.number
    over = {stopped} if stage in ("cleanup", "ended") else set()
    if hit.number == signal.SIGSTOP:
        bound = {"supervisor": None, "guardian": None, "worker": HEARTBEAT, "frontend": 1.0}.get(
            hit.victim, stall_timeout
        )
        if bound is None or hit.stopped < 0.4 * bound:
            return {stopped}
        # The stall may or may not be detected, and a suspended worker may miss its shutdown deadline.
        return {stopped, fatal, int(ExitCode.START_FAILED), int(ExitCode.DEADLINE)}
    if hit.victim in ("supervisor", "worker") and hit.number in STOPPING:
        if stage == "fork" or (stage == "exec" and hit.victim == "worker"):
            # No handler is installed yet; Python turns SIGINT into KeyboardInterrupt.
            return {number, *_SHORT} if hit.number == signal.SIGINT else {number}
        if again:  # forced, too late to be forced, or debounced
            return {stopped, number}
        return ({number} | over) if hit.number == signal.SIGQUIT else {stopped}
    if hit.victim == "supervisor":
        return {number, stopped} if stage == "ended" else {number}
    if hit.victim == "guardian":
        return {fatal} | over if hit.number in DEADLY else {stopped}
    if hit.victim == "worker":
        return {number} | over
    if hit.victim == "frontend" and stage == "draining":
        over = {stopped}  # it has been told to stop by then
    died = {int(ExitCode.START_FAILED) if stage in ("fork", "exec", "start") else fatal} | over
    # The subject's own processes and the frontend may ignore signals other than deadly ones.
    return died if hit.number in DEADLY else died | {stopped}


def allowed(limit: str, hits: Sequence[tuple[Hit, set[str]]], stall_timeout: float, *, stop_asked: bool) -> set[int]:
    """Return all exit codes that the documentation allows for a round.

    :param limit: name of the resource that ran short.
    :param hits: the hits that reached their victims, each with the possible stages of the worker at that time.
    :param stop_asked: whether a stop was requested before the first hit.
    """
    codes = {int(ExitCode.STOPPED)}
    again, certain = stop_asked, False
    for hit, stages in hits:
        own = set().union(*(codes_of(hit, stage, stall_timeout, again=again) for stage in stages))
        codes |= own
        certain = certain or int(ExitCode.STOPPED) not in own
        again = again or (hit.victim in ("supervisor", "worker") and hit.number in STOPPING)
    if certain:
        codes.discard(int(ExitCode.STOPPED))
    if limit != "none":
        codes |= _ABORTED if limit == "memory" else _SHORT
    return codes


#: The log messages that mark the beginning of each stage.
STAGES = {
    "exec": r"Worker started",
    "start": r"Starting worker",
    "serving": r"Worker ready",
    "grace": r"Grace period",
    "draining": r"Draining",
    "cleanup": r"Cleaning up worker",
    "ended": r"Worker process ends|Worker stopped|Worker not started",
}


def stages_between(log: str, since: float, until: float) -> set[str]:
    """Return the stages in which a worker may have been during an interval.

    :param log: its complete log in text format.
    :param since: beginning of the interval, in seconds since the epoch.
    :param until: end of the interval, in seconds since the epoch.
    """
    begins = [("fork", 0.0)]
    for stage, pattern in STAGES.items():
        match = re.search(rf"^(\S+)\.(\d{{3}})Z \w+ dynamo_worker\S*: (?:{pattern})", log, re.MULTILINE)
        if match:
            seconds = calendar.timegm(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))
            begins.append((stage, seconds + int(match[2]) / 1000))
    ends = [begin for _, begin in begins[1:]] + [float("inf")]
    return {
        stage
        for (stage, begin), end in zip(begins, ends, strict=True)
        if begin - _MARGIN <= until and since <= end + _MARGIN
    }
