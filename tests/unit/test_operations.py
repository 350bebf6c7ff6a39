"""Operations on a serving engine: their answers, and how an engine steps out of discovery and back in."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from aio import settle, until

from dynamo_worker import EngineInfo, operations, registration
from dynamo_worker.adapters import Adapter, Adapters
from dynamo_worker.operations import Operations, Presence
from dynamo_worker.registration import FileStore


async def echo(body: dict[str, Any]) -> dict[str, Any]:
    if "fail" in body:
        raise RuntimeError(body["fail"])
    return {"got": body}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"a": 1}, {"status": "success", "got": {"a": 1}}),
        (None, {"status": "success", "got": {}}),
        ({"fail": "no"}, {"status": "error", "message": "no"}),
        ({"fail": "x" * 9999}, {"status": "error", "message": "x" * 1000 + "…"}),
        ({"fail": ""}, {"status": "error", "message": "RuntimeError"}),
        ([1], {"status": "error", "message": "the body must be a JSON object"}),
    ],
)
def test_every_call_gets_an_answer(body: Any, expected: dict[str, Any]) -> None:
    async def main() -> None:
        assert await operations.routes({"echo": echo})["echo"](body) == expected
        spec = operations.endpoint("echo", echo)
        assert not spec.takes_tokens
        assert spec.generate is not None
        assert [chunk async for chunk in spec.generate(body, None)] == [expected]  # type: ignore[arg-type]

    asyncio.run(main())


class Endpoint:
    def __init__(self) -> None:
        self.calls: list[str] = []

    async def unregister_endpoint_instance(self) -> None:
        self.calls.append("out")

    async def register_endpoint_instance(self) -> None:
        self.calls.append("in")


async def nothing() -> bool:
    return True


def present() -> tuple[Presence, Endpoint]:
    presence, endpoint = Presence(), Endpoint()
    presence.attach(endpoint)  # type: ignore[arg-type]
    return presence, endpoint


def test_out_and_in_again() -> None:
    async def main() -> None:
        presence, endpoint = present()
        assert await presence.step_out(nothing, "asleep")
        assert presence.reasons == {"asleep"}
        assert presence.away
        assert not await presence.step_out(nothing, "asleep"), "it is away already"
        assert await presence.step_in(nothing, "asleep")
        assert not presence.reasons
        assert not presence.away
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())


def test_who_has_stepped_out_is_not_put_back(tmp_path: Path) -> None:
    entry = tmp_path / "0123456789abcdef"
    entry.write_text("here")

    class FileEndpoint:
        async def unregister_endpoint_instance(self) -> None:
            entry.unlink()

    async def main() -> None:
        store = FileStore(str(tmp_path), entry.name)
        watched = registration.Registration(store, lambda error: None, timeout=30)
        watching = asyncio.ensure_future(watched.run())
        await until(lambda: watched._call is not None and watched._call.done())
        presence = Presence()
        presence.attach(FileEndpoint())  # type: ignore[arg-type]
        await presence.step_out(nothing, "asleep")
        assert store.missing() == []
        await watched.close()
        watching.cancel()

    asyncio.run(main())


def test_discovery_is_left_before_the_engine_is_paused_and_entered_after_it_is_back() -> None:
    async def main() -> None:
        presence, endpoint = present()

        async def note(what: str) -> bool:
            endpoint.calls.append(what)
            return True

        await presence.step_out(lambda: note("paused"), "asleep")
        await presence.step_in(lambda: note("resumed"), "asleep")
        assert endpoint.calls == ["out", "paused", "resumed", "in"]

    asyncio.run(main())


def test_it_stays_out_until_the_last_reason_is_gone() -> None:
    async def main() -> None:
        presence, endpoint = present()
        await presence.step_out(nothing, "weights", "cache")
        assert await presence.step_out(nothing, "cache", "paused"), "one of them is new"
        assert presence.reasons == {"weights", "cache", "paused"}
        assert not await presence.step_in(nothing, "paused")
        assert not await presence.step_in(nothing, "weights")
        assert await presence.step_in(nothing, "cache", "weights")
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())


def test_nothing_is_resumed_for_a_reason_that_there_is_not() -> None:
    async def main() -> None:
        presence, endpoint = present()

        async def resume() -> bool:
            raise AssertionError("resumed")

        assert await presence.step_in(resume, "asleep")
        await presence.step_out(nothing, "paused")
        assert not await presence.step_in(resume, "asleep")
        assert endpoint.calls == ["out"]

    asyncio.run(main())


def test_who_pauses_or_resumes_sees_the_reasons_as_they_were() -> None:
    async def main() -> None:
        presence, _ = present()
        seen = []

        async def look() -> bool:
            assert presence.away
            seen.append(set(presence.reasons))
            return True

        await presence.step_out(look, "a")
        await presence.step_out(look, "a", "b")
        await presence.step_in(look, "a")
        assert seen == [set(), {"a"}, {"a", "b"}]

    asyncio.run(main())


async def fail() -> bool:
    raise RuntimeError("busy")


def test_an_engine_that_does_not_pause_serves_on() -> None:
    async def main() -> None:
        presence, endpoint = present()
        with pytest.raises(RuntimeError, match="busy"):
            await presence.step_out(fail, "asleep")
        assert not presence.reasons
        assert not presence.away
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())


def test_a_second_reason_that_does_not_come_about_leaves_the_first_one() -> None:
    async def main() -> None:
        presence, endpoint = present()
        await presence.step_out(nothing, "paused")
        with pytest.raises(RuntimeError, match="busy"):
            await presence.step_out(fail, "cache")
        assert presence.reasons == {"paused"}
        assert endpoint.calls == ["out"]

    asyncio.run(main())


def test_an_engine_that_is_partly_back_or_does_not_come_back_stays_out() -> None:
    async def main() -> None:
        presence, endpoint = present()
        await presence.step_out(nothing, "asleep")

        async def partly() -> bool:
            return False

        assert not await presence.step_in(partly, "asleep")
        with pytest.raises(RuntimeError, match="busy"):
            await presence.step_in(fail, "asleep")
        assert presence.reasons == {"asleep"}
        assert endpoint.calls == ["out"]

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_stepping_aside_for_some_work(fails: bool) -> None:
    async def main() -> None:
        presence, endpoint = present()

        async def work() -> str:
            assert presence.away
            endpoint.calls.append("work")
            if fails:
                raise RuntimeError("no")
            return "done"

        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            assert await presence.step_aside(work) == "done"
        assert not presence.away
        await presence.step_out(nothing, "asleep")
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            await presence.step_aside(work)
        assert presence.away, "there is still a reason"
        assert endpoint.calls == ["out", "work", "in", "out", "work"]

    asyncio.run(main())


def test_one_after_the_other() -> None:
    async def main() -> None:
        presence, endpoint = present()
        go_on = asyncio.Event()
        out = asyncio.ensure_future(presence.step_out(go_on.wait, "asleep"))
        await settle()
        back = asyncio.ensure_future(presence.step_in(nothing, "asleep"))
        await settle()
        assert endpoint.calls == ["out"]
        go_on.set()
        assert await out
        assert await back
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())


class Loader:
    async def load(self, adapter: Adapter) -> None: ...

    async def unload(self, adapter: Adapter) -> None: ...


def test_an_adapter_stays_loaded_while_a_request_uses_it() -> None:
    engine = Operations({}, {}, Adapters(Loader(), {"poet": "/poet"}))
    with engine.adapter({"model": "poet"}) as adapter:
        assert adapter is not None
        assert adapter.in_use == 1
    assert adapter.in_use == 0


@pytest.mark.parametrize("adapters", [None, Adapters(Loader())], ids=["without adapters", "with adapters"])
def test_all_operations_of_an_engine(adapters: Adapters | None) -> None:
    async def main() -> None:
        engine = Operations({"echo": echo}, {"clear": echo}, adapters)
        of_adapters = {"load_lora", "unload_lora", "list_loras"} if adapters else set()
        assert set(engine.routes()) == {"echo"} | of_adapters
        assert {spec.name for spec in engine.endpoints()} == {"clear"} | of_adapters
        assert await engine.routes()["echo"]({"a": 1}) == {"status": "success", "got": {"a": 1}}
        assert engine.adapters is adapters

        endpoint = Endpoint()
        engine.attach(endpoint, EngineInfo("m", None))  # type: ignore[arg-type]
        with engine.adapter({"model": "m"}) as adapter:
            assert adapter is None
        assert not engine.paused()
        await engine.presence.step_out(nothing, "asleep")
        assert engine.paused()
        assert endpoint.calls == ["out"]

    asyncio.run(main())
