"""A worker that can start no more threads is noticed."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_worker.errors import NoThreadsError, StartError
from dynamo_worker.host.monitors import threads
from dynamo_worker.host.monitors.threads import ThreadMonitor, can_start_thread, require_thread


def test_no_thread_three_times_in_a_row_is_fatal(monkeypatch):
    answers = iter([True, False, False, True, False, False, False])
    monkeypatch.setattr(threads, "can_start_thread", lambda: next(answers))
    reported = []
    asyncio.run(asyncio.wait_for(ThreadMonitor(reported.append, interval=0.001).run(), 5))
    assert [type(error) for error in reported] == [NoThreadsError]
    assert "no thread can be started" in str(reported[0])
    assert list(answers) == []


def test_whether_a_thread_can_be_started(monkeypatch):
    assert can_start_thread()

    def refuse(function, arguments):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    assert not can_start_thread()


def test_a_start_needs_one_more_thread(monkeypatch):
    require_thread()
    monkeypatch.setattr(threads, "can_start_thread", lambda: False)
    with pytest.raises(StartError, match="no thread can be started") as raised:
        require_thread()
    assert "ulimit -u" in raised.value.hint
