"""The accounts of a run: every request, exit and leftover, and what of it is a failure. No I/O; callers pass the time.

A request is *lost* if it failed although another worker could have finished it. It is *excused* only inside an interval
that a fault has opened for requests like it: those through a frontend that was killed; those of a model whose requests
cannot move, while one of its workers dies; those without output after etcd has lost its data, until frontends know the
workers again. It is *unserved* if its model had no healthy worker at some moment of its life. Both are counted and
shown; a wrong answer is never excused.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from chaos_run.table import Row

RIGHT, REFUSED, CANCELLED = "right", "refused", "cancelled"
EXCUSED, UNSERVED, LOST, WRONG = "excused", "unserved", "lost", "wrong"
OUTCOMES: Final = (RIGHT, REFUSED, CANCELLED, EXCUSED, UNSERVED, LOST, WRONG)
#: The event with which a stream ends that the worker has refused.
_REFUSED: Final = re.compile(r'"code": ?4\d\d\b')
#: Failures whose texts are kept; all are counted.
_KEPT_FAILURES: Final = 200
#: Faults and intervals that are kept to explain requests with.
_KEPT_INTERVALS: Final = 2000


@dataclass(frozen=True)
class Asked:
    """A request as its client sent it.

    :param kind: what kind of client: ``short``, ``long``, ``slow``, ``cancelling``, ``huge`` or ``too long``.
    :param group: the model.
    :param frontend: that it was sent to last.
    :param expected: the whole text of its answer; None if that cannot be known.
    :param began: when it was sent (monotonic).
    :param refusable: whether it must be refused: it asks for more than the model can.
    """

    kind: str
    group: str
    frontend: str
    expected: str | None
    began: float
    refusable: bool = False


@dataclass(frozen=True)
class Answered:
    """What came of it.

    :param status: HTTP status; 0 without a response.
    :param text: all that was received.
    :param reason: the finish reason; None without one.
    :param error: what went wrong, as the client saw it.
    :param ended: when it ended (monotonic).
    :param cancelled: whether its client went away on purpose.
    """

    status: int
    text: str
    reason: str | None
    error: str | None
    ended: float
    cancelled: bool = False


@dataclass
class Interval:
    """A time (monotonic) in which a fault lasts, or in which requests are excused.

    :param why: the fault.
    :param where: the place, frontend or server that it hits.
    :param frontend: requests through this frontend only; empty: any.
    :param group: requests for this model only; empty: any.
    :param unbegun: only requests that have received nothing yet.
    """

    begin: float
    why: str
    where: str = ""
    frontend: str = ""
    group: str = ""
    unbegun: bool = False
    end: float = math.inf

    def contains(self, at: float) -> bool:
        """Return whether a time lies in it."""
        return self.begin <= at <= self.end


@dataclass(frozen=True)
class Exit:
    """The end of a process, and how it should have ended.

    :param name: of the process.
    :param fault: what was done to it; empty if nothing was.
    :param code: its exit code; None if it still ran when the patience was over.
    :param reason: from the last line of its log; empty if there is none.
    :param seconds: from the fault to the exit.
    :param bound: how long it may take, with the slack of a busy machine.
    """

    name: str
    fault: str
    code: int | None
    reason: str
    seconds: float
    codes: frozenset[int]
    pattern: str
    bound: float

    def problems(self) -> list[str]:
        """Return what about it the fault does not explain."""
        if not self.fault:
            return [f"ended with code {self.code} ({self.reason or 'no reason'}) although nothing was done to it"]
        found = []
        if self.code is None:
            found.append(f"still runs after {self.seconds:.1f} s, at most {self.bound:.1f} s")
        elif self.code not in self.codes:
            found.append(f"exit code {self.code} ({self.reason or 'no reason'}), expected {sorted(self.codes)}")
        elif self.pattern and not re.search(self.pattern, self.reason):
            found.append(f"reason {self.reason!r}, expected {self.pattern!r}")
        if self.code is not None and self.seconds > self.bound:
            found.append(f"exited after {self.seconds:.1f} s, at most {self.bound:.1f} s")
        return found


@dataclass(frozen=True)
class Failure:
    """One failure of the run.

    :param kind: ``lost``, ``wrong``, ``leftover``, ``exit``, ``log`` or ``recovery``.
    :param text: what happened, in one line.
    :param faults: the faults that it may come from, the likeliest first.
    :param log: the end of the log of the process concerned.
    """

    kind: str
    at: float
    text: str
    faults: tuple[str, ...] = ()
    log: str = ""


@dataclass
class RowAccount:
    """What came of one kind of fault."""

    committed: int = 0
    exits: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "committed": self.committed,
            "exits": dict(self.exits),
            "slowest": self.slowest,
            "failures": dict(self.failures),
        }


class Accounts:
    """All accounts of a run. Its methods may be called by any thread.

    :param say: prints each failure when it happens.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        self._say = say
        self.outcomes: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self.excuses: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.failed: Counter[str] = Counter()
        self.rows: dict[str, RowAccount] = defaultdict(RowAccount)
        self.tokens = 0
        self.open = 0
        self._faults: list[Interval] = []
        self._excused: list[Interval] = []
        self._healthy: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self._lock = threading.RLock()

    # --- What happens to the fleet

    def fault(self, row: Row, why: str, where: str, at: float) -> Interval:
        """Record that a fault begins; the caller sets the end of the interval."""
        with self._lock:
            self.rows[row.name].committed += 1
            return self._open(self._faults, Interval(at, why, where))

    def excuse(self, why: str, at: float, *, frontend: str = "", group: str = "", unbegun: bool = False) -> Interval:
        """Excuse requests that end badly from now on; the caller sets the end of the interval."""
        with self._lock:
            return self._open(self._excused, Interval(at, why, "", frontend, group, unbegun))

    @staticmethod
    def _open(intervals: list[Interval], interval: Interval) -> Interval:
        intervals.append(interval)
        del intervals[:-_KEPT_INTERVALS]
        return interval

    def healthy(self, group: str, count: int, at: float) -> None:
        """Record how many workers of a model are healthy from now on."""
        with self._lock:
            self._healthy[group].append((at, count))

    def always_healthy(self, group: str, begin: float, end: float) -> bool:
        """Return whether a model had a healthy worker all the time between two moments."""
        with self._lock:
            before = 0
            for at, count in self._healthy[group]:
                if at <= begin:
                    before = count
                elif at <= end and count == 0:
                    return False
            return before > 0

    def blamed(self, begin: float, end: float) -> Iterator[Interval]:
        """Yield the faults that lasted at some time between two moments, the latest first."""
        with self._lock:
            found = [fault for fault in self._faults if fault.begin <= end and fault.end >= begin]
        yield from sorted(found, key=lambda fault: -fault.begin)

    # --- Requests

    def asked(self) -> None:
        """Count a request that begins."""
        with self._lock:
            self.open += 1

    def answered(self, asked: Asked, answered: Answered) -> str:
        """Judge a request that has ended; return its outcome."""
        with self._lock:
            self.open -= 1
            self.tokens += len(answered.text)
            outcome, why = self._judge(asked, answered)
            self.outcomes[outcome] += 1
            self.kinds[asked.kind][outcome] += 1
            if why:
                self.excuses[why] += 1
        if outcome in (LOST, WRONG):
            blamed = list(self.blamed(asked.began, answered.ended))
            got = f"{len(answered.text)} of {'?' if asked.expected is None else len(asked.expected)} characters"
            text = (
                f"{outcome} {asked.kind} request for {asked.group} through {asked.frontend}, "
                f"{answered.ended - asked.began:.2f} s: status {answered.status}, {got}, "
                f"finish reason {answered.reason}, {answered.error or 'no error'}"
            )
            if outcome == WRONG and asked.expected is not None:
                text += f"; {difference(asked.expected, answered.text)}"
            self.fail(outcome, answered.ended, text, [f"{fault.why} ({_times(fault, asked)})" for fault in blamed])
        return outcome

    def _judge(self, asked: Asked, answered: Answered) -> tuple[str, str]:
        """Return the outcome, and what excuses it."""
        expected = answered.text if asked.expected is None else asked.expected
        if not expected.startswith(answered.text):
            return WRONG, ""
        if answered.cancelled:
            return CANCELLED, ""
        if asked.refusable:
            # A stream has begun by the time that the worker has refused it.
            if 400 <= answered.status < 500 or _REFUSED.search(answered.error or ""):
                return REFUSED, ""
            if answered.status == 200 and answered.error is None:
                return WRONG, ""
        elif answered.status == 200 and answered.reason is not None and answered.error is None:
            return (RIGHT if answered.text == expected else WRONG), ""
        for excuse in reversed(self._excused):
            matches = excuse.frontend in ("", asked.frontend) and excuse.group in ("", asked.group)
            if matches and excuse.contains(answered.ended) and not (excuse.unbegun and answered.text):
                return EXCUSED, excuse.why
        if not self.always_healthy(asked.group, asked.began, answered.ended):
            return UNSERVED, f"no healthy worker of {asked.group}"
        return LOST, ""

    # --- Exits and leftovers

    def exited(self, end: Exit, row: Row | None, at: float, log: str) -> list[str]:
        """Record the end of a process; return what about it is a failure."""
        problems = end.problems()
        with self._lock:
            account = self.rows[row.name if row else end.fault or "nothing"]
            account.exits[str(end.code)] += 1
            account.slowest = max(account.slowest, end.seconds)
        for problem in problems:
            self.fail("exit", at, f"{end.name}: {problem}", [end.fault] if end.fault else [], log, row)
        return problems

    def served_again(self, row: Row, seconds: float) -> None:
        """Record how long a process that goes on took to serve again."""
        with self._lock:
            account = self.rows[row.name]
            account.slowest = max(account.slowest, seconds)

    def left(self, name: str, found: Iterable[str], fault: str, row: Row | None, at: float, log: str) -> None:
        """Record what a process has left behind; each thing is a failure."""
        for thing in found:
            self.fail("leftover", at, f"{name} left {thing}", [fault] if fault else [], log, row)

    def fail(
        self, kind: str, at: float, text: str, faults: Iterable[str] = (), log: str = "", row: Row | None = None
    ) -> None:
        """Record a failure."""
        with self._lock:
            self.failed[kind] += 1
            if row is not None:
                self.rows[row.name].failures[kind] += 1
            if len(self.failures) < _KEPT_FAILURES:
                self.failures.append(Failure(kind, at, text, tuple(faults), log))
                self._say(f"FAILURE ({kind}) {text}")

    # --- Results

    @property
    def requests(self) -> int:
        """The number of requests that have ended."""
        return sum(self.outcomes.values())

    @property
    def faults(self) -> int:
        """The number of faults committed."""
        with self._lock:
            return sum(account.committed for account in self.rows.values())

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        with self._lock:
            return {
                "requests": {name: self.outcomes[name] for name in OUTCOMES},
                "requests_by_kind": {kind: dict(counts) for kind, counts in self.kinds.items()},
                "characters": self.tokens,
                "excused_by": dict(self.excuses),
                "faults": self.faults,
                "rows": {name: account.as_json() for name, account in self.rows.items()},
                "failed": dict(self.failed),
                "failures": [asdict(failure) for failure in self.failures],
            }


def _times(fault: Interval, asked: Asked) -> str:
    return f"{fault.begin - asked.began:+.2f} s after the request began"


def difference(expected: str, text: str) -> str:
    """Say where two texts begin to differ."""
    same = next(
        (i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), min(map(len, (expected, text)))
    )
    return f"differs at {same}: {text[same : same + 40]!r}, expected {expected[same : same + 40]!r}"
