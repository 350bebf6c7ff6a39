"""An engine on trial: created and started without a runtime, and asked what the worker would ask."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import copy
import functools
import inspect
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import EngineContext, EngineInfo, HasCanary, LocalContext
from dynamo_worker.errors import InvalidRequestError, describe
from dynamo_worker.host.plugins import plugin_errors
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.host.plugins.installed_plugins import ENGINE_GROUP, find
from dynamo_worker.host.requests.engine_checks import EngineChecks
from dynamo_worker.host.requests.kinds import kind_of
from dynamo_worker.testing.dialects import dialect_of

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from dynamo_worker.engine import Engine
    from dynamo_worker.host.requests.kinds import RequestKind
    from dynamo_worker.testing.dialects import Dialect
    from dynamo_worker.testing.subject import Subject

T = TypeVar("T")

#: Tokens of an answer that is still running when a check ends it.
LONG = 1500
#: Seconds for one answer of a few tokens.
ANSWER_SECONDS = 20.0
#: Most chunks that are taken of one answer: one that never ends must not fill the memory.
_MOST_CHUNKS = 20_000
#: Seconds that stand for a chunk where an answer has one only.
_STEP_SECONDS = 0.01
#: Seconds for a cancelled coroutine to end before it is given up.
_CANCEL_SECONDS = 2.0


class Finding(AssertionError):  # noqa: N818 - what a check finds, not what went wrong with the check
    """What is wrong with an engine.

    :param what: what it did, and what was expected.
    :param where: the place in the author's code, ``file:line`` where it is known.
    :param why: what it means in production.
    """

    def __init__(self, what: str, where: str, why: str) -> None:
        super().__init__(f"{what}\n    where: {where}\n    why it matters: {why}")
        self.what = what
        self.where = where
        self.why = why


@dataclass
class Answer:
    """One answer, chunk by chunk.

    :param request: the request, as it was sent.
    :param chunks: copies of the chunks, as each was when it came.
    :param originals: the chunks themselves.
    :param refusal: the message with which the engine refused the request; None if it answered.
    :param seconds: how long it took.
    """

    request: Any
    chunks: list[Any] = field(default_factory=list)
    originals: list[Any] = field(default_factory=list)
    refusal: str | None = None
    seconds: float = 0.0

    @property
    def dialect(self) -> Dialect:
        """How to read it."""
        return dialect_of(self.request)

    def content(self, index: int = 0) -> Any:
        """Return what one of the answers says: its tokens, or its text."""
        return self.dialect.content(self.chunks, index)

    @property
    def made(self) -> int:
        """The number of its tokens; skips the check if a text engine does not count them."""
        return self.dialect.made(self.chunks)

    @property
    def usage(self) -> dict[str, Any] | None:
        """The token counts; None if it has none."""
        return self.dialect.usage(self.chunks)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The chunks that belong to one of the answers, without those that have token counts only."""
        return [chunk for chunk in self.chunks if isinstance(chunk, dict) and self.dialect.index(chunk) is not None]

    @property
    def reasons(self) -> list[Any]:
        """The finish reasons, in the order in which they came."""
        found = [self.dialect.reason(chunk) for chunk in self.chunks if isinstance(chunk, dict)]
        return [reason for reason in found if reason is not None]


