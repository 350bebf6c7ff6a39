"""The fleet of the chaos: what it finds of a worker that has ended, and what its log says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from chaos_run.accounts import Accounts
from chaos_run.engines import ENGINES
from chaos_run.fleet import Fleet, Member, Slot, frontend_names, instance_of, places
from dynamo_worker.testing import eventually
from dynamo_worker.testing.leftovers import MARKER
from dynamo_worker.testing.limits import FILLING

LOG = """\
2026-11-28T19:31:14.1Z INFO dynamo_worker.host.startup: Worker ready model=echo endpoint=dynamo.backend.generate instance=4f7b start_s=7.9
2026-11-28T19:31:15.9Z INFO dynamo_worker.host.launcher: Worker process ends exit_code=0 reason="stopped by SIGTERM"
2026-11-28T19:31:16.2Z ERROR dynamo_worker.supervisor: Worker stopped code=1 reason="engine \\"core\\" died" ran=16.3
"""  # noqa: E501 - as workers write it


def member(tmp_path: Path, number: int, log: str = LOG) -> Member:
    worker = SimpleNamespace(pid=1000 + number, log=log)
    return Member(f"process-0.{number}", worker, f"chaos-test-{os.getpid()}-{number}", tmp_path)  # type: ignore[arg-type]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet that is not started."""
    return Fleet(tmp_path, [ENGINES["process"]()], 1, 1, Accounts())


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    engine = ENGINES["process"]()
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    return Slot(places([engine], 1)[0], engine, tmp, False)


def test_the_places_of_a_fleet() -> None:
    engines = [ENGINES["process"](), ENGINES["text"]()]
    assert [place.name for place in places(engines, 2)] == ["process-0", "process-1", "text-0", "text-1"]
    assert {place.group for place in places(engines, 2)} == {"echo", "echo-text"}
    assert frontend_names(2) == ["frontend-0", "frontend-1"]


def test_a_process_that_is_left_is_found(fleet: Fleet, slot: Slot, tmp_path: Path) -> None:
    dead, other = member(tmp_path, 1), member(tmp_path, 2)
    assert fleet.left_by(slot, dead) == []
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeping, env={**os.environ, MARKER: dead.marker}, start_new_session=True) as process:
        try:
            eventually(lambda: fleet.left_by(slot, dead), 10)
            (found,) = fleet.left_by(slot, dead)
            assert found.startswith(f"process {process.pid}: ")
            assert fleet.left_by(slot, other) == []
        finally:
            process.kill()


def test_files_are_left_unless_another_worker_of_the_place_has_them(fleet: Fleet, slot: Slot, tmp_path: Path) -> None:
    dead, heir = member(tmp_path, 1), member(tmp_path, 2)
    slot.living = [dead, heir]
    for name in ("dw-1001-abc", "dw-1002-abc", "core.123", FILLING):
        (slot.tmp / name).touch()
    assert fleet.left_by(slot, dead) == ["file core.123", "file dw-1001-abc"]


def test_segments_are_left_unless_another_worker_maps_them(fleet: Fleet, slot: Slot, tmp_path: Path) -> None:
    dead, heir = member(tmp_path, 1), member(tmp_path, 2)
    slot.living = [dead, heir]
    segment = Path(f"/dev/shm/chaos-test-{os.getpid()}")
    dead.segments = {segment.name, "one-that-is-gone"}
    segment.touch()
    try:
        assert fleet.left_by(slot, dead) == [f"segment {segment.name}"]
        heir.segments = {segment.name}
        assert fleet.left_by(slot, dead) == []
    finally:
        segment.unlink()


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (LOG, 'engine \\"core\\" died'),
        ("2026 ERROR dynamo_worker.supervisor: Worker not started code=3 reason=short\n", "short"),
        (
            (
                "2026 ERROR dynamo_worker.guardian: Supervisor died; guardian is killing the worker\n"
                "2026 INFO dynamo_worker.guardian: Worker stopped by the guardian, without a supervisor processes=0\n"
            ),
            "the guardian, without a supervisor",
        ),
        ("2026 INFO dynamo_worker.host.launcher: Worker process ends exit_code=0 reason=stopped\n", ""),
        ("", ""),
    ],
)
def test_the_reason_is_that_of_the_owner_of_the_worker(tmp_path: Path, log: str, reason: str) -> None:
    assert member(tmp_path, 1, log).reason() == reason


def test_the_instance_is_that_of_the_worker() -> None:
    assert instance_of(LOG) == "4f7b"
    assert instance_of("Starting worker") == ""


def test_only_other_healthy_places_of_the_same_model_count(fleet: Fleet, tmp_path: Path) -> None:
    engines = [ENGINES["process"](), ENGINES["text"]()]
    for place in places(engines, 3):
        engine = next(engine for engine in engines if place.name.startswith(engine.name))
        fleet.slots[place.name] = Slot(place, engine, tmp_path, False)
    first, second, third = (fleet.slots[f"process-{number}"] for number in range(3))
    for slot in fleet.slots.values():
        fleet.set_healthy(slot, healthy=True)
    assert fleet.others_healthy(first) == 2
    fleet.set_healthy(second, healthy=False)
    assert fleet.others_healthy(first) == 1
    with third.busy:  # something is done to it
        assert fleet.others_healthy(first) == 0
