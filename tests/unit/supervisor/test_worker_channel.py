"""The supervisor's end of the worker's control socket, over a real pair of sockets."""

from __future__ import annotations

import json
import signal
import socket
import time
from types import SimpleNamespace

import pytest

from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor import channel
from dynamo_worker.supervisor.loop import Loop
from dynamo_worker.supervisor.worker_channel import WorkerChannel
from dynamo_worker.supervisor.worker_status import WorkerStatus


@pytest.fixture
def ends():
    ours, theirs = channel.pair()
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def loop():
    handler = signal.getsignal(signal.SIGCHLD)
    it = Loop((), lambda number: None, lambda pid, code: None)
    yield it
    it.close()
    signal.signal(signal.SIGCHLD, handler)


@pytest.fixture
def world(ends, loop):
    it = SimpleNamespace(states=[], warnings=[], log=SimpleNamespace(), status=WorkerStatus(time.monotonic(), 30.0, ""))
    it.log.warning = it.warnings.append
    it.control = WorkerChannel(
        ends[0],
        loop,
        it.status,
        lambda: it.states.append(it.status.state),
        it.log,
    )
    return it


def say(theirs, **message):
    theirs.send(json.dumps(message).encode())


def test_messages_update_the_status(ends, loop, world):
    say(ends[1], type="state", state="SERVING")
    say(ends[1], type="heartbeat", in_flight=3)
    loop.pump(5)
    assert world.states == [State.SERVING]
    assert world.status.in_flight == 3


def test_malformed_messages_are_reported_once(ends, loop, world):
    for junk in (b"{", b"[]", b"\xff"):
        ends[1].send(junk)
        loop.pump(5)
    say(ends[1], type="state", state="SERVING")
    loop.pump(5)
    assert world.warnings == ["Ignoring malformed control message"]
    assert world.status.state is State.SERVING


def test_the_log_has_the_format_that_the_worker_announces(ends, loop, world):
    """The configuration file may set it where only a YAML parser finds it."""
    for log_format in ("json", "text"):
        say(ends[1], type="settings", log_format=log_format)
        loop.pump(5)
        assert world.log.as_json is (log_format == "json")


def test_a_stop_reaches_the_worker(ends, world):
    assert world.control.stop(1, "SIGTERM", 12.5)
    assert json.loads(ends[1].recv(4096)) == {"type": "stop", "level": 1, "signal": "SIGTERM", "at": 12.5}


def test_a_stop_reaches_a_worker_that_reads_late(ends, loop, world):
    """Its socket is full of what it has not read."""
    filler = channel.Channel(ends[0])
    sent = 0
    while not filler.pending:
        filler.send("stop", level=0)
        sent += 1
    assert world.control.stop(2, "SIGINT", 1.0)
    received = []
    deadline = time.monotonic() + 10
    while len(received) < sent and time.monotonic() < deadline:
        loop.pump(0.01)
        try:
            received.append(json.loads(ends[1].recv(65536)))
        except BlockingIOError:
            continue
    assert received[-1] == {"type": "stop", "level": 2, "signal": "SIGINT", "at": 1.0}
    started = time.monotonic()
    loop.pump(0.05)
    assert time.monotonic() - started > 0.04, "the loop spins on a socket that is writable"


@pytest.mark.parametrize(("farewell", "heard"), [(False, False), (True, True)])
def test_a_worker_that_has_closed_its_end(ends, loop, world, farewell, heard):
    """Only one that has announced its end needs no signal."""
    if farewell:
        say(ends[1], type="exit", code=2, reason="unknown flag")
    ends[1].close()
    assert world.control.stop(1, "SIGTERM", 1.0) is heard
    assert world.control.closed
    assert world.control.closed_at == pytest.approx(time.monotonic(), abs=5)
    assert world.status.exit_code == (2 if farewell else None)
    assert world.control.stop(2, "SIGTERM", 2.0) is heard, "a second one is no error"
    started = time.monotonic()
    loop.pump(0.05)
    assert time.monotonic() - started > 0.04, "the loop spins on a closed socket"


def test_the_last_message_of_a_dead_worker_counts(ends, world):
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    for _ in range(channel.MOST_AT_ONCE + 50):
        say(ends[1], type="heartbeat", in_flight=0)
    say(ends[1], type="exit", code=4, reason="no disk")
    ends[1].close()
    world.control.receive_rest()
    assert (world.status.exit_code, world.status.reason) == (4, "no disk")
    world.control.receive_rest()
