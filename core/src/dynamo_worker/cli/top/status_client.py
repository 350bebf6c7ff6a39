"""Asks a status server without ever waiting long for it or reading much of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli.top.samples import Sample, from_health, from_metrics

if TYPE_CHECKING:
    from dynamo_worker.address import Address

#: Longest answer in bytes; the metrics of an engine have some hundred kilobytes.
_MOST_BYTES: Final = 4 << 20
_PIECE: Final = 1 << 16


class SilentError(Exception):
    """A status server gives no answer that says anything; the text says what it did."""


async def look(address: Address, timeout: float) -> Sample:
    """Return what the worker at an address says.

    :param timeout: seconds for all of its answers.
    :raises SilentError: it cannot be reached, does not answer in time, or is no status server.
    """
    try:
        return await asyncio.wait_for(_ask(address), timeout)
    except (asyncio.TimeoutError, TimeoutError):
        raise SilentError(f"no answer within {timeout:g} s") from None
    except OSError as error:
        raise SilentError(f"no answer: {error.strerror or error}") from error


async def _ask(address: Address) -> Sample:
    status, body = await _get(address, "/metrics")
    sample = from_metrics(body.decode("utf-8", "replace")) if status == 200 else Sample()
    if sample.ready and sample.state is not None:
        return sample
    health, body = await _get(address, "/health")
    state, reason = from_health(body)
    if sample == Sample() and state is None:
        raise SilentError(f"not the status server of a worker: /metrics answers with HTTP status {status}")
    ready = health == 200 if sample.ready is None else sample.ready
    return replace(sample, state=state or sample.state, ready=ready, reason=None if ready else reason)


async def _get(address: Address, path: str) -> tuple[int, bytes]:
    """Return the status and the body of one answer.

    :raises SilentError: it is not one of HTTP, or too long.
    :raises OSError: the server cannot be reached, or ends the connection.
    """
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=_PIECE)
    try:
        # The end of the connection ends an answer to HTTP/1.0, so that its body comes as it is.
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
        pieces, length = [], 0
        while piece := await reader.read(_PIECE):
            pieces.append(piece)
            length += len(piece)
            if length > _MOST_BYTES:
                raise SilentError(f"not the status server of a worker: {path} has more than {_MOST_BYTES >> 20} MiB")
    finally:
        writer.transport.abort()
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    words = head[:100].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise SilentError("not the status server of a worker: it does not speak HTTP")
    return int(words[1]), body
