"""The server engine: one OpenAI-compatible server, started here or running elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo.llm.exceptions import Unknown

from dynamo_worker import EngineDeadError, EngineInfo, StartError
from dynamo_worker.errors import InvalidRequestError, UsageError
from dynamo_worker.kit.blocking import in_thread
from dynamo_worker.kit.canary import MARK, text_canary
from dynamo_worker.kit.engine_lifecycle import EngineLifecycle
from dynamo_worker.kit.fields import refusal
from dynamo_worker.logs import get_logger
from dynamo_worker_server.arguments import HOST, Address, Settings
from dynamo_worker_server.server_process import ServerProcess, choose_port
from dynamo_worker_server.upstream import Model, UnexpectedAnswerError, Upstream

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Callable, Iterable

    from dynamo_worker.deadline import Deadline
    from dynamo_worker.engine import EngineContext, RequestContext, Send
    from dynamo_worker_server.upstream import ChunkStream

log = get_logger(__name__)

#: The APIs that are passed on.
_PATHS: Final = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_HEALTH_PATHS: Final = ("/health", "/v1/models")
#: Seconds between two looks at a server that starts, and for one look.
_POLL_SECONDS, _LOOK_SECONDS = 0.1, 10.0
#: Seconds between two lines of the log about a server that does not become ready.
_REPORT_SECONDS: Final = 30.0
#: Consecutive health checks that a server may fail.
_MOST_FAILURES: Final = 3
#: Seconds in which a process whose connections break turns out to have died.
_DEATH_SECONDS: Final = 0.5
_DEATH_POLLS: Final = 10
#: Fields that servers read without a look at their types: a client's mistake would be the server's failure.
_TYPES: Final = {"tools": (list,), "stream_options": (dict,), "response_format": (dict,), "logit_bias": (dict, list)}
#: What OpenSSL calls an answer in plain HTTP.
_NO_TLS: Final = "WRONG_VERSION_NUMBER"
#: Fields of a request that are Dynamo's, and not the server's to understand.
_OF_DYNAMO: Final = ("nvext", MARK)


class ServerEngine(EngineLifecycle):
    """Passes requests on to a server, as text, and watches it."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:  # noqa: ARG002 - as for all engines
        self._settings = Settings.of(args)
        self._process: ServerProcess | None = None
        self._upstream: Upstream | None = None
        self._health_path = ""
        #: The server's model for each name that clients use.
        self._models: dict[str, str] = {}
        self._apis: tuple[str, ...] = tuple(_PATHS)
        self._failures = 0
        self._failed = False

    # --- The engine protocol

    async def start(self, worker_id: int) -> EngineInfo:  # noqa: ARG002 - part of the protocol
        """Start the server unless it runs elsewhere, wait until it is ready, and ask for its models."""
        settings = self._settings
        token = await in_thread(settings.token, name="server-token")
        address = settings.attach
        if address is None:
            port = choose_port(settings.port)
            self._process = ServerProcess(settings.command, port)
            address = Address(HOST, port)
            log.info("Server started", command=self._process.command[0], port=port, pid=self._process.vital[0])
        # Reads files: OpenSSL's authorities, or those of SSL_CERT_FILE.
        tls = await in_thread(ssl.create_default_context, name="server-tls") if address.tls else None
        self._upstream = upstream = Upstream(address, token, tls)
        await self._wait_ready(upstream)
        if self._process is not None:
            await in_thread(self._process.find_listener, name="server-processes")
            await in_thread(self._process.find_others, settings.titles, name="server-processes")
        await _refuse_frontend(upstream)
        main, *others = await self._served(upstream)
        self._apis = await self._served_apis(upstream)
        log.info(
            "Server is ready",
            address=address, health=self._health_path, models=",".join(self._models), apis=",".join(self._apis),
        )  # fmt: skip
        return EngineInfo(
            model_name=main.name,
            model_path=main.name,
            model_aliases=tuple(model.name for model in others),
            endpoint_types=self._apis,
            context_length=main.context_length,
            model_input="text",
        )

    async def generate(self, request: dict[str, Any], context: RequestContext) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks with which the server answers."""
        async with self._asked(request, context) as (stream, completed):
            while chunks := await stream.read():
                for chunk in chunks:
                    yield completed(chunk)

    async def push(self, request: dict[str, Any], context: RequestContext, send: Send) -> None:
        """Send the chunks with which the server answers, as they arrive: no task is woken for each."""
        async with self._asked(request, context) as (stream, completed):
            await stream.deliver(lambda chunk: send(completed(chunk)))

    @contextlib.asynccontextmanager
    async def _asked(
        self, request: dict[str, Any], context: RequestContext
    ) -> AsyncIterator[tuple[ChunkStream, Callable[[dict[str, Any]], Any]]]:
        """Pass a request on; yield the stream of its answer, and what makes its chunks those that the frontend takes.

        The stream is closed at the end, which stops the server's work.
        """
        upstream = self._upstream
        if upstream is None:
            raise EngineDeadError("the server is not started")
        body = self._body(request)
        headers = {**(context.trace_headers() or {}), "X-Request-Id": context.id()}
        stream = None
        try:
            stream = await upstream.ask(_PATHS["chat" if "messages" in request else "completions"], body, headers)
            yield stream, _completed(request, context.id())
        except OSError as error:
            raise await self._broken(error) from None
        except Unknown:
            # A server says that its engine is dead before it dies itself.
            lost = self._process.lost() if self._process is not None else None
            if lost is not None:
                raise EngineDeadError(lost) from None
            raise
        finally:
            if stream is not None:
                stream.close()

    def _body(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return a request as the server gets it.

        :raises InvalidRequestError: a field has the wrong type.
        """
        for name, kinds in _TYPES.items():
            if not isinstance(request.get(name), (*kinds, type(None))):
                raise refusal(name, " or ".join(kind.__name__ for kind in kinds), request[name])
        body = {name: value for name, value in request.items() if name not in _OF_DYNAMO}
        asked = request.get("model")
        body["model"] = self._models.get(str(asked), asked)
        body["stream"] = True
        if not request.get("stream"):  # the frontend makes one answer of the chunks, with the token counts
            body["stream_options"] = {"include_usage": True}
        return body

    async def abort(self, request_id: str) -> None:
        """Do nothing: a request that ends early has closed its connection, at which the server stops."""

    def processes(self) -> Iterable[int]:
        """Return the pids of the command and of the process that listens on its port."""
        return () if self._process is None else tuple(self._process.vital)

    def canary_request(self) -> dict[str, Any]:
        """Return a request for one token."""
        return self._canary(self._apis[0])

    def _canary(self, api: str) -> dict[str, Any]:
        chat = {**text_canary(next(iter(self._models))), "temperature": 0.0}
        if api == "chat":
            return chat
        return {**{name: value for name, value in chat.items() if name != "messages"}, "prompt": "Hi"}

    # --- The lifecycle hooks

    async def check_health(self) -> None:
        """Ask the server; the worker judges for itself a server that does not answer.

        :raises EngineDeadError: its process has ended, or it fails again and again.
        """
        upstream, process = self._upstream, self._process
        if upstream is None:
            return
        if process is not None and not process.running:
            raise EngineDeadError(str(await in_thread(process.ended, name="server-output")))
        if self._settings.token_file is not None:
            upstream.token = await in_thread(self._settings.token, name="server-token")
        try:
            status = await upstream.status(self._health_path)
            problem = None if status == 200 else f"answers {self._health_path} with status {status}"
        except OSError as error:
            problem = f"does not answer {self._health_path}: {error}"
        if problem is None:
            self._failures = 0
            return
        self._failures += 1
        message = f"the server at {upstream.address} {problem}"
        if self._failures >= _MOST_FAILURES:
            raise EngineDeadError(f"{message}, {self._failures} times in a row")
        raise UnexpectedAnswerError(message)

    def mark_failed(self) -> None:
        """Remember that the server need not be asked to end."""
        self._failed = True

    async def shutdown(self, deadline: Deadline) -> None:
        """End the server's processes; a server that runs elsewhere goes on."""
        process, self._process = self._process, None
        if process is not None:
            await process.end(0.5 if self._failed else self._settings.stop_seconds, deadline.reserve(0.5))

    # --- The start

    async def _wait_ready(self, upstream: Upstream) -> None:
        settings = self._settings
        until = time.monotonic() + settings.start_seconds
        paths = [settings.health_path] if settings.health_path is not None else list(_HEALTH_PATHS)
        problem = "it has not answered"
        reported = time.monotonic()
        while True:
            if self._process is not None:
                ended = await in_thread(self._process.ended, name="server-output")
                if ended is not None:
                    raise StartError(ended)
            try:
                left = until - time.monotonic()
                status = await asyncio.wait_for(upstream.status(paths[0]), max(0.1, min(_LOOK_SECONDS, left)))
            except asyncio.TimeoutError:
                problem = f"it does not answer {paths[0]}"
            except OSError as error:
                problem = str(error)
                _check_tls(error, upstream.address)
            else:
                if status == 200:
                    self._health_path = paths[0]
                    return
                problem = f"it answers {paths[0]} with status {status}"
                if status in (404, 405, 501) and len(paths) > 1:
                    paths.pop(0)
                    continue
                _check_status(status, f"{upstream.address}{paths[0]}")
            if time.monotonic() >= until:
                raise StartError(
                    f"the server at {upstream.address} is not ready after {settings.start_seconds:g} s: {problem}",
                    hint="see its output above; --server-start-timeout sets how long the worker waits",
                )
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                log.info("Server is not ready yet", address=upstream.address, problem=problem)
            await asyncio.sleep(_POLL_SECONDS)

    async def _served(self, upstream: Upstream) -> list[Model]:
        """Return the models under the names that clients use, the main one first."""
        settings = self._settings
        try:
            found = await asyncio.wait_for(upstream.models(), _LOOK_SECONDS)
        except UnexpectedAnswerError as error:
            _check_status(error.status, f"{upstream.address}/v1/models")
            if settings.model is None:
                message = f"the server does not name its models: {error}"
                raise StartError(message, hint="name one: --server-model") from None
            found = [Model(settings.model)]
        except (OSError, asyncio.TimeoutError) as error:
            raise StartError(f"the server does not name its models: {str(error) or 'no answer'}") from error
        if settings.model is not None:
            found = [model for model in found if model.name == settings.model] or _unknown(settings.model, found)
        if not found:
            raise StartError("the server has no models", hint="load one, or name it with --server-model")
        if not settings.names:
            self._models = {model.name: model.name for model in found}
            return found
        main = found[0]
        self._models = dict.fromkeys(settings.names, main.name)
        return [Model(name, main.context_length) for name in settings.names]

    async def _served_apis(self, upstream: Upstream) -> tuple[str, ...]:
        """Return the APIs that the server has for its model: a model without a chat template answers no chats."""
        served, problems = [], []
        for api, path in _PATHS.items():
            body = {**self._canary(api), "model": next(iter(self._models.values())), "stream": True}
            try:
                # It may compile first: the same time as for everything else before the start is over.
                await asyncio.wait_for(_first_chunk(upstream, path, body), self._settings.start_seconds)
                served.append(api)
            except InvalidRequestError as error:
                problems.append(f"{path}: {error}")
            except asyncio.TimeoutError as error:
                raise StartError(
                    f"the server does not answer its first request: {path}: "
                    f"no answer after {self._settings.start_seconds:g} s",
                    hint="its health is fine; see whether it answers other clients",
                ) from error
            except (OSError, Unknown) as error:
                cause = await self._broken(error) if isinstance(error, OSError) else error
                raise StartError(f"the server does not answer its first request: {path}: {cause}") from error
        if not served:
            raise StartError(f"the server answers neither API: {'; '.join(problems)}")
        return tuple(served)

    async def _broken(self, error: OSError) -> BaseException:
        """Return what a broken connection means: the server's death, or that of one request."""
        process = self._process
        if process is not None:
            for _ in range(_DEATH_POLLS):
                if not process.running:
                    return EngineDeadError(str(await in_thread(process.ended, name="server-output")))
                await asyncio.sleep(_DEATH_SECONDS / _DEATH_POLLS)
        return error


