"""Waiting for something to become true."""

from __future__ import annotations

import time

import pytest

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


def test_an_error_ends_the_wait():
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)
