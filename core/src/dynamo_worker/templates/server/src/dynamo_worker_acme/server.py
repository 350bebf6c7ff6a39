"""The server: its process, and requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

from dynamo_worker.kit.python_command import python_command

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, AsyncIterator

    from dynamo_worker import Deadline

_HOST = "127.0.0.1"
#: Longest line of an answer in bytes.
_MOST_BYTES = 1 << 20
#: Seconds between two looks at the process, and until a broken connection must have shown that it is dead.
_POLL_SECONDS, _EXIT_SECONDS = 0.02, 0.5
#: Seconds before its deadline at which a server is killed that has not ended.
_KILL_SECONDS = 0.2


# YOUR ENGINE HERE. Return the command of your server, such as ["vllm", "serve", args.model, "--host", _HOST, "--port",
# str(port), "--served-model-name", args.served_model_name], and delete toy_server.py. Requests have that name for the
# model.
def command(args: argparse.Namespace, port: int) -> list[str]:
    """Return the command that starts the server on a port of the loopback interface."""
    return [*python_command("dynamo_worker_acme.toy_server"), str(port), str(args.tokens_per_second)]


class RefusedError(Exception):
    """The server has answered with an HTTP status that is no success; the message has what it said."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


class Server:
    """One server process, and HTTP requests to it."""

    def __init__(self, args: argparse.Namespace, directory: str | os.PathLike[str]) -> None:
        """Start the process.

        :param directory: its current directory.
        """
        with socket.create_server((_HOST, 0)) as free:
            self._port: int = free.getsockname()[1]
        # In a session of its own, with all processes that it starts.
        self._process = subprocess.Popen(
            command(args, self._port), stdin=subprocess.DEVNULL, cwd=directory, start_new_session=True
        )

    @property
    def pid(self) -> int:
        """The process that must not die."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process; None while it runs."""
        return self._process.poll()

    async def wait_ready(self) -> None:
        """Wait until the server answers.

        :raises RuntimeError: it has ended.
        """
        while self.exit_code is None:
            with contextlib.suppress(OSError, EOFError, RefusedError):  # it does not listen yet, or is loading
                await self.check()
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise RuntimeError(f"the server exited with code {self.exit_code}")

    async def check(self) -> None:
        """Return if the server says that it is well.

        :raises RefusedError: it says that it is not.
        """
        async with self._request("GET", "/health"):
            pass

    async def complete(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of an answer; closing the iterator ends the request.

        :raises RefusedError: the server refuses the request, or fails it in the middle of the answer.
        :raises OSError, EOFError: the connection has broken.
        """
        async with self._request("POST", path, body) as lines:
            async for line in lines:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "choices" not in event:
                        raise RefusedError(500, str(event)[:1000])
                    yield event

    async def has_died(self) -> bool:
        """Return whether the process has ended, which may show a moment after its connections break."""
        for _ in range(int(_EXIT_SECONDS / _POLL_SECONDS)):
            if self.exit_code is not None:
                return True
            await asyncio.sleep(_POLL_SECONDS)
        return False

    async def stop(self, deadline: Deadline) -> None:
        """End the server with SIGTERM, kill it shortly before the deadline, and kill what it has left."""
        for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process does not handle the SIGTERM
            self._process.send_signal(number)
        while self.exit_code is None and not deadline.reserve(_KILL_SECONDS).passed:
            await asyncio.sleep(_POLL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.exit_code is None and not deadline.passed:
            await asyncio.sleep(_POLL_SECONDS)

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, body: Any = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request, and yield the lines of the answer."""
        data = b"" if body is None else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(_HOST, self._port, limit=_MOST_BYTES)
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: {_HOST}:{self._port}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            lines = _lines(reader, chunked="transfer-encoding: chunked" in headers)
            code = int(status.split()[1])
            if code != 200:
                raise RefusedError(code, b"\n".join([line async for line in lines]).decode(errors="replace")[:1000])
            yield lines
        finally:
            writer.close()


async def _lines(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    """Yield the lines of an HTTP body that ends with the connection or is in chunks."""
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0] or b"0", 16)
            data = (await reader.readexactly(size + 2))[:size]
        else:
            data = await reader.read(_MOST_BYTES)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _MOST_BYTES:
            raise EOFError(f"the server has sent a line of more than {_MOST_BYTES} bytes")
        for line in lines:
            yield line
    if rest:
        yield rest
