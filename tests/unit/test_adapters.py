"""LoRA adapters: loaded, registered, kept while they are used, and never half there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aio import settle

from dynamo_worker import EngineInfo, InvalidRequestError, adapters
from dynamo_worker.adapters import Adapter, Adapters

INFO = EngineInfo("model", "/m", model_aliases=["other"], max_loras=4)


class Loader:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses = False

    async def load(self, adapter: Adapter) -> None:
        if self.refuses:
            raise ValueError("rank 64 is too high")
        self.calls.append(f"load {adapter.name} {adapter.path}")

    async def unload(self, adapter: Adapter) -> None:
        self.calls.append(f"unload {adapter.name}")


class World:
    """Adapters of a served model, and what discovery was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.loader = Loader()
        self.refuses = False
        self.adapters = Adapters(self.loader)
        self.adapters.attach("endpoint", INFO)  # type: ignore[arg-type]
        monkeypatch.setattr(adapters, "register_adapter", self.register)
        monkeypatch.setattr(adapters, "unregister_model", self.unregister)
        (directory / "adapter_config.json").write_text("{}")
        self.load = {"lora_name": "poet", "source": {"uri": f"file://{directory}"}}

    async def register(self, endpoint: Any, info: EngineInfo, name: str) -> None:
        if self.refuses:
            raise ConnectionError("discovery is gone")
        self.loader.calls.append(f"register {name} {info.max_loras}")

    async def unregister(self, *, endpoint: Any, lora_name: str) -> None:
        self.loader.calls.append(f"unregister {lora_name}")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path)


def test_what_the_engine_has_loaded_by_itself() -> None:
    async def main() -> None:
        loader = Loader()
        own = Adapters(loader, {"painter": "/painter"})
        assert own.names() == ("painter",)
        adapter = own.begin("painter")
        assert adapter is not None
        Adapters.end(adapter)
        await own.unload({"lora_name": "painter"})
        assert loader.calls == ["unload painter"]

    asyncio.run(main())


def test_load_list_unload(world: World, tmp_path: Path) -> None:
    async def main() -> None:
        answer = await world.adapters.load(world.load)
        number = answer["lora_id"]
        assert (await world.adapters.load(world.load))["lora_id"] == number, "loading twice changes nothing"
        assert await world.adapters.list({}) == {"loras": {"poet": number}, "count": 1}
        await world.adapters.unload({"lora_name": "poet"})
        assert (await world.adapters.list({}))["count"] == 0
        assert world.loader.calls == [
            f"load poet {tmp_path}",
            "register poet 4",
            "unregister poet",
            "unload poet",
        ]

    asyncio.run(main())


def test_the_card_of_an_adapter_is_put_there_and_taken_away_on_purpose(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.asynccontextmanager
    async def changing() -> AsyncIterator[None]:
        world.loader.calls.append("changing")
        yield
        world.loader.calls.append("changed")

    monkeypatch.setattr(adapters.registration, "changing", changing)

    async def main() -> None:
        await world.adapters.load(world.load)
        assert world.loader.calls[-3:] == ["changing", "register poet 4", "changed"]
        await world.adapters.unload({"lora_name": "poet"})

    asyncio.run(main())
    assert world.loader.calls[-4:] == ["changing", "unregister poet", "changed", "unload poet"]


def test_it_is_unloaded_once_nobody_uses_it(world: World) -> None:
    async def main() -> None:
        await world.adapters.load(world.load)
        used = world.adapters.begin("poet")
        assert used is not None
        unloading = asyncio.ensure_future(world.adapters.unload({"lora_name": "poet"}))
        await settle()
        assert world.loader.calls[-1] == "unregister poet", "no new requests, but this one goes on"
        Adapters.end(used)
        await asyncio.wait_for(unloading, 5)
        assert world.loader.calls[-1] == "unload poet"

    asyncio.run(main())


def test_the_model_itself_and_names_that_nobody_has(world: World) -> None:
    for name in (None, "model", "other", "/m"):
        assert world.adapters.begin(name) is None
    with pytest.raises(InvalidRequestError, match="'painter'"):
        world.adapters.begin("painter")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "needed"),
        ({"lora_name": "a", "source": {}}, "needed"),
        ({"lora_name": 3, "source": {"uri": "/x"}}, "needed"),
        ({"lora_name": "a", "source": {"uri": "/nowhere"}}, "adapter_config.json"),
    ],
)
def test_wrong_loads(world: World, body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        asyncio.run(world.adapters.load(body))
    assert world.loader.calls == []


def test_what_the_engine_refuses_is_not_there(world: World) -> None:
    world.loader.refuses = True
    with pytest.raises(ValueError, match="rank 64"):
        asyncio.run(world.adapters.load(world.load))
    assert asyncio.run(world.adapters.list({}))["count"] == 0


def test_what_discovery_refuses_is_unloaded_again(world: World) -> None:
    world.refuses = True
    with pytest.raises(ConnectionError):
        asyncio.run(world.adapters.load(world.load))
    assert asyncio.run(world.adapters.list({}))["count"] == 0
    assert world.loader.calls[-1] == "unload poet"


def test_unloading_what_is_not_there(world: World) -> None:
    with pytest.raises(InvalidRequestError, match="painter"):
        asyncio.run(world.adapters.unload({"lora_name": "painter"}))
