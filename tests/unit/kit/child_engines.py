"""Engines for processes of their own, each with what may go wrong in one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from dynamo_worker.errors import InvalidRequestError
from dynamo_worker.kit.child_loop import StepEngine
from dynamo_worker.kit.child_tasks import TaskEngine


class Counting(StepEngine):
    """Counts from 0; the options and the payload say what else happens."""

    def start(self, options: Any) -> Any:
        self.options = options or {}
        self.paused: set[str] = set()
        self.counts: dict[str, list[int]] = {}
        self.payloads: dict[str, Any] = {}
        self.log: list[str] = []
        return {"pid": os.getpid(), **self.options.get("info", {})}

    def add(self, request_id: str, payload: Any) -> None:
        self.log.append(f"add {request_id}")
        if payload.get("refuse"):
            raise InvalidRequestError(f"refused: {payload['refuse']}")
        if payload.get("add_fails"):
            raise KeyError("add fails")
        self.payloads[request_id] = payload
        self.counts[request_id] = [0, payload["count"]]

    def abort(self, request_id: str) -> None:
        self.log.append(f"abort {request_id}")
        if self.options.get("ignores_abort"):
            return
        self.counts.pop(request_id, None)

    def pause(self, request_id: str) -> None:
        if not self.options.get("ignores_pause"):
            self.log.append(f"pause {request_id}")
            self.paused.add(request_id)

    def resume(self, request_id: str) -> None:
        self.log.append(f"resume {request_id}")
        self.paused.discard(request_id)

    def step(self) -> float | None:
        for name, count in list(self.counts.items()):
            payload = self.payloads[name]
            if name in self.paused:
                continue
            if (at := payload.get("at")) is not None and at == count[0]:
                self.trouble(name, payload["do"])
                if name not in self.counts:
                    continue
            count[0] += 1
            last = count[0] >= count[1]
            self.send(name, {"count": count[0] - 1, "filler": "x" * payload.get("filler", 0)}, last=last)
            if last:
                del self.counts[name]
        return self.options.get("pause_seconds", 0.0005)

    def trouble(self, name: str, what: str) -> None:
        if what == "exit":
            os._exit(3)
        elif what == "raise":
            raise ArithmeticError("the step fails")
        elif what == "broken":
            raise ConnectionResetError("the rank's connection")
        elif what == "sys.exit":
            raise SystemExit("the rank is gone")
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "half a frame":
            self._outbox.flush()
            self._outbox._connection.sendall(b'{"chunks": [[1, {"cou')
            os._exit(0)
        elif what == "all and exit":
            for number in range(500):
                self.send(name, {"count": number}, last=number == 499)
            self._outbox.flush()
            os._exit(0)
        elif what.startswith("write "):
            self._outbox._connection.sendall(what[6:].encode() + b"\n")
            time.sleep(60)
        elif what == "bytes":
            self._outbox._connection.sendall(b"\xff\xfe\n")
            time.sleep(60)
        elif what == "endless":
            while True:
                self._outbox._connection.sendall(b"x" * 65536)
        elif what == "fail":
            del self.counts[name]
            self.fail(name, "out of blocks")
        elif what == "unsendable":
            self.send(name, {1, 2})
        elif what == "huge":
            self.send(name, "x" * 100_000)
        elif what == "close":
            self._outbox._connection.shutdown(socket.SHUT_RDWR)
            time.sleep(60)
        elif what == "helper":
            # A process that inherits the connection, as forked ranks do, and outlives its parent.
            descriptor = self._outbox._connection.fileno()
            os.set_inheritable(descriptor, True)
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
            os._exit(4)
        elif what == "prefill":
            # Steps that send nothing, as a long prefill: each is progress.
            return

    def answer(self, question: str, payload: Any) -> Any:
        if question == "log":
            return self.log
        if question == "counts":
            return self.counts
        if question == "echo":
            return payload
        if question == "environment":
            return {"argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "variable": os.environ.get(payload)}
        if question == "hang":
            time.sleep(60)
        return super().answer(question, payload)

    def close(self) -> None:
        if path := self.options.get("close_file"):
            with open(path, "a") as file:
                file.write("closed\n")
        if self.options.get("close_hangs"):
            time.sleep(60)


class Prefilling(StepEngine):
    """Works for 20 steps without a chunk, if it works at all."""

    def start(self, options: Any) -> Any:
        self.works = options["works"]
        self.left: dict[str, int] = {}

    def add(self, request_id: str, payload: Any) -> None:
        self.left[request_id] = 20

    def abort(self, request_id: str) -> None:
        self.left.pop(request_id, None)

    def step(self) -> float | None:
        time.sleep(0.02)
        for name in list(self.left):
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
                self.send(name, "end", last=True)
        return None if self.works else 0.001


class FailsToStart(Counting):
    def start(self, options: Any) -> Any:
        kind = options["kind"]
        if kind == "raise":
            raise RuntimeError("no GPU is visible")
        if kind == "exit":
            os._exit(7)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            with open(options["file"], "w") as file:
                json.dump({"pid": os.getpid()}, file)
            time.sleep(60)
        if kind == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open(options["file"], "w") as file:
                json.dump({"pid": os.getpid()}, file)
            time.sleep(60)
        return super().start(options)


class LeavesProcesses(Counting):
    """Has a process of its own, and ends without it."""

    def start(self, options: Any) -> Any:
        rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        return {**super().start(options), "rank": rank.pid}


class Printing(Counting):
    def start(self, options: Any) -> Any:
        print("a line on stdout")
        print("a line on stderr", file=sys.stderr)
        return super().start(options)


class CountingTasks(TaskEngine):
    """Counts from 0, each request in its own coroutine."""

    async def start(self, options: Any) -> Any:
        self.options = options or {}
        self.log: list[str] = []
        self.made: dict[str, int] = {}
        if self.options.get("start") == "raise":
            raise RuntimeError("no GPU is visible")
        if self.options.get("start") == "hang":
            await asyncio.sleep(60)
        if self.options.get("start") == "block":
            time.sleep(60)
        return {"options": options}

    async def generate(self, request_id: str, payload: Any) -> AsyncIterator[Any]:
        if payload.get("refuse"):
            raise InvalidRequestError(f"refused: {payload['refuse']}")
        try:
            for number in range(payload["count"]):
                if payload.get("at") == number:
                    what = payload["do"]
                    if what == "raise":
                        raise ArithmeticError("the step fails")
                    if what == "unsendable":
                        yield {1, 2}
                    if what == "huge":
                        yield "x" * 100_000
                    while what == "swallow":
                        try:
                            await asyncio.sleep(0.001)
                            yield {"count": -1}
                        except asyncio.CancelledError:
                            self.log.append("swallowed")
                self.made[request_id] = number
                yield {"count": number, "filler": "x" * payload.get("filler", 0)}
                if not payload.get("busy"):
                    await asyncio.sleep(0.0005)
        except (asyncio.CancelledError, GeneratorExit):
            self.log.append(f"cancelled {request_id}")
            raise

    async def answer(self, question: str, payload: Any) -> Any:
        if question in ("log", "made"):
            return getattr(self, question)
        if question == "echo":
            return payload
        return await super().answer(question, payload)

    def close(self) -> None:
        if path := self.options.get("close_file"):
            with open(path, "a") as file:
                file.write("closed\n")


class AbortsLater(TaskEngine):
    """Knows its requests by their ids, as many engines do, and ends an aborted one when it comes to it."""

    async def start(self, options: Any) -> Any:
        self.known: dict[str, asyncio.Event] = {}

    async def generate(self, request_id: str, payload: Any) -> AsyncIterator[Any]:
        aborted = self.known[request_id] = asyncio.Event()
        try:
            for number in range(payload["count"]):
                await asyncio.sleep(0.01)
                if aborted.is_set():
                    raise RuntimeError("the abort of another request has ended this one")
                yield {"count": number}
        finally:
            await asyncio.sleep(0.03)
            self.known[request_id].set()

    async def answer(self, question: str, payload: Any) -> Any:
        return [len(self.known), len(asyncio.all_tasks())]
