"""The plan: which fault hits what, and when. A pure function of the seed, the fleet and the fault's number. No I/O."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chaos_run.table import FRONTEND, SERVER, TABLE, Row

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

#: Signals that are drawn for the rows that leave the choice.
_STOPS: Final = ("SIGTERM", "SIGTERM", "SIGINT", "SIGHUP")
_CRASHES: Final = ("SIGSEGV", "SIGABRT")
#: Seconds for which a process pauses, and a server is away: less than what the worker's settings tolerate.
_PAUSES: Final = (0.2, 2.5)
_OUTAGES: Final = (1.0, 6.0)


@dataclass(frozen=True)
class Place:
    """One place of the fleet, where a worker runs and is replaced when it ends.

    :param name: ``KIND-NUMBER``.
    :param group: the model that it serves.
    :param processes: names of its engine's own processes.
    """

    name: str
    group: str
    processes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One fault of the plan.

    :param number: its number; with the seed and the fleet it determines everything else.
    :param row: its kind.
    :param victim: name of the place or the frontend; empty for a server.
    :param after: seconds since the fault before.
    :param signal: name of the signal, where the row leaves the choice.
    :param process: name of the engine's process that it hits.
    :param seconds: how long a pause or an outage lasts.
    :param moment: when during the start or the drain, as a fraction of the usual start and of a second.
    :param mode: drain mode of the worker that replaces the victim.
    """

    number: int
    row: Row
    victim: str
    after: float
    signal: str
    process: str
    seconds: float
    moment: float
    mode: str

    def __str__(self) -> str:
        details = [detail for detail in (self.process, self.signal if "{signal}" in self.row.reason else "") if detail]
        text = " ".join([f"#{self.number} {self.row.name}", *details])
        return f"{text}: {self.victim}" if self.victim else text


class Plan:
    """All faults of a run.

    :param seed: of all draws.
    :param places: of the fleet.
    :param frontends: their names.
    :param abilities: what the machine can, see ``Row.needs``.
    :param per_minute: faults per minute, on average.
    """

    def __init__(
        self,
        seed: int,
        places: Sequence[Place],
        frontends: Sequence[str],
        abilities: Collection[str],
        per_minute: float,
    ) -> None:
        self._seed = seed
        self._places = places
        self._frontends = frontends
        self._gap = 60.0 / per_minute
        self.rows = [row for row in TABLE if self._possible(row, abilities)]
        self._deck = [row for row in self.rows for _ in range(row.weight)]

    def _possible(self, row: Row, abilities: Collection[str]) -> bool:
        if row.needs and row.needs not in abilities:
            return False
        if row.hits == FRONTEND:
            return len(self._frontends) > 1  # clients of the one that is hit go to another
        return row.hits == SERVER or bool(self._suitable(row))

    def _suitable(self, row: Row) -> list[Place]:
        return [place for place in self._places if place.processes or not row.processes]

    def fault(self, number: int) -> Fault:
        """Return one fault. Each deck of consecutive numbers has every row, shuffled anew."""
        deck = list(self._deck)
        random.Random(f"{self._seed}/deck/{number // len(deck)}").shuffle(deck)
        row = deck[number % len(deck)]
        rng = random.Random(f"{self._seed}/{number}")
        # Often close together, sometimes minutes apart.
        after = min(rng.expovariate(1.0 / self._gap), 4 * self._gap)
        seconds = rng.uniform(*(_OUTAGES if row.hits == SERVER else _PAUSES))
        moment, mode = rng.random(), rng.choice(("complete", "complete", "handoff"))
        signal = rng.choice(_CRASHES if row.name == "worker crashes" else _STOPS)
        victim, process = "", ""
        if row.hits == FRONTEND:
            victim = rng.choice(list(self._frontends))
        elif row.hits != SERVER:
            place = rng.choice(self._suitable(row))
            victim = place.name
            process = rng.choice(place.processes) if row.processes else ""
        return Fault(number, row, victim, after, signal, process, seconds, moment, mode)

    def faults(self, first: int = 0) -> Iterator[Fault]:
        """Yield the faults from a number on, without an end."""
        number = first
        while True:
            yield self.fault(number)
            number += 1
