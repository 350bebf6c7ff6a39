"""What an engine has because it pushes chunks and has operations."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import fake_context

from dynamo_worker.engine import HasControlRoutes, LocalContext, MayPause, PushesChunks
from dynamo_worker.kit.engine_control import EngineControl
from dynamo_worker.kit.push_engine import PushEngine


class Engine(PushEngine):
    async def push(self, request: Any, context: Any, send: Any) -> None:
        for token in request["token_ids"]:
            send({"token_ids": [token]})

    async def start(self) -> None:
        self._control = EngineControl(fake_context(), {"echo": self.echo}, {})

    async def echo(self, body: dict[str, Any]) -> dict[str, Any]:
        return body


async def nothing() -> bool:
    return True


def test_chunks_that_are_pushed_can_be_pulled() -> None:
    async def main() -> list[Any]:
        return [chunk async for chunk in Engine().generate({"token_ids": [1, 2]}, LocalContext("a"))]

    assert asyncio.run(main()) == [{"token_ids": [1]}, {"token_ids": [2]}]


def test_operations() -> None:
    async def main() -> None:
        engine = Engine()
        for capability in (PushesChunks, HasControlRoutes, MayPause):
            assert isinstance(engine, capability)
        assert engine.control_routes() == {}
        assert not engine.paused()
        await engine.start()
        assert set(engine.control_routes()) == {"echo"}
        assert engine._control is not None
        await engine._control.gate.withdraw(nothing, "asleep")
        assert engine.paused()

    asyncio.run(main())


def test_an_engine_without_push() -> None:
    with pytest.raises(TypeError, match="push"):
        PushEngine()  # type: ignore[abstract]
