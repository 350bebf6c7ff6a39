"""A node without endpoints: its processes are started, named and ended; requests are refused."""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import ClassVar

import pytest
from fakes import fake_context

from dynamo_worker import EngineInfo, InvalidRequestError
from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import LocalContext
from dynamo_worker.kit.headless import ChildNode, HeadlessNode

SPAWN = get_context("spawn")
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def obedient() -> None:
    """Run until SIGTERM."""
    time.sleep(60)


def stubborn() -> None:
    """Run on after SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


class Node(HeadlessNode):
    """A node with one process. What `multiprocessing` has spawned belongs to the engine, whatever its title."""

    TITLE: ClassVar = b"toy::"
    END_SECONDS: ClassVar = 0.2

    def __init__(self, stubborn_: bool = False) -> None:
        super().__init__(argparse.Namespace(), fake_context())
        self.process: BaseProcess = SPAWN.Process(target=stubborn if stubborn_ else obedient)

    async def launch(self) -> str:
        self.process.start()
        return "toy"


def test_the_leader_registers_the_model() -> None:
    node = Node()
    try:
        assert asyncio.run(node.start(1)) == EngineInfo("toy", None)
    finally:
        node.process.kill()
        node.process.join()


def test_requests_are_refused() -> None:
    node = Node()
    with pytest.raises(InvalidRequestError, match="send them to the engine's leader node"):
        node.generate({"token_ids": [1]}, LocalContext("a"))
    asyncio.run(node.abort("a"))


def test_what_the_lifecycle_asks_of_it_concerns_the_leader() -> None:
    async def main() -> None:
        node = Node()
        await node.on_ready()
        await node.check_health()
        node.mark_failed()
        await node.drain(Deadline.after(1))
        await node.shutdown(Deadline.after(1))  # nothing was started

    asyncio.run(main())


def test_only_titled_processes_are_watched() -> None:
    node = Node()
    assert list(node.processes()) == []
    asyncio.run(node.start(1))
    try:
        assert list(node.processes()) == [], "it has not set its title"
        node.TITLE = b""  # type: ignore[misc]
        assert node.process.pid in node.processes()
    finally:
        node.process.kill()
        node.process.join()


@pytest.mark.parametrize(("kind", "exit_code"), [(False, -signal.SIGTERM), (True, -signal.SIGKILL)])
def test_processes_are_asked_to_end_and_then_killed(*, kind: bool, exit_code: int) -> None:
    async def main() -> None:
        node = Node(kind)
        await node.start(1)
        await asyncio.sleep(0.5 if not kind else 3)
        await node.shutdown(Deadline.after(10))
        node.process.join(5)
        assert node.process.exitcode == exit_code

    asyncio.run(main())


@pytest.mark.parametrize(("code", "number"), [("", signal.SIGTERM), (DEAF, signal.SIGKILL)], ids=["hears", "deaf"])
def test_a_single_child_is_asked_to_end_and_then_killed(code: str, number: signal.Signals) -> None:
    class Alone(ChildNode):
        END_SECONDS: ClassVar = 0.2

        async def launch(self) -> str:
            ready = f"{code}print('ready', flush=True); import time; time.sleep(60)"
            self.child = subprocess.Popen([sys.executable, "-c", ready], stdout=subprocess.PIPE)
            assert self.child.stdout is not None
            with self.child.stdout as output:
                output.readline()
            return "toy"

    async def check() -> None:
        node = Alone(argparse.Namespace(), fake_context())
        assert list(node.processes()) == []
        await node.shutdown(Deadline.after(1))  # before the start
        await node.start(1)
        assert node.child is not None
        assert list(node.processes()) == [node.child.pid]
        await node.shutdown(Deadline.after(5))
        assert node.child.wait(5) == -number
        await node.shutdown(Deadline.after(5))

    asyncio.run(check())
