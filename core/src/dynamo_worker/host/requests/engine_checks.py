"""Checks of an engine's interface and first answer: its bugs must show at the start, not in clients' requests."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker.embeddings import EmbeddingSpec
from dynamo_worker.engine import EndpointSpec, EngineInfo, PushesChunks
from dynamo_worker.errors import InvalidRequestError, StartError
from dynamo_worker.host.plugins.plugin_errors import where
from dynamo_worker.host.plugins.plugin_imports import what_moved

if TYPE_CHECKING:
    from dynamo_worker.engine import Engine, Request

#: Finish reasons (``FinishReason`` of Dynamo 1.6.1), besides ``error: MESSAGE`` and ``{"error": MESSAGE}``.
FINISH_REASONS: Final = frozenset({"eos", "length", "stop", "cancelled", "content_filter"})
#: Token ids are unsigned 32-bit integers in Dynamo.
_TOKEN_LIMIT: Final = 2**32


class OtherKindError(Exception):
    """A request is of another kind than the engine's: its frontend knows workers of both kinds for the model."""


class EngineChecks:
    """The checks of one engine, in the order in which the start makes them.

    :param engine: the engine's name in messages.
    """

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def problem(self, what: str) -> StartError:
        """Return the error for a violation of the engine's interface."""
        return StartError(f"{self._engine}: {what}", hint="report this to the engine's author")

    def methods(self, engine: Engine) -> None:
        """Check the methods of an engine before its start.

        :raises StartError: a method is missing or of the wrong kind.
        """
        for name in ("start", "generate", "abort", "processes"):
            if not callable(getattr(engine, name, None)):
                raise self.problem(f"it has no method {name!r}")
        if inspect.iscoroutinefunction(engine.generate):
            raise self.problem(
                "generate is a coroutine function; it must return an asynchronous iterator (`async def` with `yield`)"
            )
        for name in ("start", "abort", *(("push",) if isinstance(engine, PushesChunks) else ())):
            if inspect.isasyncgenfunction(getattr(engine, name)):
                raise self.problem(
                    f"{name} is an asynchronous generator; it must be awaitable (`async def`, no `yield`)"
                )

    async def started(self, start: object) -> EngineInfo:
        """Await the start and return its result.

        :param start: the return value of ``Engine.start``.
        :raises StartError: it cannot be awaited, its result is not a valid :class:`EngineInfo`, or it imports a name
            that has moved.
        """
        if not isinstance(start, Awaitable):
            raise self.problem(f"start returned {start!r:.80}, which cannot be awaited; make it `async`")
        try:
            info = await start
        except (ImportError, AttributeError) as error:
            moved = what_moved(error)
            if moved is None:
                raise
            raise StartError(
                f"{self._engine} {moved} ({where(error)})",
                hint="upgrade its package, or import what docs/plugins.md lists",
            ) from error
        if not isinstance(info, EngineInfo):
            raise self.problem(f"start: expected an EngineInfo, got {info!r:.80}")
        for field in dataclasses.fields(info):
            value, kind = getattr(info, field.name), str(field.type)
            expected = _KINDS.get(kind.removesuffix(" | None"))
            if expected and type(value) is not expected and not (value is None and kind.endswith("None")):
                raise self.problem(
                    f"start returned an EngineInfo with {field.name}: expected {kind}, got {value!r:.80}"
                )
        for spec in info.endpoints:
            if not isinstance(spec, EndpointSpec):
                raise self.problem(
                    f"start returned an EngineInfo with endpoints: expected an EndpointSpec, got {spec!r:.80}"
                )
        self._check_embeddings(info.embeddings)
        return info

    def _check_embeddings(self, spec: object) -> None:
        if spec is None:
            return
        if not isinstance(spec, EmbeddingSpec):
            raise self.problem(
                f"start returned an EngineInfo with embeddings: expected an EmbeddingSpec, got {spec!r:.80}"
            )
        for name in ("dimensions", "most_inputs"):
            value = getattr(spec, name)
            if type(value) is not int or value < 1:
                raise self.problem(
                    f"start returned an EmbeddingSpec with {name}: expected 1 or more, got {value!r:.80}"
                )
        shorter: object = spec.shorter
        sizes = shorter if isinstance(shorter, Sequence) else () if isinstance(shorter, bool) else (None,)
        if not all(type(size) is int and 0 < size <= spec.dimensions for size in sizes):
            raise self.problem(
                f"start returned an EmbeddingSpec with shorter: expected True, or numbers from 1 to "
                f"{spec.dimensions}, got {shorter!r:.80}"
            )

    def pids(self, processes: object) -> list[int]:
        """Return the pids of the engine's processes.

        :param processes: the return value of ``Engine.processes``.
        :raises StartError: it does not consist of pids.
        """
        pids = list(processes) if isinstance(processes, Iterable) else None
        if pids is None or not all(type(pid) is int and pid > 0 for pid in pids):
            raise self.problem(f"processes: expected pids, got {processes!r:.80}")
        return pids

    def canary(self, request: object, checked: Callable[[Any], Any]) -> Request:
        """Return the engine's canary request.

        :param checked: checks a request of its kind.
        :raises StartError: it is not a valid request.
        """
        try:
            request_: Request = checked(request)
        except InvalidRequestError as error:
            raise self.problem(f"canary_request returned an invalid request: {error}") from None
        return request_

    def stream(self, stream: object) -> AsyncIterator[Any]:
        """Return the stream of an answer.

        :param stream: the return value of ``Engine.generate``.
        :raises StartError: it is not an asynchronous iterator.
        """
        if inspect.iscoroutine(stream):
            stream.close()
        if not isinstance(stream, AsyncIterator):
            raise self.problem(f"generate: expected an asynchronous iterator, got {stream!r:.80}")
        return stream

    def mapping(self, method: str, value: object) -> Mapping[str, Any]:
        """Return the functions by name that a method returned.

        :raises StartError: it is not a mapping of names to functions.
        """
        if not isinstance(value, Mapping) or not all(
            isinstance(name, str) and callable(function) for name, function in value.items()
        ):
            raise self.problem(f"{method}: expected a mapping of names to functions, got {value!r:.80}")
        return value