def _completed(request: dict[str, Any], request_id: str) -> Callable[[dict[str, Any]], Any]:
    """Return a function that adds to a chunk what the frontend refuses it without, and some servers leave out."""
    chat = "messages" in request
    asked = request.get("model")
    missing = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": int(time.time()),
    }

    def completed(chunk: dict[str, Any]) -> dict[str, Any]:
        if missing:
            for name in [name for name in missing if name in chunk]:  # what the first chunk has, all have
                del missing[name]
            chunk.update(missing)
        chunk["model"] = asked
        return chunk

    return completed


async def _first_chunk(upstream: Upstream, path: str, body: dict[str, Any]) -> None:
    with contextlib.closing(await upstream.ask(path, body, {})) as stream:
        await stream.read()


async def _refuse_frontend(upstream: Upstream) -> None:
    """Refuse a server that would send requests back here: one became 1 200 in ten seconds (measured on 1.6.1).

    :raises StartError: it is a frontend of Dynamo.
    """
    try:
        found = await asyncio.wait_for(upstream.is_frontend(), _LOOK_SECONDS)
    except (OSError, asyncio.TimeoutError):  # what it serves is asked for next
        return
    if found:
        raise StartError(
            f"{upstream.address} is a frontend of Dynamo, which routes to workers such as this one: "
            "requests would go round in circles",
            hint="use the server behind it, or send requests to the frontend itself",
        )


def _unknown(name: str, found: list[Model]) -> list[Model]:
    listed = ", ".join(model.name for model in found[:8])
    raise UsageError(f"--server-model {name}: the server has {listed or 'no models'}")


def _check_tls(error: OSError, address: Address) -> None:
    """Refuse a failure of TLS that no waiting will change.

    :raises StartError: it is one.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        raise StartError(
            f"the certificate of {address} cannot be trusted: {error.verify_message}",
            hint="SSL_CERT_FILE names the file with the authority that vouches for it",
        ) from error
    if isinstance(error, ssl.SSLError) and error.reason == _NO_TLS:
        raise StartError(f"{address} does not speak TLS", hint="attach it with http:// instead") from error


def _check_status(status: int, where: str) -> None:
    """Refuse a status that no waiting will change.

    :raises StartError: it is one.
    """
    if status in (401, 403):
        raise StartError(
            f"{where} refuses the API key (status {status})", hint="--server-token-env or --server-token-file names it"
        )
    if 300 <= status < 400:
        raise StartError(f"{where} redirects elsewhere (status {status}), which is not followed")
