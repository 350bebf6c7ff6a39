"""Waiting for something to become true."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from dynamo_worker.testing import waiting
from dynamo_worker.testing.waiting import eventually


def test_it_returns_what_became_true():
    values = iter([None, 0, "", "now"])
    assert eventually(lambda: next(values)) == "now"


def test_it_returns_at_once_when_it_is_true():
    started = time.monotonic()
    assert eventually(lambda: 7, timeout=0, interval=60) == 7
    assert time.monotonic() - started < 1


def test_it_gives_up_and_says_on_what():
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"timed out after 0\.05 s waiting for the moon"):
        eventually(lambda: False, 0.05, "the moon")
    assert 0.05 <= time.monotonic() - started < 2


@pytest.mark.parametrize(("threads", "least"), [(4.0, 0.2), (1000.0, 0.5)], ids=["shared", "at most ten times"])
def test_on_crowded_cores_it_waits_longer(monkeypatch, threads, least):
    monkeypatch.setattr(waiting, "_threads_per_core", lambda: threads)
    started = time.monotonic()
    message = r"timed out after 0\.05 s waiting for the moon \([\d.]+ s on crowded cores"
    with pytest.raises(AssertionError, match=message):
        eventually(lambda: False, 0.05, "the moon")
    assert least <= time.monotonic() - started < least + 2


def test_what_it_waits_for_a_core_does_not_count(monkeypatch):
    monkeypatch.setattr(waiting, "_threads_per_core", lambda: 1.0)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(20 * seconds))
    started = time.monotonic()
    with pytest.raises(AssertionError, match="on crowded cores"):
        eventually(lambda: False, 0.05, "the moon")
    assert time.monotonic() - started > 0.4


def test_busy_threads_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * cores)]
    try:
        assert max(waiting._threads_per_core() for _ in range(200) if not time.sleep(0.005)) >= 3
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert waiting._threads_per_core() >= 1


def test_an_error_ends_the_wait():
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)
