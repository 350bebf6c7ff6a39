"""The server's HTTP interface: its health, its models, and streams of chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson
from dynamo.llm.exceptions import Unknown

from dynamo_worker.errors import InvalidRequestError, for_client, shown
from dynamo_worker_server.event_stream import EventStream, EventStreamError
from dynamo_worker_server.http_exchange import HttpError, HttpExchange, request_bytes

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from dynamo_worker_server.arguments import Address

#: Bytes of an answer that is no stream.
_BODY_BYTES: Final = 1_048_576
#: Models that are read from a list, and characters of a name.
_MOST_MODELS: Final = 1_000
_NAME_CHARACTERS: Final = 512
#: What a frontend of Dynamo says of its health beside the status (1.6.1).
_OF_FRONTENDS: Final = ("endpoints", "instances")
#: What a client's mistake is answered with; the client can mend it.
_CLIENT_ERRORS: Final = frozenset({400, 404, 405, 409, 413, 415, 422})
#: Another worker may take the request.
_BUSY: Final = frozenset({408, 425, 429, 502, 503, 504})
_DONE: Final = b"[DONE]"
_BROKEN_OFF: Final = "the server has ended its answer in the middle"
#: Words of servers such as TGI for what OpenAI calls otherwise.
_FINISH_REASONS: Final = {"eos_token": "stop", "stop_sequence": "stop", "eos": "stop", "max_tokens": "length"}
#: Headers that must not break a line: names of requests come from clients.
_UNSAFE: Final = frozenset(chr(code) for code in (*range(32), *range(127, 160)))


class UnexpectedAnswerError(Exception):
    """The server has answered something that is no answer to the question.

    :param status: the HTTP status; 0 if that was fine.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Model:
    """One of the server's models.

    :ivar name: its id.
    :ivar context_length: in tokens, prompt and answer together; None if the server does not say.
    """

    def __init__(self, name: str, context_length: int | None = None) -> None:
        self.name = name
        self.context_length = context_length


