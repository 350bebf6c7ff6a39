"""LoRA adapters: loaded, registered, kept while they are used, and never half there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aio import settle
from fakes import FakeDiscovery, fake_context

from dynamo_worker import InvalidRequestError
from dynamo_worker.kit import lora
from dynamo_worker.kit.lora import LoraAdapter, LoraAdapters, OnDemand

#: The model itself: its names, and its path.
MODEL_NAMES = ("model", "other", "/m")


class Loader:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses = False

    async def load(self, adapter: LoraAdapter) -> None:
        if self.refuses:
            raise ValueError("rank 64 is too high")
        self.calls.append(f"load {adapter.name} {adapter.path}")

    async def unload(self, adapter: LoraAdapter) -> None:
        self.calls.append(f"unload {adapter.name}")


class World:
    """Adapters of a served model, and what discovery was told."""

    def __init__(self, directory: Path) -> None:
        self.loader = Loader()
        self.discovery = FakeDiscovery(self.loader.calls)
        context = fake_context(self.discovery, str(directory), "s3://bucket")
        self.adapters = LoraAdapters(self.loader, context, MODEL_NAMES)
        (directory / "adapter_config.json").write_text("{}")
        self.load = {"lora_name": "poet", "source": {"uri": f"file://{directory}"}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_the_engine_has_loaded_by_itself() -> None:
    async def main() -> None:
        loader = Loader()
        own = LoraAdapters(loader, fake_context(), loaded={"painter": "/painter"})
        assert own.names() == ("painter",)
        adapter = own.begin("painter")
        assert adapter is not None
        LoraAdapters.end(adapter)
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
            "register poet",
            "unregister poet",
            "unload poet",
        ]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a" * 257, "257 characters are too many"),
        ("a" * 10**6, "1000000 characters are too many"),
        ("model", "the model itself"),
        ("other", "the model itself"),
        ("/m", "the model itself"),
        ("a\nb", "control characters"),
        ("a\u2028b", "control characters"),
        ("\u202ea", "control characters"),
        (" a", "surrounding spaces"),
    ],
)
def test_names_under_which_nothing_is_loaded(world: World, name: str, why: str) -> None:
    """Requests for the model itself would go to the adapter; a line break would forge a line of the log."""
    with pytest.raises(InvalidRequestError, match=why) as raised:
        asyncio.run(world.adapters.load({**world.load, "lora_name": name}))
    assert len(str(raised.value)) < 300
    assert world.loader.calls == []


@pytest.mark.parametrize("name", ["a" * 256, "org/poet-7b_v2.1", "Dichter für Gedichte"])
def test_names_that_are_fine(world: World, name: str) -> None:
    asyncio.run(world.adapters.load({**world.load, "lora_name": name}))
    assert world.adapters.names() == (name,)


@pytest.mark.parametrize("source", ["file:///x", ["uri"], {"uri": "file:///" + "x" * 4096}])
def test_sources_that_are_none(world: World, source: Any) -> None:
    with pytest.raises(InvalidRequestError, match="source"):
        asyncio.run(world.adapters.load({**world.load, "source": source}))


def test_two_names_with_one_id(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id has 32 bits and is made of the name; vLLM would answer for one adapter with the other."""
    monkeypatch.setattr(lora, "lora_name_to_id", lambda _: 7)

    async def main() -> None:
        await world.adapters.load(world.load)
        with pytest.raises(InvalidRequestError, match="'singer' has the same id as the loaded adapter 'poet'"):
            await world.adapters.load({**world.load, "lora_name": "singer"})

    asyncio.run(main())
    assert world.adapters.names() == ("poet",)


def test_an_unknown_name_is_shown_in_short(world: World) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        world.adapters.begin("x" * 10**6)
    assert len(str(raised.value)) < 200


def test_it_is_unloaded_once_nobody_uses_it(world: World) -> None:
    async def main() -> None:
        await world.adapters.load(world.load)
        used = world.adapters.begin("poet")
        assert used is not None
        unloading = asyncio.ensure_future(world.adapters.unload({"lora_name": "poet"}))
        await settle()
        assert world.loader.calls[-1] == "unregister poet", "no new requests, but this one goes on"
        LoraAdapters.end(used)
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
        ({}, "expected"),
        ({"lora_name": "a", "source": {}}, "expected"),
        ({"lora_name": 3, "source": {"uri": "/x"}}, "expected"),
        ({"lora_name": "a", "source": {"uri": "ROOT/nowhere"}}, "adapter_config.json"),
        ({"lora_name": "a", "source": {"uri": "/nowhere"}}, "not below a directory"),
        ({"lora_name": "a", "source": {"uri": "hf://org/model"}}, "not below a directory"),
    ],
)
def test_wrong_loads(world: World, tmp_path: Path, body: dict[str, Any], message: str) -> None:
    source = body.get("source", {})
    if "uri" in source:
        body = {**body, "source": {"uri": source["uri"].replace("ROOT", str(tmp_path))}}
    with pytest.raises(InvalidRequestError, match=message):
        asyncio.run(world.adapters.load(body))
    assert world.loader.calls == []


def test_nothing_is_loaded_unless_the_operator_allows_it(world: World, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--control-load-root"):
        asyncio.run(LoraAdapters(world.loader, fake_context()).load(world.load))
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(InvalidRequestError, match="not below"):
        asyncio.run(world.adapters.load({"lora_name": "a", "source": {"uri": f"{tmp_path}/link/etc"}}))
    assert world.loader.calls == []


def test_a_uri_is_downloaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Downloader:
        async def download_if_needed(self, uri: str) -> str:
            return f"/cache/{uri.rpartition('/')[2]}"

    monkeypatch.setattr(lora, "LoRADownloader", Downloader)
    asyncio.run(world.adapters.load({"lora_name": "poet", "source": {"uri": "s3://bucket/poet"}}))
    assert world.loader.calls[0] == "load poet /cache/poet"


def test_what_the_engine_refuses_is_not_there(world: World) -> None:
    world.loader.refuses = True
    with pytest.raises(ValueError, match="rank 64"):
        asyncio.run(world.adapters.load(world.load))
    assert asyncio.run(world.adapters.list({}))["count"] == 0


def test_what_discovery_refuses_is_unloaded_again(world: World) -> None:
    world.discovery.refuses = True
    with pytest.raises(ConnectionError):
        asyncio.run(world.adapters.load(world.load))
    assert asyncio.run(world.adapters.list({}))["count"] == 0
    assert world.loader.calls[-1] == "unload poet"


def test_unloading_what_is_not_there(world: World) -> None:
    with pytest.raises(InvalidRequestError, match="painter"):
        asyncio.run(world.adapters.unload({"lora_name": "painter"}))


def test_an_engine_that_loads_on_demand_only_checks() -> None:
    checked: list[str] = []

    def check(adapter: LoraAdapter) -> None:
        checked.append(adapter.name)
        if adapter.name == "broken":
            raise InvalidRequestError("no such directory")

    async def main() -> None:
        loader = OnDemand(check)
        poet = LoraAdapter("poet", "/poet", 1)
        await loader.load(poet)
        await loader.unload(poet)
        with pytest.raises(InvalidRequestError, match="no such directory"):
            await loader.load(LoraAdapter("broken", "/broken", 2))

    asyncio.run(main())
    assert checked == ["poet", "broken"]
