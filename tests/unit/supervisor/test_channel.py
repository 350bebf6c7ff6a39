"""The channel between supervisor, guardian and worker, over a real pair of sockets."""

from __future__ import annotations

import json
import os
import signal
import socket

import pytest

from dynamo_worker.supervisor.channel import MOST_AT_ONCE, Channel, pair


@pytest.fixture
def ends():
    one, other = map(Channel, pair())
    yield one, other
    one.close()
    other.close()


def types(messages):
    return [message["type"] for message in messages]


class TestTheOtherSideEnds:
    def test_what_it_said_last_is_received_though_it_left_messages_unread(self, ends):
        """The kernel reports the unread ones as ECONNRESET *before* what the other side had sent itself."""
        one, other = ends
        one.send("stop", level=1)
        other.send("heartbeat", in_flight=0)
        other.send("exit", code=2, reason="usage")
        other.close()
        assert types(one.receive()) == ["heartbeat", "exit"]
        assert one.closed

    def test_what_it_said_last_is_received_after_a_failed_send(self, ends):
        one, other = ends
        other.send("exited", code=0)
        other.close()
        one.send("deadline", at=1.0)
        assert one.deaf
        assert not one.closed  # there is something left to receive
        assert types(one.receive()) == ["exited"]
        assert one.closed

    def test_killed_in_the_middle_of_it(self, ends):
        one, other = ends
        pid = os.fork()
        if pid == 0:
            one.socket.close()
            other.send("exited", code=0)
            other.send("cleaned", report={})
            os.kill(os.getpid(), signal.SIGKILL)
        other.socket.close()
        one.send("deadline", at=1.0)
        os.waitpid(pid, 0)
        assert types(one.receive()) == ["exited", "cleaned"]
        assert one.closed


class TestNothingIsLostByItsLength:
    @pytest.mark.parametrize("text", ["x", "ü", "\x00", "\U0001f600", "\udcff", '"'])
    def test_a_long_text_is_cut(self, ends, text):
        one, other = ends
        one.send("exit", code=1, reason=text * 1_000_000)
        (message,) = other.receive()
        assert message["code"] == 1
        assert message["reason"] == text * 2000 + "…"

    def test_long_lists_and_what_is_in_them(self, ends):
        one, other = ends
        report = {"withdrawn": ["\U0001f600" * 9000] * 9000, "problems": ["y"] * 9000, "seconds": 1.5}
        one.send("cleaned", report=report)
        (message,) = other.receive()
        assert len(message["report"]["withdrawn"]) == 8
        assert message["report"]["withdrawn"][0].startswith("\U0001f600" * 200)
        assert message["report"]["seconds"] == 1.5

    def test_what_is_short_enough_stays_as_it_is(self, ends):
        one, other = ends
        fields = {"reason": "ümläut \udcff\x00 \U0001f600" * 10, "at": 1.5, "none": None, "yes": True, "list": [1, "a"]}
        one.send("exit", **fields)
        assert other.receive() == [{"type": "exit", **fields}]


class TestTheOtherSideDoesNotRead:
    def test_the_latest_of_each_type_is_kept(self, ends):
        """A flood of heartbeats must not push out what matters."""
        one, other = ends
        sent = 0
        while not one.pending:
            one.send("heartbeat", in_flight=sent)
            sent += 1
        one.send("state", state="DRAINING")
        for number in range(sent, sent + 3000):
            one.send("heartbeat", in_flight=number)
        one.send("exit", code=1)
        assert list(one.pending) == ["state", "heartbeat", "exit"]
        received = []
        while messages := other.receive():
            received += messages
            one.flush()
        assert types(received[-3:]) == ["state", "heartbeat", "exit"]
        assert received[-2]["in_flight"] == sent + 2999
        assert not one.pending

    def test_a_socket_full_of_messages_is_read_to_its_end(self, ends):
        """More than is taken at once: the last of a dead worker's messages is the one that counts."""
        one, other = ends
        sent = 0
        while not one.pending:
            one.send("heartbeat", in_flight=sent)
            sent += 1
        assert sent > MOST_AT_ONCE
        one.close()
        assert len(other.receive(1000)) == sent - 1
        assert other.closed


def test_garbage_is_counted(ends):
    one, other = ends
    for junk in (b"\xff\xfe", b"[]", b"{", b'{"type": 7}', b"[" * 5000):
        one.socket.send(junk)
    one.socket.send(json.dumps({"type": "exit"}).encode())
    assert types(other.receive()) == ["exit"]
    assert other.malformed == 5


class TestDescriptors:
    """Copies of them come with a message, to an end that expects them."""

    @pytest.fixture
    def taker(self, ends):
        return Channel(ends[1].socket, takes_descriptors=True)

    def test_they_come_with_their_message(self, ends, taker):
        reader, writer = os.pipe()
        assert ends[0].send_descriptors("stack", [reader], path="/x")
        os.close(reader)
        [message] = taker.receive()
        [copy] = message["descriptors"]
        assert message == {"type": "stack", "path": "/x", "descriptors": [copy]}
        assert not os.get_inheritable(copy)
        os.write(writer, b"through")
        assert os.read(copy, 10) == b"through"
        os.close(copy)
        os.close(writer)

    def test_a_number_in_the_text_is_none(self, ends, taker):
        ends[0].socket.send(json.dumps({"type": "stack", "descriptors": [0]}).encode())
        assert taker.receive() == [{"type": "stack"}]

    def test_those_of_garbage_are_closed(self, ends, taker):
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(ends[0].socket, [b"{"], [0, 1])
        assert taker.receive() == []
        assert len(os.listdir("/proc/self/fd")) == before

    def test_another_end_gets_none(self, ends):
        before = len(os.listdir("/proc/self/fd"))
        ends[0].send_descriptors("stack", [0])
        assert ends[1].receive() == [{"type": "stack"}]
        assert len(os.listdir("/proc/self/fd")) == before

    def test_an_end_that_does_not_read_takes_none(self, ends):
        while ends[0].send_descriptors("stack", [0]):
            pass
        assert not ends[0].pending