class AnswerCheck:
    """Checks the chunks of one answer.

    :param checks: the checks of the engine that answers.
    :param vocab_size: number of token ids of the model; None if it is unknown.
    """

    def __init__(self, checks: EngineChecks, vocab_size: int | None) -> None:
        self._checks = checks
        self._limit = _TOKEN_LIMIT if vocab_size is None else vocab_size
        self._finished = False

    def take(self, chunk: object) -> None:
        """Check the next chunk.

        :raises StartError: no frontend could use it.
        """
        wrong = self._wrong(chunk)
        if wrong is not None:
            raise self._checks.problem(f"its first answer {wrong}; the chunk is {chunk!r:.200}")

    def end(self) -> None:
        """Check that the answer was complete.

        :raises StartError: no chunk had a finish reason.
        """
        if not self._finished:
            raise self._checks.problem("its first answer ended without a finish_reason")

    def _wrong(self, chunk: object) -> str | None:
        if not isinstance(chunk, dict):
            return f"has a chunk of type {type(chunk).__name__}, expected a dict"
        if self._finished:
            return "continues after its finish_reason"
        tokens = chunk.get("token_ids")
        if not isinstance(tokens, (list, tuple)):
            return "has a chunk without a list of token_ids (which may be empty)"
        for token in tokens:
            if type(token) is not int:
                return f"has the token {token!r:.80}: expected an int, got {type(token).__name__}"
            if not 0 <= token < self._limit:
                unknown = self._limit == _TOKEN_LIMIT
                limit = "a 32-bit number" if unknown else f"in its vocabulary of {self._limit} tokens"
                return f"has the token {token}, which is not {limit}"
        return self._wrong_end(chunk) or not_encodable(chunk)

    def _wrong_end(self, chunk: Mapping[str, Any]) -> str | None:
        reason = chunk.get("finish_reason")
        if reason is None:
            return None
        self._finished = True
        error = reason.get("error") if isinstance(reason, dict) else None
        if error is not None or str(reason).startswith("error"):
            return f"ended with an error: {error or reason}"
        if not isinstance(reason, str) or reason not in FINISH_REASONS:
            return f"has the finish_reason {reason!r:.80}; expected one of {', '.join(sorted(FINISH_REASONS))}"
        return None


def not_encodable(chunk: object) -> str | None:
    """Return why a chunk cannot be sent, or None: it must be JSON, in which bytes are allowed."""

    def unknown(value: object) -> str:
        if isinstance(value, bytes):
            return ""
        raise TypeError(f"{type(value).__name__} is not a JSON type")

    try:
        json.dumps(chunk, default=unknown)
    except (TypeError, ValueError, RecursionError) as error:
        return f"has a chunk that cannot be encoded ({error})"
    return None


#: The annotations of :class:`EngineInfo` that are checked.
_KINDS: Final[Mapping[str, type]] = {"str": str, "int": int}
