"""What every engine plugin has to keep: the tests a plugin's author runs first."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import Engine, EngineContext, EngineInfo, HasCanary, LocalContext, Request
from dynamo_worker.errors import EngineDeadError
from dynamo_worker.host.plugins.facade import Plugins
from dynamo_worker.supervisor import linux

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from dynamo_worker.testing.subject import Subject


class EngineConformance:
    """The tests of one engine: that of the fixture ``subject``. Derive from it in a test module."""

    @pytest.fixture
    def plugins(self, subject: Subject) -> Plugins:
        """Return the plugin, loaded and validated as the worker does it."""
        return Plugins.load(subject.engine)

    @pytest.fixture
    def engine(self, subject: Subject, plugins: Plugins, tmp_path: Path) -> Engine:
        """Return an engine that is created but not started."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        plugins.add_arguments(parser)
        context = EngineContext(component="test.backend", private_dir=tmp_path, supervised=False)
        return plugins.create_engine(parser.parse_args(list(subject.flags)), context)

    @contextlib.asynccontextmanager
    async def started(self, subject: Subject, plugins: Plugins, engine: Engine) -> AsyncIterator[EngineInfo]:
        """Run the engine for the length of a ``with`` block."""
        try:
            yield await asyncio.wait_for(engine.start(1), subject.start_seconds)
        finally:
            outcomes = await plugins.cleanup(engine, Deadline.after(30))
            assert all(outcome.ok for outcome in outcomes), outcomes

    def request(self, engine: Engine, tokens: int) -> Request:
        """Return a request for so many tokens, made from the engine's own canary."""
        assert isinstance(engine, HasCanary)
        request = engine.canary_request()
        request["stop_conditions"] = {
            **(request.get("stop_conditions") or {}),
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        return request

    def test_create_starts_nothing(self, engine: Engine) -> None:
        assert list(engine.processes()) == []

    def test_cleanup_of_an_engine_that_never_started(self, plugins: Plugins, engine: Engine) -> None:
        async def check() -> None:
            outcomes = await plugins.cleanup(engine, Deadline.after(10))
            assert all(outcome.ok for outcome in outcomes), outcomes

        asyncio.run(check())

    def test_it_has_a_canary(self, engine: Engine) -> None:
        assert isinstance(engine, HasCanary), "warm-up and stall detection need canary_request()"

    def test_generate(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        async def check() -> None:
            async with self.started(subject, plugins, engine) as info:
                assert info.model_name
                chunks = [chunk async for chunk in engine.generate(self.request(engine, 5), LocalContext("a"))]
                assert sum(len(chunk["token_ids"]) for chunk in chunks) == 5
                assert chunks[-1].get("finish_reason") == "length"
                assert all(chunk.get("finish_reason") is None for chunk in chunks[:-1])

        asyncio.run(check())

    def test_healthy_while_it_runs(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        async def check() -> None:
            async with self.started(subject, plugins, engine):
                outcomes = await plugins.check_health(engine, timeout=10)
                assert outcomes, "the engine's plugin implements no check_health"
                assert all(outcome.ok for outcome in outcomes), outcomes

        asyncio.run(check())

    def test_a_cancelled_request_leaves_the_engine_well(
        self, subject: Subject, plugins: Plugins, engine: Engine
    ) -> None:
        async def check() -> None:
            async with self.started(subject, plugins, engine):
                stream = engine.generate(self.request(engine, 10_000), LocalContext("long"))

                async def consume() -> None:
                    async for _ in stream:
                        pass

                task = asyncio.ensure_future(consume())
                await asyncio.sleep(0.2)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, EngineDeadError):
                    await task
                await engine.abort("long")
                await engine.abort("a request nobody made")
                chunks = [chunk async for chunk in engine.generate(self.request(engine, 1), LocalContext("next"))]
                assert chunks[-1].get("finish_reason")

        asyncio.run(check())

    def test_drain_and_cleanup_twice(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        async def check() -> None:
            async with self.started(subject, plugins, engine):
                for _ in range(2):
                    outcomes = await plugins.drain(engine, Deadline.after(10))
                    assert all(outcome.ok for outcome in outcomes), outcomes
                outcomes = await plugins.cleanup(engine, Deadline.after(30))
                assert all(outcome.ok for outcome in outcomes), outcomes

        asyncio.run(check())

    def test_processes_are_gone_after_cleanup(self, subject: Subject, plugins: Plugins, engine: Engine) -> None:
        async def check() -> list[int]:
            async with self.started(subject, plugins, engine):
                return list(engine.processes())

        for pid in asyncio.run(check()):
            stat = linux.read_stat(pid)
            # A dead one may still wait to be reaped by its parent.
            assert stat is None or stat.ended, f"process {pid} survived cleanup"
