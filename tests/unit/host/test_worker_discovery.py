"""What an engine may change in discovery: every change is announced, and none is made outside the worker's service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_worker import EngineInfo
from dynamo_worker.host.discovery import worker_discovery as module
from dynamo_worker.host.discovery.worker_discovery import WorkerDiscovery

INFO = EngineInfo("model", "/m", max_loras=4)


class World:
    """A worker's endpoint and whoever watches its entries; ``calls`` is what they saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.discovery = WorkerDiscovery(self)  # type: ignore[arg-type]
        self.discovery.model = INFO
        monkeypatch.setattr(module, "register_adapter", self._register)
        monkeypatch.setattr(module, "unregister_model", self._unregister)

    async def unregister_endpoint_instance(self) -> None:
        self.calls.append("out")

    async def register_endpoint_instance(self) -> None:
        self.calls.append("in")

    async def _register(self, endpoint: Any, info: EngineInfo, name: str) -> None:
        self.calls.append(f"register {name} {info.max_loras}")

    async def _unregister(self, *, endpoint: Any, lora_name: str) -> None:
        self.calls.append(f"unregister {lora_name}")

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        self.calls.append("changing")
        yield
        self.calls.append("changed")

    async def change_everything(self) -> None:
        await self.discovery.withdraw()
        await self.discovery.rejoin()
        await self.discovery.register_adapter("poet")
        await self.discovery.unregister_adapter("poet")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


CHANGES = ["out", "in", "register poet 4", "unregister poet"]


def test_changes_reach_the_runtime(world: World) -> None:
    asyncio.run(world.change_everything())
    assert world.calls == CHANGES


def test_who_watches_is_told_of_every_change(world: World) -> None:
    """Otherwise it would put back what was taken away on purpose."""
    world.discovery.registration = world  # type: ignore[assignment]
    asyncio.run(world.change_everything())
    assert world.calls == [call for change in CHANGES for call in ("changing", change, "changed")]


def test_nothing_is_changed_before_the_model_is_registered(world: World) -> None:
    world.discovery.model = None
    asyncio.run(world.change_everything())
    assert world.calls == []


def test_a_worker_that_stops_is_not_put_back(world: World) -> None:
    """An operator may wake an engine up while its worker drains."""

    async def main() -> None:
        await world.discovery.withdraw()
        world.discovery.close()
        await world.change_everything()

    asyncio.run(main())
    assert world.calls == ["out"]