class Upstream:
    """One server.

    :param tls: for an address behind TLS.
    :ivar token: its API key, or None.
    """

    def __init__(self, address: Address, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.address = address
        self.token = token
        self.tls = tls

    # --- Questions about the server

    async def status(self, path: str) -> int:
        """Return the status with which the server answers a GET request; its body is dropped.

        :raises OSError: it does not answer, or not in HTTP.
        """
        status, _ = await self._get(path)
        return status

    async def models(self) -> list[Model]:
        """Return the server's models.

        :raises OSError: it does not answer, or not in HTTP.
        :raises UnexpectedAnswerError: it has no list of models.
        """
        status, body = await self._get("/v1/models")
        if status != 200:
            raise UnexpectedAnswerError(f"/v1/models is answered with status {status}", status)
        try:
            answer = orjson.loads(body)
        except ValueError as error:
            raise UnexpectedAnswerError(f"/v1/models is answered with what is not JSON: {error}") from None
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise UnexpectedAnswerError("/v1/models is answered without a list of models")
        named = [entry for entry in entries[:_MOST_MODELS] if isinstance(entry, dict)]
        return [_model(entry) for entry in named if _is_name(entry.get("id"))]

    async def is_frontend(self) -> bool:
        """Return whether this is a frontend of Dynamo: its health lists the workers that it routes to.

        :raises OSError: it does not answer, or not in HTTP.
        """
        _, body = await self._get("/health")
        try:
            answer = orjson.loads(body)
        except ValueError:
            return False
        return isinstance(answer, dict) and all(isinstance(answer.get(name), list) for name in _OF_FRONTENDS)

    async def _get(self, path: str) -> tuple[int, bytes]:
        exchange = await self._begin("GET", path, {})
        try:
            return await exchange.head(), await exchange.read_all(_BODY_BYTES)
        finally:
            exchange.close()

    # --- Requests

    async def ask(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> ChunkStream:
        """Send a request, and return the stream of its answer's chunks once it begins.

        :param path: such as ``/v1/chat/completions``.
        :raises InvalidRequestError: the server calls the request invalid, or it cannot be written as JSON.
        :raises OSError: the server cannot be reached, is busy, or sends what is not HTTP.
        :raises Unknown: it has failed, or its answer is no stream of events.
        """
        try:
            data = orjson.dumps(body)
        except TypeError as error:  # numbers beyond 64 bits, halves of surrogate pairs
            raise InvalidRequestError(f"the request cannot be passed on: {error}") from None
        exchange = await self._begin("POST", path, {"Content-Type": "application/json", **headers}, data)
        try:
            status = await exchange.head()
            if status != 200:
                await _refused(exchange, status)
            kind = exchange.headers.get(b"content-type", b"").lower()
            if not kind.startswith(b"text/event-stream"):
                raise Unknown(f"the server answers {path} with {shown(kind)}; expected a stream of events")
        except BaseException:
            exchange.close()
            raise
        return ChunkStream(exchange)

    async def _begin(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> HttpExchange:
        address = self.address
        sent = {"Host": address.authority, **{name: value for name, value in headers.items() if _is_safe(value)}}
        if self.token is not None:
            sent["Authorization"] = f"Bearer {self.token}"
        return await HttpExchange.begin(address, self.tls, request_bytes(method, address.prefix + path, sent, body))


class ChunkStream:
    """The chunks of one answer. To close it stops the server's work."""

    def __init__(self, exchange: HttpExchange) -> None:
        self._exchange = exchange
        self._events = EventStream()
        #: Whether a chunk had a finish reason, and whether the server has said that the stream is over.
        self._finished = self._over = False
        self._error: Exception | None = None

    async def read(self) -> list[dict[str, Any]]:
        """Return the chunks that have arrived, at least one; none at the end.

        :raises InvalidRequestError: the server calls the request invalid, after all.
        :raises OSError: it has ended the connection early, or sent what is not HTTP, or an endless event.
        :raises Unknown: it has failed, or sent what is no chunk.
        """
        while self._error is None and not self._over:
            received = await self._exchange.read()
            if not received:
                if not self._finished:
                    raise ConnectionResetError(_BROKEN_OFF)
                break
            chunks = self._chunks(received)
            if chunks:
                return chunks
        if self._error is not None:
            raise self._error
        return []

    async def deliver(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Call ``take`` for each chunk as it arrives, and return after the last one.

        :raises InvalidRequestError, OSError, Unknown: as :meth:`read` does.
        """

        def take_part(received: bytes) -> bool:
            if not self._over:
                for chunk in self._chunks(received):
                    take(chunk)
                if self._error is not None:
                    raise self._error
            return self._over

        await self._exchange.deliver(take_part)
        if not (self._over or self._finished):
            raise ConnectionResetError(_BROKEN_OFF)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._exchange.close()

    def _chunks(self, received: bytes) -> list[dict[str, Any]]:
        """Return what can be read; an error is kept until that has been sent."""
        chunks = []
        event = b""
        try:
            for event in self._events.feed(received):
                if event == _DONE:
                    self._over = True
                    break
                chunk = orjson.loads(event)
                for choice in chunk["choices"]:
                    if "index" not in choice:
                        choice["index"] = 0
                    reason = choice.get("finish_reason")
                    if reason:
                        self._finished = True
                        choice["finish_reason"] = _FINISH_REASONS.get(reason, reason)
                if chunk.get("error"):
                    self._error = _no_chunk(event)
                    break
                chunks.append(chunk)
        except (AttributeError, KeyError, TypeError, ValueError):
            self._error = _no_chunk(event)
        except EventStreamError as error:
            self._error = error
        return chunks


def _is_safe(value: str) -> bool:
    return len(value) <= _NAME_CHARACTERS and value.isascii() and _UNSAFE.isdisjoint(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _NAME_CHARACTERS


def _model(entry: Mapping[str, Any]) -> Model:
    meta = entry.get("meta")
    # The former of vLLM, SGLang and LMDeploy, the latter of llama.cpp.
    length = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return Model(entry["id"], length if type(length) is int and length > 0 else None)


def _no_chunk(event: bytes) -> Exception:
    """Return the error for an event that is no chunk: what the server says, or what is wrong with it."""
    try:
        answer = orjson.loads(event)
    except ValueError as error:
        return Unknown(f"the server has sent a chunk that is not JSON ({error}): {shown(event)}")
    if isinstance(answer, dict) and answer.get("error"):
        return _failure(_message(answer), _code(answer["error"]))
    return Unknown(f"the server has sent what is no chunk of OpenAI's API: {shown(event)}")


async def _refused(exchange: HttpExchange, status: int) -> None:
    """Raise the error for an answer that is not 200."""
    if 300 <= status < 400:
        where = shown(exchange.headers.get(b"location", b""))
        raise Unknown(f"the server redirects to {where}, which is not followed")
    try:
        body = await exchange.read_all(_BODY_BYTES)
    except HttpError:
        body = b""
    if status in (401, 403):
        raise Unknown(f"the server refuses the worker's API key (status {status})")
    try:
        message = _message(orjson.loads(body))
    except ValueError:
        message = body[:200].decode(errors="replace").strip()
    raise _failure(message or f"status {status}", status)


def _failure(message: str, status: int) -> Exception:
    if status in _CLIENT_ERRORS:
        return InvalidRequestError(for_client(message))
    if status in _BUSY:
        return ConnectionRefusedError(f"the server takes no requests (status {status}): {for_client(message)}")
    return Unknown(f"the server has failed: {for_client(message)}")


def _message(answer: object) -> str:
    """Return the message of an error in OpenAI's form, or in that of FastAPI and others."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return error if isinstance(error, str) else orjson.dumps(error).decode()


def _code(error: object) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int else 500
