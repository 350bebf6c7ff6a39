"""Deadlines."""

from __future__ import annotations

import time

from dynamo_worker.deadline import Deadline


def test_remaining_is_never_negative():
    assert Deadline(time.monotonic() - 5).remaining() == 0
    assert Deadline(time.monotonic() - 5).passed
    assert 4 < Deadline.after(5).remaining() <= 5
    assert not Deadline.after(5).passed


def test_within_is_never_later():
    deadline = Deadline.after(5)
    assert deadline.within(60) == deadline
    assert deadline.within(1).remaining() <= 1


def test_reserve_moves_earlier():
    assert Deadline(100.0).reserve(5) == Deadline(95.0)
