"""What an engine may change in discovery: every change is announced, and none is made outside the worker's service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo_worker import EngineInfo, InvalidRequestError
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


class Endpoint:
    """One endpoint; ``calls`` is what happened to it. ``refuses`` makes discovery fail."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls
        self.refuses = False

    async def unregister_endpoint_instance(self) -> None:
        await self._change("out")

    async def register_endpoint_instance(self) -> None:
        await self._change("in")

    async def _change(self, what: str) -> None:
        if self.refuses:
            raise ConnectionError("discovery is gone")
        self.calls.append(f"{self.name} {what}")


class TwoEndpoints:
    """A worker with two endpoints, of which ``m`` serves the model."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.main, self.other = Endpoint("m", self.calls), Endpoint("o", self.calls)
        self.discovery = WorkerDiscovery(self.main, "n/c/m")  # type: ignore[arg-type]
        self.discovery.add(self.other, "n/c/o")  # type: ignore[arg-type]
        self.discovery.model = INFO

    def did(self) -> list[str]:
        """Return what has happened since the last time."""
        calls, self.calls[:] = list(self.calls), []
        return calls


def test_the_operator_takes_every_endpoint_out() -> None:
    two = TwoEndpoints()

    async def main() -> None:
        await two.discovery.leave()
        assert two.did() == ["m out", "o out"]
        assert not two.discovery.present
        await two.discovery.leave()
        assert two.did() == [], "once: discovery refuses to remove what is not there"
        await two.discovery.enter()
        assert two.did() == ["m in", "o in"]
        await two.discovery.enter()
        assert two.did() == []
        assert two.discovery.present

    asyncio.run(main())


def test_a_paused_engine_stays_out_when_the_operator_is_done_and_the_other_way_round() -> None:
    two = TwoEndpoints()

    async def main() -> None:
        await two.discovery.withdraw()
        assert two.did() == ["m out"]
        assert two.discovery.engine_out
        await two.discovery.leave()
        assert two.did() == ["o out"]
        await two.discovery.enter()
        assert two.did() == ["o in"], "the engine sleeps"
        await two.discovery.leave()
        await two.discovery.rejoin()
        assert two.did() == ["o out"], "the worker is drained"
        await two.discovery.withdraw()
        await two.discovery.rejoin()
        assert two.did() == []
        await two.discovery.enter()
        assert two.did() == ["m in", "o in"]

    asyncio.run(main())


def test_after_a_failure_everything_is_tried_again() -> None:
    two = TwoEndpoints()

    async def main() -> None:
        two.main.refuses = True
        with pytest.raises(ConnectionError):
            await two.discovery.leave()
        assert two.discovery.present
        assert not two.discovery.withdrawn("n/c/m")
        two.main.refuses = False
        await two.discovery.leave()
        assert two.did() == ["m out", "o out"]
        two.other.refuses = True
        with pytest.raises(ConnectionError):
            await two.discovery.enter()
        two.other.refuses = False
        await two.discovery.leave()
        assert two.did() == ["m in", "m out", "o out"], "nobody knows whether the second one entered"

    asyncio.run(main())


def test_one_change_at_a_time() -> None:
    two = TwoEndpoints()

    async def main() -> None:
        await asyncio.gather(two.discovery.leave(), two.discovery.enter(), two.discovery.withdraw())
        assert two.did() == ["m out", "o out", "m in", "o in", "m out"]

    asyncio.run(main())


def test_an_entry_that_has_vanished_need_not_be_removed() -> None:
    two = TwoEndpoints()

    class Watch:
        def __init__(self) -> None:
            self.withdrawn: set[str] = set()

        @contextlib.asynccontextmanager
        async def changing(self) -> AsyncIterator[set[str]]:
            yield {"n/c/m"}

    async def main() -> None:
        watch = Watch()
        two.discovery.registration = watch  # type: ignore[assignment]
        await two.discovery.leave()
        assert two.did() == ["o out"]
        assert watch.withdrawn == {"n/c/m", "n/c/o"}, "neither is restored"
        await two.discovery.enter()
        assert two.did() == ["m in", "o in"]
        assert watch.withdrawn == set()

    asyncio.run(main())


def test_taints_reach_the_runtime_and_whoever_watches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def update(endpoint: Any, taints: set[str]) -> None:
        world.calls.append(f"taints {sorted(taints)}")

    monkeypatch.setattr(module, "update_model_taints", update)
    world.discovery.registration = world  # type: ignore[assignment]
    asyncio.run(world.discovery.set_taints(["b", "a"]))
    assert world.calls == ["changing", "taints ['a', 'b']", "changed"]
    world.discovery.close()
    with pytest.raises(InvalidRequestError, match="no registered model"):
        asyncio.run(world.discovery.set_taints([]))
