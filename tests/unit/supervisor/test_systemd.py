"""Notifications to systemd, over a real socket."""

from __future__ import annotations

import os
import socket

import pytest

from dynamo_worker.lifecycle import State
from dynamo_worker.supervisor.systemd import Systemd
from dynamo_worker.supervisor.worker_status import WorkerStatus


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Listen as systemd does, with a watchdog of 4 s; returns a function that returns what came."""
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.setblocking(False)

        def received():
            messages = []
            try:
                while True:
                    messages.append(listener.recv(4096).decode())
            except BlockingIOError:
                return messages

        yield received


@pytest.fixture
def systemd(told):
    it = Systemd()
    yield it
    it.close()


def status(state):
    it = WorkerStatus(0.0, 30.0, "")
    it.take({"type": "state", "state": state, "in_flight": 2}, 0.0)
    return it


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1"])
def test_without_a_socket_it_does_nothing(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    systemd = Systemd()
    systemd.send("READY=1")
    systemd.tick(0.0, State.STARTING, responsive=True)
    assert not systemd.active
    assert systemd.watchdog_interval is None
    assert systemd.due(State.STARTING) is None
    systemd.close()


@pytest.mark.parametrize(
    ("microseconds", "pid", "interval"),
    [("3000000", None, 1.5), ("x", None, None), ("0", None, None), ("1", "1", None)],
)
def test_watchdog(monkeypatch, tmp_path, microseconds, pid, interval):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    systemd = Systemd()
    assert systemd.watchdog_interval == interval
    systemd.send("READY=1")
    systemd.close()


def test_it_is_ready_once(systemd, told):
    for state in ("STARTING", "SERVING", "SERVING"):
        systemd.report(status(state))
    assert told() == [
        "STATUS=STARTING, 2 in flight",
        "READY=1\nSTATUS=SERVING, 2 in flight",
        "STATUS=SERVING, 2 in flight",
    ]


def test_a_drain_on_request_is_shown(systemd, told):
    for state in ("SERVING", "DRAINING"):
        current = status(state)
        current.drain = "drained"
        systemd.report(current)
    assert told() == [
        "READY=1\nSTATUS=SERVING, drained on request, 2 in flight",
        "STOPPING=1\nSTATUS=DRAINING, 2 in flight",
    ]


@pytest.mark.parametrize("state", ["UNREGISTERING", "GRACE", "DRAINING", "CLEANUP", "FATAL"])
def test_it_stops(systemd, told, state):
    systemd.report(status(state))
    assert told() == [f"STOPPING=1\nSTATUS={state}, 2 in flight"]


def test_a_signal_asks_for_more_time(systemd, told):
    systemd.stopping("SIGTERM", 12.5)
    assert told() == ["STOPPING=1\nSTATUS=stopping after SIGTERM\nEXTEND_TIMEOUT_USEC=12500000"]


def test_keep_alives_in_time(systemd, told):
    systemd.tick(100.0, State.SERVING, responsive=True)
    assert systemd.due(State.SERVING) == 102.0
    systemd.tick(101.9, State.SERVING, responsive=True)
    assert told() == ["WATCHDOG=1"]
    systemd.tick(102.0, State.SERVING, responsive=True)
    assert told() == ["WATCHDOG=1"]


def test_no_keep_alive_for_an_unresponsive_worker(systemd, told):
    systemd.tick(100.0, State.SERVING, responsive=False)
    assert told() == []
    assert systemd.due(State.SERVING) == 102.0, "the loop must not spin"


def test_more_time_during_a_start_only(systemd, told):
    systemd.tick(100.0, State.STARTING, responsive=False)
    assert told() == ["EXTEND_TIMEOUT_USEC=30000000"]
    systemd.tick(109.0, State.STARTING, responsive=False)
    assert told() == []
    systemd.tick(110.0, State.SERVING, responsive=False)
    assert told() == []
    systemd.tick(110.0, State.STARTING, responsive=False)
    assert told() == ["EXTEND_TIMEOUT_USEC=30000000"]
