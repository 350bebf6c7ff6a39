"""The server engine on a fake server, started and asked without a runtime."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import uvloop

from dynamo_worker import Deadline
from dynamo_worker.engine import LocalContext
from dynamo_worker.testing import Subject
from dynamo_worker.testing.fault_table import OF_THE_WORKER
from dynamo_worker_server import arguments
from dynamo_worker_server.engine import ServerEngine
from dynamo_worker_server.server_process import choose_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from dynamo_worker import EngineInfo

FAKE = str(Path(__file__).parent / "fake_server.py")


LLAMA = str(Path(__file__).parent / "llama_server.py")


#: For drains of the fault table: eight streams of a real server took a minute on a machine with a load of 25.
PATIENT = ("--termination-grace-period", "120")
#: Rows and checks that show again, with this engine, what others of every run show: that of a text engine's drain with
#: the echo engine, of a death with the row without a drain, of a loop that nothing blocks with engines that could.
SHOWN_ELSEWHERE = OF_THE_WORKER | {
    "test_handoff",
    "test_engine_process_killed_while_draining",
    "test_a_long_prompt_does_not_block_the_loop",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make tests slow that say little of this engine."""
    for item in items:
        if getattr(item, "originalname", item.name) in SHOWN_ELSEWHERE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a tiny model for llama.cpp."""
    from tiny_gguf import make

    return make(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def subject(gguf_model: Path) -> Subject:
    """llama.cpp's own server."""
    command = shlex.join([sys.executable, LLAMA, "--model", str(gguf_model), "--port", "{port}"])
    return Subject(
        "server",
        ["--server-command", command],
        model="tiny",
        processes={"server": r"llama_server\.py --model"},
        migrates=False,
        stream_tokens=400,
        start_stages=("Server started", "Server is ready"),
    )


def fake(*flags: str) -> list[str]:
    """Return the command of the fake server."""
    return [sys.executable, FAKE, "--port", "{port}", *flags]


def engine_of(*words: str) -> ServerEngine:
    """Return an engine that is not started."""
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    return ServerEngine(parser.parse_args(words), None)


@dataclass
class Running:
    """A started engine."""

    engine: ServerEngine
    info: EngineInfo
    chunks: list[Any] = field(default_factory=list)
    #: Whether to ask as the worker does, or as callers in this process do.
    pushes: ClassVar[bool] = True

    async def ask(self, prompt: str = "one two", tokens: int = 6, name: str = "r", **more: Any) -> str:
        """Return the text of one answer; ``chunks`` has the chunks, even if it fails."""
        request = {
            "model": self.info.model_name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            **more,
        }
        self.chunks.clear()
        if self.pushes:
            await self.engine.push(request, LocalContext(name), self.chunks.append)
            return self.text()
        async for chunk in self.engine.generate(request, LocalContext(name)):
            self.chunks.append(chunk)
        return self.text()

    def text(self) -> str:
        return "".join(choice["delta"].get("content") or "" for chunk in self.chunks for choice in chunk["choices"])

    async def get(self, path: str) -> Any:
        """Return what the server itself answers."""
        upstream = self.engine._upstream
        return await asyncio.to_thread(
            lambda: json.load(urllib.request.urlopen(f"{upstream.address}{path}", timeout=5))
        )

    async def stats(self) -> dict[str, int]:
        return await self.get("/stats")


@contextlib.asynccontextmanager
async def running(*words: str) -> AsyncIterator[Running]:
    """Run an engine for the length of a ``with`` block."""
    engine = engine_of(*words)
    try:
        yield Running(engine, await asyncio.wait_for(engine.start(1), 30))
    finally:
        await engine.shutdown(Deadline.after(10))


@contextlib.contextmanager
def elsewhere(*flags: str, port: int | None = None) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a fake server that is not this engine's."""
    port = choose_port(port)
    process = subprocess.Popen([sys.executable, FAKE, "--port", str(port), *flags])
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield port, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[str]:
    """Return the address of a fake server for tests that leave it as it was: each start takes half a second."""
    with elsewhere() as (port, _):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return a function that runs ``check(running)`` on an engine with the fake server.

    Given flags for the server, or ``own=True``, the engine starts one of its own.
    """

    def run(check: Callable[[Running], Any], *flags: str, before: tuple[str, ...] = (), own: bool = False) -> Any:
        server = ("--", *fake(*flags)) if flags or own else ("--attach", request.getfixturevalue("shared_server"))

        async def main() -> Any:
            async with running(*before, *server) as started:
                return await check(started)

        return uvloop.run(asyncio.wait_for(main(), 60))

    return run
