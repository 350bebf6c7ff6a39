"""A load generator in a process of its own: concurrent OpenAI streaming requests, counted without parsing JSON.

It has to be cheap, because it shares the machine with what is measured: one `asyncio.Protocol` per connection, no
task per request, and the tokens are counted by looking for a mark in the bytes as they come.

`Load` starts it (`python load.py SPECIFICATION`) and reads JSON lines from it: `streaming` when every stream has had
its first token, `done` with the result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import select
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOKEN = b'"content":"'
_CONTENT = re.compile(rb'"content":"((?:[^"\\]|\\.)*)"')
_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_TOKEN_IDS = b'"completion_token_ids":['
_SEVERAL_IDS = re.compile(rb'"completion_token_ids":\[\d+,')
_END = b"0\r\n\r\n"
_KEPT = len(_TOKEN) - 1


#: What makes the server count.
_COUNTED = {"stream_options": {"include_usage": True}, "nvext": {"extra_fields": ["completion_token_ids"]}}
PROMPT = "The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True)
class LoadSpecification:
    """What the load generator shall do.

    :param ports: HTTP ports of the frontends on the loopback interface; connections are spread over them.
    :param model: name of the model to ask for.
    :param streams: number of concurrent streams; each sends one request after the other.
    :param requests: how many requests in all; None: go on until told to stop.
    :param max_tokens: tokens of each request; it is lost when the client does not get exactly that many.
    :param prompt: what the user says.
    :param expected: the whole text of the answer; a request with another text is lost. None: only count tokens.
    :param count_by_usage: whether the server is asked for the number of tokens, and for the ids of the tokens in every
        chunk: engines put several into one when they are in a hurry. False: every chunk with text is one token.
    :param ramp: streams started per second; 0: all at once.
    :param timeout: bound of one request in seconds.
    :param time_limit: bound of the whole run in seconds.
    """

    ports: tuple[int, ...]
    model: str
    streams: int
    requests: int | None
    max_tokens: int
    prompt: str = PROMPT
    expected: str | None = None
    count_by_usage: bool = False
    ramp: float = 0.0
    timeout: float = 60.0
    time_limit: float = 300.0


@dataclass(frozen=True)
class Record:
    """One request, with times of CLOCK_MONOTONIC (the same in all processes of a machine).

    :param chunks: that carried tokens, where the specification says `count_by_usage`.
    :param merged: those of them that carried more than one.
    """

    started: float
    first: float | None
    ended: float
    tokens: int
    lost: str | None
    chunks: int = 0
    merged: int = 0


@dataclass
class LoadResult:
    """What came of a load."""

    elapsed: float
    client_cpu: float
    records: list[Record] = field(default_factory=list)

    @property
    def completed(self) -> int:
        """Requests whose client got all tokens and a clean finish."""
        return sum(record.lost is None for record in self.records)

    @property
    def lost(self) -> int:
        """Requests whose client did not."""
        return len(self.records) - self.completed

    @property
    def tokens(self) -> int:
        """Tokens that arrived, of lost requests too."""
        return sum(record.tokens for record in self.records)

    @property
    def chunks(self) -> int:
        """Chunks that carried tokens."""
        return sum(record.chunks for record in self.records)

    @property
    def merged(self) -> int:
        """Chunks that carried more than one token."""
        return sum(record.merged for record in self.records)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the whole run."""
        return self.tokens / self.elapsed if self.elapsed > 0 else 0.0

    def losses(self) -> dict[str, int]:
        """Count the reasons of the lost requests."""
        counts: dict[str, int] = {}
        for record in self.records:
            if record.lost is not None:
                counts[record.lost] = counts.get(record.lost, 0) + 1
        return counts

    def time_to_first_token(self) -> float | None:
        """Return the median time to the first token."""
        times = [record.first - record.started for record in self.records if record.first is not None]
        return statistics.median(times) if times else None


class LoadError(Exception):
    """The load generator itself failed."""


