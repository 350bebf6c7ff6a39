"""Announcements of event publishers, whose ids are not the worker's: a killed worker leaves none in discovery."""

from __future__ import annotations

import signal
import time

import pytest

from dynamo_worker.testing import eventually

from .conftest import FaultyCluster


@pytest.mark.parametrize("victim", ["worker", "supervisor"])
def test_a_killed_worker_leaves_no_announcement(faulty: FaultyCluster, victim: str) -> None:
    """The file backend would keep them for 10 s, and routers would wait for events of the dead worker."""

    def announcements() -> set[str]:
        found = faulty.cluster.discovery.rglob("event_*/*")
        return {path.name.rpartition("%2F")[2] for path in found}

    neighbour = faulty.start("--announce").wait_ready()
    theirs = announcements()
    assert len(theirs) == 2
    worker = faulty.start("--announce").wait_ready()
    assert len(announcements()) == 4
    time.sleep(1.1)  # until what was created late is noticed too
    since = worker.signal(signal.SIGKILL, worker.worker_pid if victim == "worker" else None)
    eventually(lambda: announcements() == theirs, 3, "its announcements to be withdrawn")
    print(f"\nannouncements gone {time.monotonic() - since:.3f} s after the kill")
    worker.wait_gone()
    assert announcements() == theirs, "the neighbour keeps its own"
    neighbour.stop()
    assert announcements() == set()
