"""The relay carries everything, in order, without blocking any writer."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from dynamo_worker.supervisor.loop import Loop
from dynamo_worker.supervisor.output import Output
from dynamo_worker.supervisor.relay import Relay

from .pipes import fill, lost, read


@pytest.fixture
def relayed():
    """Run a command whose stderr and stdout go through a relay to one pipe; gives relay, loop and that pipe."""
    reading, writing = os.pipe()
    saved = os.dup(1)
    os.dup2(writing, 1)
    out = Output(writing, lost)
    loop = Loop((), lambda number: None, lambda pid, code: None)
    relay = Relay(out)
    relay.start(loop)
    yield relay, loop, reading, writing
    relay.close_ends()
    relay.finish()
    loop.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(saved, 1)
    for descriptor in (saved, reading, writing):
        os.close(descriptor)


def run(relay: Relay, program: str) -> subprocess.Popen[bytes]:
    stderr = next(end for descriptor, end in relay.ends.items() if descriptor != 1)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=relay.ends[1], stderr=stderr)
    relay.close_ends()
    return process


def test_order_is_kept_and_nothing_lost(relayed):
    relay, loop, reading, _ = relayed
    program = "import os\nfor n in range(9000): os.write(n % 2 + 1, b'%d\\n' % n)"
    process = run(relay, program)
    seen = b""
    while relay._sources:
        loop.pump(5)
        seen += read(reading)
    assert process.wait(5) == 0
    relay.finish()
    assert (seen + read(reading)).split() == [b"%d" % number for number in range(9000)]


def test_who_prints_never_waits_nor_dies_of_the_reader(relayed):
    """First nobody reads, then nobody is there any more."""
    relay, loop, _, writing = relayed
    fill(writing)
    program = "import os\nfor n in range(99): os.write(2, b'x' * 99999)"
    process = run(relay, program)
    while relay._sources:
        loop.pump(5)
    assert process.wait(5) == 0


def test_files_and_terminals_stay(tmp_path):
    master, slave = pty.openpty()
    saved = os.dup(1)
    try:
        os.dup2(slave, 1)
        with open(tmp_path / "log", "wb") as file:
            assert Relay(Output(file.fileno(), lost)).ends == {}
    finally:
        os.dup2(saved, 1)
        for descriptor in (saved, master, slave):
            os.close(descriptor)