class Load:
    """A running load generator.

    :param specification: what it does.
    :param environment: its environment.
    """

    def __init__(self, specification: LoadSpecification, environment: Mapping[str, str] | None = None) -> None:
        self.specification = specification
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), json.dumps(asdict(specification))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )
        self._buffer = b""

    def wait_streaming(self, timeout: float) -> None:
        """Wait until every stream has had its first token.

        :raises LoadError: some have not had it in time.
        """
        message = self._read(timeout)
        if message.get("event") != "streaming":
            raise LoadError(f"not all streams started: {_summary(message)}")

    def stop(self) -> None:
        """Send no new requests; those in flight go on."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"stop\n")
            self._process.stdin.flush()

    def result(self, timeout: float | None = None) -> LoadResult:
        """Wait for the end and return what came of it.

        :param timeout: bound in seconds; the specification's time limit and a little more when None.
        """
        deadline = time.monotonic() + (timeout or self.specification.time_limit + 30.0)
        while True:
            message = self._read(max(0.1, deadline - time.monotonic()))
            if message.get("event") == "done":
                break
        self.close()
        records = [Record(*values) for values in message["records"]]
        return LoadResult(message["elapsed"], message["client_cpu"], records)

    def close(self) -> None:
        """End the process if it still runs."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                raise LoadError(f"the load generator said nothing for {timeout:.0f} s")
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise LoadError(f"the load generator ended with code {self._process.wait()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def run(specification: LoadSpecification, environment: Mapping[str, str] | None = None) -> LoadResult:
    """Run a load to its end."""
    load = Load(specification, environment)
    try:
        return load.result()
    finally:
        load.close()


def echo_text(max_tokens: int) -> str:
    """Return what the echo engine answers to the default prompt: the prompt, over and over, one byte per token."""
    return (PROMPT * (max_tokens // len(PROMPT) + 1))[:max_tokens]


def _summary(message: Mapping[str, Any]) -> str:
    records = [Record(*values) for values in message.get("records", ())]
    losses = LoadResult(0.0, 0.0, records).losses()
    return ", ".join(f"{count} x {reason}" for reason, count in losses.items()) or str(message)[:200]


# --- the process itself ---


class _Stream(asyncio.Protocol):
    """One connection: sends a request, counts its tokens, sends the next one."""

    def __init__(self, generator: _Generator, port: int) -> None:
        self._generator = generator
        self.port = port
        self._transport: asyncio.Transport | None = None
        self.busy = False
        self.started = 0.0
        self.first: float | None = None
        self.tokens = 0
        self._chunks = self._merged = 0
        self._carry = b""
        # The last packets are enough to see how a stream ended; all of them are needed to look at its chunks.
        specification = generator.specification
        everything = specification.expected is not None or specification.count_by_usage
        self._recent: deque[bytes] = deque(maxlen=None if everything else 8)
        self._failed_head = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance(): uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def begin(self) -> None:
        """Send the next request."""
        self.busy = True
        self.started = time.monotonic()
        self.first = None
        self.tokens = self._chunks = self._merged = 0
        self._carry = b""
        self._recent.clear()
        self._failed_head = False
        if self._transport is None:
            self._end("no connection")
        else:
            self._transport.write(self._generator.request)

    def data_received(self, data: bytes) -> None:
        joined = self._carry + data
        if not self._recent and not joined.startswith(b"HTTP/1.1 200"):
            self._failed_head = True
        self._recent.append(data)
        if self._failed_head:
            self._read_error()
            return
        count = joined.count(_TOKEN)
        if count:
            if self.first is None:
                self.first = time.monotonic()
                self._generator.streaming()
            self.tokens += count
        self._carry = joined[-_KEPT:]
        if joined.endswith(_END):
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's interface
        self._transport = None
        if self.busy:
            self._end("connection closed")

    def give_up(self, reason: str) -> None:
        """End the request that is under way as lost, and the connection with it."""
        transport, self._transport = self._transport, None
        self._end(reason, again=False)
        if transport is not None:
            transport.abort()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        tail = b"".join(self._recent)
        if self._generator.specification.count_by_usage:
            counts = _USAGE.findall(tail)
            self.tokens = int(counts[-1]) if counts else 0
            self._chunks = tail.count(_TOKEN_IDS)
            self._merged = len(_SEVERAL_IDS.findall(tail))
        wanted = self._generator.specification.max_tokens
        if b'"finish_reason":"length"' not in tail or b"data: [DONE]" not in tail:
            self._end(f"no clean finish: {_error_text(tail)}")
        elif self.tokens != wanted:
            self._end(f"{self.tokens} of {wanted} tokens")
        elif self._generator.specification.expected not in (None, _text(tail)):
            self._end("another text than expected")
        else:
            self._end(None)

    def _read_error(self) -> None:
        text = b"".join(self._recent)
        head, separator, body = text.partition(b"\r\n\r\n")
        lower = head.lower()
        if not separator:
            return
        position = lower.find(b"content-length:")
        if position >= 0:
            length = int(lower[position + len(b"content-length:") :].split(b"\r\n")[0])
            if len(body) < length:
                return
        elif not text.endswith(_END):
            return
        status = head.split(b"\r\n")[0].decode("latin-1").partition(" ")[2]
        self._end(f"HTTP {status}: {_error_text(body)}")

    def _end(self, lost: str | None, again: bool = True) -> None:
        self.busy = False
        ended = time.monotonic()
        record = Record(self.started, self.first, ended, self.tokens, lost, self._chunks, self._merged)
        self._generator.ended(self, record, again)


def _text(data: bytes) -> str:
    """Return the text of a whole streamed answer."""
    # HTTP chunks begin and end between events, so what lies between the marks is the event's own JSON.
    return "".join(json.loads(b'"%s"' % piece) for piece in _CONTENT.findall(data))


def _error_text(data: bytes) -> str:
    """Return the part of an answer that says what went wrong, short and without anything that differs each time."""
    text = data.decode("utf-8", "replace")
    position = text.find('"message":"')
    if position >= 0:
        return text[position + len('"message":"') :].split('"')[0][:120]
    position = text.rfind("error")
    return text[position:][:120].replace("\r\n", " ").replace("\n", " ") if position >= 0 else "the stream just ended"


class _Generator:
    def __init__(self, specification: LoadSpecification) -> None:
        self.specification = specification
        body = json.dumps(
            {
                "model": specification.model,
                "stream": True,
                "max_tokens": specification.max_tokens,
                # Said here, because not every worker heeds what the model says of itself.
                "temperature": 0.0,
                "messages": [{"role": "user", "content": specification.prompt}],
                **(_COUNTED if specification.count_by_usage else {}),
            }
        ).encode()
        self.request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        self._records: list[Record] = []
        self._streams: list[_Stream] = []
        self._active = 0
        self._left = specification.requests
        self._stopping = False
        self._not_yet = specification.streams
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        specification = self.specification
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._read_stdin)
        ticker = asyncio.ensure_future(self._watch_timeouts())
        for number in range(specification.streams):
            stream = _Stream(self, specification.ports[number % len(specification.ports)])
            self._streams.append(stream)
            await self._connect(stream)
        cpu = time.process_time()
        start = time.monotonic()
        for number, stream in enumerate(self._streams):
            if specification.ramp:
                await asyncio.sleep(max(0.0, start + number / specification.ramp - time.monotonic()))
            if not self._take():
                break
            stream.begin()
        if self._active:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), specification.time_limit)
        ticker.cancel()
        self._stopping = True
        for stream in self._streams:
            if stream.busy:
                stream.give_up("cut off by the time limit of the run")
            stream.close()
        end = max((record.ended for record in self._records), default=start)
        _say(
            event="done",
            elapsed=end - start,
            client_cpu=time.process_time() - cpu,
            records=[astuple(record) for record in self._records],
        )

    def streaming(self) -> None:
        if self._not_yet > 0 and len(self._records) < self.specification.streams:
            self._not_yet -= 1
            if self._not_yet == 0:
                _say(event="streaming")

    def ended(self, stream: _Stream, record: Record, again: bool) -> None:
        self._records.append(record)
        self._active -= 1
        if again and self._take():
            if record.lost is None:
                stream.begin()
            else:
                # A dead connection or a failing server: a fresh connection, and not in a tight loop.
                stream.close()
                task = asyncio.ensure_future(self._again(stream))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        elif self._active == 0:
            self._ended.set()

    def _take(self) -> bool:
        if self._stopping or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        self._active += 1
        return True

    async def _again(self, stream: _Stream) -> None:
        await asyncio.sleep(0.05)
        await self._connect(stream)
        stream.begin()

    async def _connect(self, stream: _Stream) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(20):
            with contextlib.suppress(OSError):
                await loop.create_connection(lambda: stream, "127.0.0.1", stream.port)
                return
            await asyncio.sleep(0.05)

    async def _watch_timeouts(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            oldest = time.monotonic() - self.specification.timeout
            for stream in self._streams:
                if stream.busy and stream.started < oldest:
                    stream.give_up(f"no end after {self.specification.timeout:.0f} s")

    def _read_stdin(self) -> None:
        data = os.read(sys.stdin.fileno(), 4096)
        self._stopping = True
        if not data:
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        if self._active == 0:
            self._ended.set()


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _main() -> None:
    parser = argparse.ArgumentParser(description="Load generator of the benchmarks; started by them.")
    parser.add_argument("specification", help="JSON of a LoadSpecification")
    values = json.loads(parser.parse_args().specification)
    values["ports"] = tuple(values["ports"])
    generator = _Generator(LoadSpecification(**values))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        import uvloop
    except ImportError:
        asyncio.run(generator.run())
    else:
        uvloop.run(generator.run())


if __name__ == "__main__":
    _main()
