"""OpenAI clients: many concurrent streams, each recorded in full."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class Result:
    """The result of one request, as its client saw it.

    :param status: HTTP status; 0 if there was no response.
    :param text: all text received.
    :param finish_reason: the finish reason of the last chunk; None if none was received.
    :param error: the error, if there was one.
    :param chunk_times: ``time.monotonic()`` at which each chunk with text arrived.
    """

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    chunk_times: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the stream is complete: status 200, a finish reason, and no error."""
        return self.status == 200 and self.finish_reason is not None and self.error is None


async def stream(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], result: Result, pause: float = 0.0
) -> None:
    """Send one streaming request and record its outcome in ``result``. Raises nothing.

    :param pause: time in seconds to wait before reading on after each line: a client that reads slowly.
    """
    try:
        async with session.post(url, json=body) as response:
            result.status = response.status
            if response.status != 200:
                result.error = (await response.text())[:300]
                return
            async for line in response.content:
                _take(line, result)
                if pause:
                    await asyncio.sleep(pause)
    except Exception as error:  # broken connections, truncated JSON, lines that are too long
        result.error = f"{type(error).__name__}: {error}"


def _take(line: bytes, result: Result) -> None:
    if line.startswith((b"event: error", b": ")):
        result.error = result.error or line.decode(errors="replace").strip()
        return
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return
    event = json.loads(line[6:])
    if "error" in event or not event.get("choices"):
        if "usage" not in event:
            result.error = line.decode(errors="replace")[:300]
        return
    choice = event["choices"][0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    if text:
        result.text += text
        result.chunk_times.append(time.monotonic())
    result.finish_reason = choice.get("finish_reason") or result.finish_reason


def chat(model: str, prompt: str, max_tokens: int | None, **options: Any) -> dict[str, Any]:
    """Return the body of a chat request; it streams unless ``options`` contain ``stream=False``."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True, **options}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return body


class Load:
    """Streams that run in the background of a test, in a separate thread."""

    def __init__(self, base_url: str, bodies: Sequence[dict[str, Any]], timeout: float = 120.0) -> None:
        """Start one stream per request body.

        :param base_url: URL of the frontend, ``http://HOST:PORT``.
        :param bodies: bodies of chat requests.
        :param timeout: longest time that a stream may take, in seconds.
        """
        self.results = [Result() for _ in bodies]
        self._url = f"{base_url}/v1/chat/completions"
        self._bodies = bodies
        self._timeout = timeout
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(
                *(
                    stream(session, self._url, body, result)
                    for body, result in zip(self._bodies, self.results, strict=True)
                )
            )

    def started(self) -> bool:
        """Return whether every stream has received text or has failed."""
        return all(result.text or result.error is not None for result in self.results)

    def wait(self, timeout: float = 120.0) -> list[Result]:
        """Wait until all streams have ended, and return their results.

        :param timeout: longest time to wait, in seconds.
        :raises AssertionError: a stream is still running after ``timeout`` seconds.
        """
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"streams are still running after {timeout:g} s: {self.summary()}"
        return self.results

    def summary(self) -> str:
        """Summarize the state of the streams for an error message."""
        ok = sum(result.ok for result in self.results)
        errors = sorted({result.error for result in self.results if result.error})
        return f"{ok} of {len(self.results)} complete; errors: {errors or 'none'}"
