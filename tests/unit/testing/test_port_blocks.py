"""Ports for tests: each is handed out once, in this process and beside others."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys

import pytest

from dynamo_worker.testing import port_blocks
from dynamo_worker.testing.port_blocks import PortBlocks

#: The first of six ports that no test uses, and most probably no session beside this one.
FIRST = 30_000 + 6 * random.SystemRandom().randrange(400)


@pytest.fixture
def session(monkeypatch):
    """Return a function that returns the blocks of one session: of three blocks of two ports."""
    monkeypatch.setattr(port_blocks, "_PORTS", range(FIRST, FIRST + 6))
    monkeypatch.setattr(port_blocks, "_BLOCK", 2)
    made = []

    def make():
        made.append(PortBlocks())
        return made[-1]

    yield make
    for blocks in made:
        for descriptor in blocks.claims:
            os.close(descriptor)


def test_two_sessions_share_no_port(session):
    first, second = session(), session()
    ports = [blocks.next() for blocks in (first, second) * 2]
    assert len(set(ports)) == 4
    assert {port // 2 for port in ports[::2]}.isdisjoint(port // 2 for port in ports[1::2])


def test_a_port_that_somebody_listens_on_is_left_out(session):
    with socket.create_server(("127.0.0.1", FIRST + 2)):
        blocks = session()
        assert {blocks.next() for _ in range(5)} == {FIRST + n for n in (0, 1, 3, 4, 5)}
        with pytest.raises(RuntimeError, match="claimed all ports"):
            blocks.next()


def test_a_process_that_ends_gives_its_blocks_back(session):
    claim = f"from dynamo_worker.testing import port_blocks as p\np._PORTS, p._BLOCK = range({FIRST}, {FIRST + 6}), 2\n"
    claim += "blocks = p.PortBlocks()\n[blocks.next() for _ in range(5)]\nprint('claimed', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(RuntimeError, match="claimed all ports"):
            session().next()
        other.kill()
    assert session().next() in range(FIRST, FIRST + 6)
