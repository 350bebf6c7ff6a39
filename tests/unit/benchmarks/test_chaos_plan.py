"""The plan of the chaos: a pure function of the seed, which has every fault and hits only what it can."""

from __future__ import annotations

import random

import pytest

from chaos_run.plan import Place, Plan
from chaos_run.table import FRONTEND, SERVER, TABLE, WORKER
from chaos_run.worker_acts import ACTS

PLACES = [Place("in-process-0", "echo"), Place("in-process-1", "echo"), Place("process-0", "echo", ("core", "rank"))]
FRONTENDS = ["frontend-0", "frontend-1"]
ABILITIES = {"tmp", "pids", "nats"}


def plan(seed: int = 7, places: list[Place] = PLACES, frontends: list[str] = FRONTENDS, **abilities: object) -> Plan:
    return Plan(seed, places, frontends, abilities.get("abilities", ABILITIES), 12.0)  # type: ignore[arg-type]


def test_the_same_seed_has_the_same_faults_whatever_came_before() -> None:
    first = [plan().fault(number) for number in range(200)]
    random.seed(1)
    assert [plan().fault(number) for number in reversed(range(200))] == first[::-1]
    faults = plan().faults(150)
    assert [next(faults) for _ in range(50)] == first[150:], "--from-fault 150"


def test_another_seed_has_others() -> None:
    assert [plan(7).fault(number) for number in range(50)] != [plan(8).fault(number) for number in range(50)]


def test_each_deck_has_every_row_as_often_as_its_weight() -> None:
    size = sum(row.weight for row in TABLE)
    for deck in range(3):
        names = [plan().fault(deck * size + number).row.name for number in range(size)]
        assert {row.name: names.count(row.name) for row in TABLE} == {row.name: row.weight for row in TABLE}


def test_the_order_of_two_decks_differs() -> None:
    size = sum(row.weight for row in TABLE)
    rows = [plan().fault(number).row for number in range(2 * size)]
    assert rows[:size] != rows[size:]


def test_victims_suit_their_rows() -> None:
    names = {place.name for place in PLACES}
    for number in range(500):
        fault = plan().fault(number)
        if fault.row.hits == WORKER:
            assert fault.victim in names
            assert (fault.process in ("core", "rank")) == fault.row.processes
            assert not fault.row.processes or fault.victim == "process-0"
        elif fault.row.hits == FRONTEND:
            assert fault.victim in FRONTENDS
        else:
            assert fault.row.hits == SERVER
            assert not fault.victim


@pytest.mark.parametrize(
    ("left_out", "changes"),
    [
        ("engine process killed", {"places": PLACES[:2]}),
        ("frontend killed", {"frontends": FRONTENDS[:1]}),
        ("NATS killed", {"abilities": {"tmp", "pids"}}),
        ("disk full, then killed", {"abilities": {"nats", "pids"}}),
        ("no more processes, then killed", {"abilities": {"tmp", "nats"}}),
    ],
)
def test_what_is_not_possible_is_left_out(left_out: str, changes: dict[str, object]) -> None:
    assert left_out in {row.name for row in plan().rows}
    assert left_out not in {row.name for row in plan(**changes).rows}  # type: ignore[arg-type]
    assert left_out not in {plan(**changes).fault(number).row.name for number in range(200)}  # type: ignore[arg-type]


def test_the_pace_is_as_asked() -> None:
    gaps = [plan().fault(number).after for number in range(2000)]
    assert 4.5 < sum(gaps) / len(gaps) < 5.2  # 12 a minute; the longest gaps are cut
    assert max(gaps) <= 20.0


def test_every_row_that_hits_workers_has_an_act() -> None:
    of_workers = {row.name for row in TABLE if row.hits == WORKER} - {"rolling upgrade"}
    assert of_workers == set(ACTS)


def test_a_worker_that_goes_on_has_no_exit_code_to_expect() -> None:
    for row in TABLE:
        assert row.codes or not row.reason, row.name
        assert row.bound > 0, row.name
