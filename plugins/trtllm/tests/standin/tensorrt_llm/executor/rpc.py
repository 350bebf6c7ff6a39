"""Calls from the main process into rank 0 beside the queues: statistics, KV events, capacity, collective calls."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zmq
import zmq.asyncio

from .ipc import sign, verify


def get_unique_ipc_addr() -> str:
    """Name a socket file in the temporary directory; rank 0 binds it, and ZMQ removes it never, closed or not."""
    return f"ipc://{tempfile.gettempdir()}/rpc_test_{uuid.uuid4()}"


class RPCError(RuntimeError):
    """The call failed in rank 0."""


class RPCServer:
    """Serve methods at an address until `shutdown`: each call runs in a thread, answers return in any order."""

    def __init__(self, address: str, key: bytes, methods: dict[str, Callable[..., Any]]) -> None:
        self._key = key
        self._methods = methods
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="rpc_server_worker")
        context = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(address)
        self._answers = context.socket(zmq.PULL)
        self._answers_address = f"inproc://rpc-answers-{id(self)}"
        self._answers.bind(self._answers_address)
        self._thread = threading.Thread(target=self._serve, name="rpc_server", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._answers, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._answers in ready:
                answer = self._answers.recv_multipart()
                if answer == [b""]:
                    break
                self._socket.send_multipart(answer)
            if self._socket in ready:
                peer, message = self._socket.recv_multipart()
                self._pool.submit(self._call, peer, verify(self._key, message))
        self._socket.close(linger=100)
        self._answers.close(linger=0)

    def _call(self, peer: bytes, call: tuple[int, str, tuple[Any, ...], dict[str, Any]]) -> None:
        number, method, args, kwargs = call
        try:
            answer = (number, self._methods[method](*args, **kwargs), None)
        except Exception as error:
            answer = (number, None, RPCError(f"{type(error).__name__}: {error}"))
        self._reply([peer, sign(self._key, answer)])

    def _reply(self, parts: list[bytes]) -> None:
        with zmq.Context.instance().socket(zmq.PUSH) as socket:
            socket.connect(self._answers_address)
            socket.send_multipart(parts)

    def shutdown(self) -> None:
        """Stop serving; the file of the socket stays, as libzmq leaves it."""
        self._reply([b""])
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)


class RPCClient:
    """Call rank 0 from any thread; a loop in a thread of its own owns the socket."""

    def __init__(self, address: str, key: bytes) -> None:
        self._key = key
        self._address = address
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rpc_client_loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.connect(self._address)
        reader = self._loop.create_task(self._read())
        self._loop.run_forever()
        reader.cancel()
        self._loop.run_until_complete(asyncio.gather(reader, return_exceptions=True))
        self._socket.close(linger=0)
        self._loop.close()

    async def _read(self) -> None:
        while True:
            number, value, error = verify(self._key, await self._socket.recv())
            future = self._pending.pop(number, None)
            if future is None or future.done():
                continue  # the caller gave up
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None) -> Any:
        number = next(self._numbers)
        future = self._pending[number] = self._loop.create_future()
        try:
            await self._socket.send(sign(self._key, (number, method, args, kwargs)))
            return await asyncio.wait_for(future, timeout)
        finally:
            self._pending.pop(number, None)

    def call(self, method: str, *args: Any, timeout: float | None, **kwargs: Any) -> Any:
        """Call a method and block up to `timeout` seconds; raise `RPCError` or a timeout error."""
        future = asyncio.run_coroutine_threadsafe(self._call(method, args, kwargs, timeout), self._loop)
        return future.result()

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)
