"""When the worker is asked for its stack, and what is said about it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from dynamo_worker.supervisor import blocked_loop
from dynamo_worker.supervisor.blocked_loop import BlockedLoop
from dynamo_worker.supervisor.protocol import STACK_SIGNAL
from dynamo_worker.supervisor.worker_status import WorkerStatus

STACK = """Stack (most recent call first):
  File "/site-packages/re/__init__.py", line 166 in match
  File "/opt/plugins/engine.py", line 12 in generate
"""


class Worker:
    """A worker that writes this stack when it is asked."""

    def __init__(self, writer):
        self.writer = writer
        self.stack = STACK
        self.listens = True
        self.ended = False
        self.asked = 0

    def catches(self, number):
        assert number == STACK_SIGNAL
        return self.listens

    def signal(self, number):
        self.asked += 1
        os.write(self.writer, self.stack.encode())


@pytest.fixture
def world(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    it = SimpleNamespace(now=100.0, lines=[], worker=Worker(writer))
    monkeypatch.setattr(blocked_loop, "time", SimpleNamespace(monotonic=lambda: it.now))
    it.status = WorkerStatus(it.now, 30.0, "")
    it.status.take({"type": "settings", "heartbeat_timeout": 25}, it.now)
    it.status.take({"type": "state", "state": "SERVING"}, it.now)
    log = SimpleNamespace(warning=lambda message, **fields: it.lines.append((message, fields)))
    it.watch = BlockedLoop(it.worker, it.status, log)
    it.watch.open(reader)

    def run(seconds):
        """Let time pass, from one timer to the next."""
        until = it.now + seconds
        while (due := it.watch.next_timer()) is not None and due <= until:
            it.now = max(it.now, due)
            it.watch.act_on_time()
        it.now = until

    it.run = run
    it.beat = lambda: it.status.take({"type": "heartbeat", "in_flight": 2}, it.now)
    yield it
    it.watch.close()
    os.close(writer)


def test_one_line_with_the_stack(world):
    world.beat()
    world.run(20)
    [(message, fields)] = world.lines
    assert message == "Worker event loop is blocked"
    assert fields["stack"] == "match (re/__init__.py:166) < generate (plugins/engine.py:12)"
    assert fields["no_heartbeat_s"] == pytest.approx(1.6)
    assert fields["in_flight"] == 2
    assert world.worker.asked == 1


def test_nothing_while_the_heart_beats(world):
    for _ in range(20):
        world.beat()
        world.run(1)
    assert not world.lines


@pytest.mark.parametrize("state", ["STARTING", "CLEANUP"])
def test_nothing_while_nobody_expects_heartbeats(world, state):
    world.status.take({"type": "state", "state": state}, world.now)
    world.run(20)
    assert not world.lines


def test_nothing_if_all_stacks_come_at_the_same_time(world):
    world.status.take({"type": "settings", "heartbeat_timeout": 1.5}, world.now)
    world.run(20)
    assert not world.lines


def test_at_most_one_line_a_minute(world):
    for _ in range(8):
        world.beat()
        world.run(10)
    assert [fields.get("unreported") for _, fields in world.lines] == [None, 6]


def test_a_worker_without_the_handler_is_not_signalled(world):
    """The signal would end it."""
    world.worker.listens = False
    world.run(5)
    assert world.worker.asked == 0
    assert world.lines[0][1]["stack"] == "unknown"


def test_an_endless_stack_is_cut(world):
    world.worker.stack = STACK + '  File "/a/b.py", line 1 in again\n' * 1000
    world.run(5)
    assert world.lines[0][1]["stack"].count(" < ") == 11


def test_a_dead_worker_is_not_asked(world):
    world.worker.ended = True
    world.run(5)
    assert not world.lines
