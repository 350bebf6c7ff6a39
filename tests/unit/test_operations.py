"""Operations on a serving engine: their answers, and how an engine steps out of discovery and back in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aio import settle

from dynamo_worker import operations
from dynamo_worker.operations import Presence


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
        assert await presence.step_out(nothing)
        assert presence.away
        assert not await presence.step_out(nothing), "it is away already"
        assert await presence.step_in(nothing)
        assert not presence.away
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())


def test_discovery_is_left_before_the_engine_is_paused_and_entered_after_it_is_back() -> None:
    async def main() -> None:
        presence, endpoint = present()

        async def note(what: str) -> bool:
            endpoint.calls.append(what)
            return True

        await presence.step_out(lambda: note("paused"))
        await presence.step_in(lambda: note("resumed"))
        assert endpoint.calls == ["out", "paused", "resumed", "in"]

    asyncio.run(main())


def test_an_engine_that_does_not_pause_serves_on() -> None:
    async def main() -> None:
        presence, endpoint = present()

        async def fail() -> None:
            raise RuntimeError("busy")

        with pytest.raises(RuntimeError, match="busy"):
            await presence.step_out(fail)
        assert not presence.away
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())


def test_an_engine_that_is_partly_back_stays_out() -> None:
    async def main() -> None:
        presence, endpoint = present()
        await presence.step_out(nothing)

        async def partly() -> bool:
            return False

        assert not await presence.step_in(partly)
        assert presence.away
        assert endpoint.calls == ["out"]

    asyncio.run(main())


def test_one_after_the_other() -> None:
    async def main() -> None:
        presence, endpoint = present()
        go_on = asyncio.Event()
        out = asyncio.ensure_future(presence.step_out(go_on.wait))
        await settle()
        back = asyncio.ensure_future(presence.step_in(nothing))
        await settle()
        assert endpoint.calls == ["out"]
        go_on.set()
        assert await out
        assert await back
        assert endpoint.calls == ["out", "in"]

    asyncio.run(main())