@functools.cache
def private_directories() -> str:
    """Return the directory of all private directories, which is removed when this process ends.

    Engines such as vLLM keep the path of the first one for the life of the process. It is short: Unix sockets below it
    must stay under 108 characters.
    """
    directory = tempfile.mkdtemp(prefix="dwc-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def definition(function: object) -> str:
    """Return where a function is defined, as ``file:line``."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)  # type: ignore[arg-type]
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def load_plugins(engine: str) -> Plugins:
    """Return the plugin of an installed engine, or of a module, validated as the worker does it."""
    installed = any(entry.name == engine for entry in find(ENGINE_GROUP))
    return Plugins.load(engine, modules=() if installed else (engine,), allowed=("none",))


def create(plugins: Plugins, flags: list[str], private_dir: Path) -> Engine:
    """Return an engine that is created and not started."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    plugins.add_arguments(parser)
    context = EngineContext(component="test.backend", private_dir=private_dir, supervised=False)
    return plugins.create_engine(parser.parse_args(flags), context)


class Trial:
    """One engine and its event loop, which runs while a check uses it.

    :param subject: describes the engine.
    :param plugins: its plugin.
    :param engine: the engine itself; None creates it.
    :param loop: a new event loop; None makes one.
    """

    def __init__(
        self,
        subject: Subject,
        plugins: Plugins,
        engine: Engine | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.subject = subject
        self.plugins = plugins
        self._directory = os.getcwd()
        self.loop = asyncio.new_event_loop() if loop is None else loop
        self.private_dir = Path(tempfile.mkdtemp(prefix="", dir=private_directories()))
        self.engine = engine if engine is not None else create(plugins, list(subject.flags), self.private_dir)
        self.info: EngineInfo | None = None
        #: Why the running check matters in production.
        self.why = ""
        #: Whether a check has found something, after which the engine may be broken.
        self.suspect = False
        self.closed = False
        self._names = 0
        self._plain: Answer | None = None

    # --- Findings

    def finding(self, what: str, where: object = None) -> Finding:
        """Return what to raise.

        :param where: a function of the author's, or text; None for the engine's class.
        """
        self.suspect = True
        if where is None:
            where = f"class {type(self.engine).__module__}.{type(self.engine).__qualname__}"
        return Finding(what, where if isinstance(where, str) else definition(where), self.why)

    def expect(self, condition: object, what: str, where: object = None) -> None:
        """Raise a finding unless the condition holds."""
        __tracebackhide__ = True
        if not condition:
            raise self.finding(what, where)

    def skip(self, reason: str) -> NoReturn:
        """Skip the check: it does not concern this engine."""
        pytest.skip(reason)

    # --- Running

    def run(self, work: Coroutine[Any, Any, T], seconds: float = ANSWER_SECONDS, where: object = None) -> T:
        """Run a coroutine on the engine's event loop; an exception of the engine's or a late end is a finding.

        :param seconds: the time limit, before the subject's patience.
        :param where: what is to blame if it does not end in time.
        """
        return self.loop.run_until_complete(self._bounded(work, seconds * self.subject.patience, where))

    async def _bounded(self, work: Coroutine[Any, Any, T], seconds: float, where: object) -> T:
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_SECONDS)
            raise self.finding(f"no end after {seconds:g} s", where if where is not None else self.engine.generate)
        try:
            return task.result()
        except (Finding, InvalidRequestError):
            raise
        except asyncio.CancelledError as error:
            raise self.finding("it cancelled the task that called it", where) from error
        except Exception as error:
            place = plugin_errors.where(error)
            raise self.finding(f"raised {describe(error)}", where if place.startswith("before") else place) from error

    # --- The life of the engine

    def start(self) -> EngineInfo:
        """Start the engine.

        :raises asyncio.TimeoutError: it takes longer than the subject's ``start_seconds``.
        """
        starting = asyncio.wait_for(self.engine.start(1), self.subject.start_seconds)
        self.info = info = self.loop.run_until_complete(starting)
        return info

    async def cleanup(self, seconds: float = 30.0) -> None:
        """Clean up as the worker does; a failure is a finding."""
        for outcome in await self.plugins.cleanup(self.engine, Deadline.after(seconds)):
            if outcome.error is not None:
                place = plugin_errors.where(outcome.error)
                self.suspect = True
                raise self.finding(
                    f"cleanup of plugin {outcome.plugin!r}: {describe(outcome.error)}",
                    getattr(self.engine, "shutdown", None) if place.startswith("before") else place,
                )

    def close(self, *, clean: bool = True) -> None:
        """End the engine and its loop.

        :param clean: call the plugin's cleanup first.
        """
        if self.closed:
            return
        self.closed = True
        try:
            if clean:
                self.loop.run_until_complete(self.plugins.cleanup(self.engine, Deadline.after(30)))
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                self.loop.run_until_complete(asyncio.wait(left, timeout=_CANCEL_SECONDS))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            os.chdir(self._directory)
            with contextlib.suppress(RuntimeError):  # a task that ignores its cancellation
                self.loop.close()

    def well(self) -> bool:
        """Return whether the engine still answers."""
        try:
            answer = self.run(self.ask(self.request(1)), 5.0)
        except (Exception, pytest.fail.Exception):
            return False
        return bool(answer.reasons)

    # --- Requests

    def name(self) -> str:
        """Return a request id that no other request has."""
        self._names += 1
        return f"conformance-{self._names}"

    def canary(self) -> Any:
        """Return the engine's canary request."""
        if not isinstance(self.engine, HasCanary):
            raise self.finding("warm-up and stall detection need canary_request(), which the engine lacks")
        return copy.deepcopy(self.engine.canary_request())

    def request(self, tokens: int, *, prompt: int = 0, **sections: Mapping[str, Any]) -> Any:
        """Return a request made from the engine's canary, answered with the likeliest tokens.

        :param tokens: ``max_tokens``.
        :param prompt: different numbers have different prompts; 0 is the canary's.
        :param sections: more fields, by section.
        """
        canary = self.canary()
        return self.dialect.request(canary, tokens, prompt, self.info, sections)

    @property
    def dialect(self) -> Dialect:
        """How the engine's requests are made: that of its canary."""
        return dialect_of(self.canary())

    @property
    def kind(self) -> RequestKind:
        """How the worker checks the engine's requests."""
        assert self.info is not None
        return kind_of(self.info, EngineChecks("the engine"))

    def plain(self) -> Answer:
        """Return the answer to a plain request, which all checks of chunks share."""
        if self._plain is None:
            self._plain = self.run(self.ask(self.request(12, prompt=1)), where=self.engine.generate)
        if self._plain.refusal is not None:
            raise self.finding(f"it refused its own canary with max_tokens=12: {self._plain.refusal}")
        return self._plain

    async def ask(self, request: Any, name: str = "", most: int = _MOST_CHUNKS) -> Answer:
        """Return the engine's answer to a request, which is checked first as the worker does it.

        :param name: the request's id.
        :param most: take no more chunks; close the stream and abort the request, as the worker does.
        """
        answer = Answer(copy.deepcopy(request))
        name = name or self.name()
        started = time.monotonic()
        try:
            stream = self.engine.generate(self.kind.checked(request), LocalContext(name))
            async for chunk in stream:
                answer.chunks.append(copy.deepcopy(chunk))
                answer.originals.append(chunk)
                if len(answer.chunks) >= most:
                    break
            if hasattr(stream, "aclose"):
                await stream.aclose()
            if not answer.reasons:
                await self.engine.abort(name)
        except InvalidRequestError as error:
            answer.refusal = str(error)
        answer.seconds = time.monotonic() - started
        return answer

    def answer(self, tokens: int, *, prompt: int = 1, **sections: Mapping[str, Any]) -> Answer:
        """Return the answer to one request, which may be a refusal."""
        return self.run(self.ask(self.request(tokens, prompt=prompt, **sections)), where=self.engine.generate)

    async def cancelled(self, after: int = 3, name: str = "", request: Any = None) -> float:
        """Run a long request, and cancel its consumer once it has some chunks, as the worker does.

        :param after: number of chunks; 0 cancels at once. Where an answer has one chunk only, so many hundredths of a
            second.
        :return: seconds from the cancellation to the consumer's end.
        """
        name = name or self.name()
        arrived = asyncio.Event()
        if after == 0:
            arrived.set()
        count = 0

        async def consume() -> None:
            nonlocal count
            stream = self.engine.generate(request or self.request(LONG, prompt=2), LocalContext(name))
            try:
                async for _ in stream:
                    count += 1
                    if count >= after:
                        arrived.set()
            finally:
                if hasattr(stream, "aclose"):
                    await stream.aclose()

        task = asyncio.ensure_future(consume())
        first = arrived.wait() if self.dialect.streams else asyncio.sleep(_STEP_SECONDS * after)
        waiting = asyncio.ensure_future(first)
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if after == 0:
            await asyncio.sleep(0)
        started = time.monotonic()
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=_CANCEL_SECONDS * self.subject.patience)
        seconds = time.monotonic() - started
        self.expect(done, f"generate did not end within {seconds:.1f} s of its cancellation", self.engine.generate)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            raise error
        return seconds
