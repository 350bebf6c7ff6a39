"""The worker's end of the control socket, over a real pair of sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from aio import settle, until

from dynamo_worker.host.supervisor_channel import SupervisorChannel
from dynamo_worker.supervisor.channel import Channel
from dynamo_worker.supervisor.protocol import CONTROL_FD


@pytest.fixture
def sockets():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def loop_errors():
    """Collect what callbacks of the loop raise."""
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    yield errors


def test_messages_arrive_at_the_supervisor_one_per_packet(sockets):
    ours, theirs = sockets
    control = SupervisorChannel(ours)
    control.send("state", state="SERVING", deadline=None, in_flight=3, reason=None)
    control.send("heartbeat", in_flight=4)
    assert Channel(theirs).receive() == [
        {"type": "state", "state": "SERVING", "deadline": None, "in_flight": 3, "reason": None},
        {"type": "heartbeat", "in_flight": 4},
    ]


def test_messages_of_the_supervisor_arrive_in_order(sockets):
    ours, theirs = sockets
    received = []

    async def main():
        SupervisorChannel(ours).listen(asyncio.get_running_loop(), received.append)
        supervisor = Channel(theirs)
        for level in range(1, 21):
            supervisor.send("stop", level=level, signal="SIGTERM", at=1.5)
        await until(lambda: len(received) == 20)

    asyncio.run(main())
    assert [message["level"] for message in received] == list(range(1, 21))
    assert received[0] == {"type": "stop", "level": 1, "signal": "SIGTERM", "at": 1.5}


def test_what_is_no_object_is_ignored(sockets):
    """A broken message must not stop the next one: it may be the request to stop."""
    ours, theirs = sockets
    received = []

    async def main():
        with loop_errors():
            SupervisorChannel(ours).listen(asyncio.get_running_loop(), received.append)
            for packet in (b"[1]", b'"stop"', b"{torn", b"\xff\xfe", json.dumps({"type": "stop"}).encode()):
                theirs.send(packet)
            await until(lambda: received)

    asyncio.run(main())
    assert received == [{"type": "stop"}]


def test_a_supervisor_that_is_gone_costs_nothing(sockets):
    ours, theirs = sockets

    async def main():
        with loop_errors() as errors:
            loop = asyncio.get_running_loop()
            control = SupervisorChannel(ours)
            control.listen(loop, lambda message: pytest.fail(f"nobody sent {message}"))
            theirs.close()
            await asyncio.sleep(0.05)
            assert not loop.remove_reader(ours.fileno()), "the loop would spin on the closed socket"
            control.send("heartbeat", in_flight=0)
            await settle()
            assert errors == []

    asyncio.run(main())


def test_a_supervisor_that_does_not_read_blocks_nobody(sockets):
    """Of what it has no room for, the latest message waits, and nothing else: memory is bounded, too."""
    ours, theirs = sockets
    control = SupervisorChannel(ours)
    started = time.monotonic()
    for number in range(5000):
        control.send("heartbeat", in_flight=number)
    assert time.monotonic() - started < 10
    supervisor = Channel(theirs)
    received = [message["in_flight"] for message in supervisor.receive(5000)]
    assert 0 < len(received) < 4999, "the socket was never full"
    assert received == list(range(len(received)))
    control.send("state", state="DRAINING")
    assert supervisor.receive() == [{"type": "heartbeat", "in_flight": 4999}, {"type": "state", "state": "DRAINING"}]


def test_a_reason_that_is_too_long_is_cut(sockets):
    """It may hold a compiler's whole output; the supervisor still has to learn why the worker ended."""
    ours, theirs = sockets
    control = SupervisorChannel(ours)
    control.send("exit", code=1, reason="nvcc failed: " + "x" * 10_000_000)
    (message,) = Channel(theirs).receive()
    assert message["code"] == 1
    assert message["reason"].startswith("nvcc failed: xxx")
    assert 1000 < len(message["reason"]) < 4000


def test_what_the_supervisor_does_not_read_now_it_gets_later(sockets):
    """A supervisor that was stopped must not miss a state among the heartbeats of that time."""
    ours, theirs = sockets
    received = []

    async def main():
        control = SupervisorChannel(ours)
        control.listen(asyncio.get_running_loop(), lambda message: pytest.fail(f"nobody sent {message}"))
        for number in range(3000):
            control.send("heartbeat", in_flight=number)
        control.send("state", state="DRAINING")
        for number in range(3000):
            control.send("heartbeat", in_flight=number)
        supervisor = Channel(theirs)

        def all_read():
            received.extend(supervisor.receive())
            return received[-1:] == [{"type": "heartbeat", "in_flight": 2999}]

        await until(all_read)
        assert not asyncio.get_running_loop().remove_writer(ours.fileno()), "the loop would spin"

    asyncio.run(main())
    assert [message for message in received if message["type"] == "state"] == [{"type": "state", "state": "DRAINING"}]


def test_a_supervisor_that_ends_in_the_middle_of_its_messages(sockets):
    """The kernel reports what it left unread before what it had sent: the request to stop must not be lost."""
    ours, theirs = sockets
    received = []

    async def main():
        with loop_errors() as errors:
            control = SupervisorChannel(ours)
            control.send("heartbeat", in_flight=0)
            Channel(theirs).send("stop", level=1)
            theirs.close()
            control.listen(asyncio.get_running_loop(), received.append)
            await until(lambda: received)
            assert not asyncio.get_running_loop().remove_reader(ours.fileno())
            assert errors == []

    asyncio.run(main())
    assert received == [{"type": "stop", "level": 1}]


def test_any_text_can_be_a_reason(sockets):
    ours, theirs = sockets
    reason = "ümläut \udcff\x00 \U0001f600"
    SupervisorChannel(ours).send("exit", code=1, reason=reason)
    assert Channel(theirs).receive()[0]["reason"] == reason


def test_without_a_supervisor_nothing_happens(monkeypatch):
    monkeypatch.delenv(CONTROL_FD, raising=False)
    control = SupervisorChannel.from_environment()
    assert not control.supervised
    control.send("state", state="SERVING")

    async def main():
        control.listen(asyncio.get_running_loop(), lambda message: pytest.fail("nobody is there"))

    asyncio.run(main())


def test_the_channel_is_taken_from_the_environment_once_and_not_inherited(sockets, monkeypatch):
    ours, theirs = sockets
    descriptor = os.dup(ours.fileno())
    os.set_inheritable(descriptor, True)
    monkeypatch.setenv(CONTROL_FD, str(descriptor))
    control = SupervisorChannel.from_environment()
    assert control.supervised
    assert CONTROL_FD not in os.environ
    assert not SupervisorChannel.from_environment().supervised
    seen = subprocess.run(
        [sys.executable, "-c", f"import os; print(os.path.exists('/proc/self/fd/{descriptor}'))"],
        capture_output=True,
        text=True,
        check=True,
        close_fds=False,
    )
    assert seen.stdout.strip() == "False"
    control.send("heartbeat", in_flight=0)
    assert Channel(theirs).receive() == [{"type": "heartbeat", "in_flight": 0}]
    control._channel.close()
