"""Operations on a serving engine: their answers, and how an engine leaves discovery and rejoins it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from aio import settle
from fakes import FakeDiscovery, fake_context

from dynamo_worker import InvalidRequestError
from dynamo_worker.engine import LargeOperation
from dynamo_worker.kit import engine_control
from dynamo_worker.kit.engine_control import DiscoveryGate, EngineControl, MemoryControl
from dynamo_worker.kit.lora import LoraAdapter, LoraAdapters


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
        ([1], {"status": "error", "message": "expected a JSON object as the body"}),
    ],
)
def test_every_call_gets_an_answer(body: Any, expected: dict[str, Any]) -> None:
    async def main() -> None:
        assert await engine_control.routes({"echo": echo})["echo"](body) == expected
        spec = engine_control.endpoint("echo", echo)
        assert not spec.takes_tokens
        assert spec.generate is not None
        assert [chunk async for chunk in spec.generate(body, None)] == [expected]  # type: ignore[arg-type]

    asyncio.run(main())


async def nothing() -> bool:
    return True


def gate_of() -> tuple[DiscoveryGate, FakeDiscovery]:
    discovery = FakeDiscovery()
    return DiscoveryGate(discovery), discovery


def test_withdrawn_and_back() -> None:
    async def main() -> None:
        gate, discovery = gate_of()
        assert await gate.withdraw(nothing, "asleep")
        assert gate.reasons == {"asleep"}
        assert gate.withdrawn
        assert not await gate.withdraw(nothing, "asleep"), "it is away already"
        assert await gate.rejoin(nothing, "asleep")
        assert not gate.reasons
        assert not gate.withdrawn
        assert discovery.calls == ["withdraw", "rejoin"]

    asyncio.run(main())


def test_discovery_is_left_before_the_engine_is_paused_and_entered_after_it_is_back() -> None:
    async def main() -> None:
        gate, discovery = gate_of()

        async def note(what: str) -> bool:
            discovery.calls.append(what)
            return True

        await gate.withdraw(lambda: note("paused"), "asleep")
        await gate.rejoin(lambda: note("resumed"), "asleep")
        assert discovery.calls == ["withdraw", "paused", "resumed", "rejoin"]

    asyncio.run(main())


def test_it_stays_out_until_the_last_reason_is_gone() -> None:
    async def main() -> None:
        gate, discovery = gate_of()
        await gate.withdraw(nothing, "weights", "cache")
        assert await gate.withdraw(nothing, "cache", "paused"), "one of them is new"
        assert gate.reasons == {"weights", "cache", "paused"}
        assert not await gate.rejoin(nothing, "paused")
        assert not await gate.rejoin(nothing, "weights")
        assert await gate.rejoin(nothing, "cache", "weights")
        assert discovery.calls == ["withdraw", "rejoin"]

    asyncio.run(main())


def test_nothing_is_resumed_for_a_reason_that_there_is_not() -> None:
    async def main() -> None:
        gate, discovery = gate_of()

        async def resume() -> bool:
            raise AssertionError("resumed")

        assert await gate.rejoin(resume, "asleep")
        await gate.withdraw(nothing, "paused")
        assert not await gate.rejoin(resume, "asleep")
        assert discovery.calls == ["withdraw"]

    asyncio.run(main())


def test_who_pauses_or_resumes_sees_the_reasons_as_they_were() -> None:
    async def main() -> None:
        gate, _ = gate_of()
        seen = []

        async def look() -> bool:
            assert gate.withdrawn
            seen.append(set(gate.reasons))
            return True

        await gate.withdraw(look, "a")
        await gate.withdraw(look, "a", "b")
        await gate.rejoin(look, "a")
        assert seen == [set(), {"a"}, {"a", "b"}]

    asyncio.run(main())


async def fail() -> bool:
    raise RuntimeError("busy")


def test_an_engine_that_does_not_pause_serves_on() -> None:
    async def main() -> None:
        gate, discovery = gate_of()
        with pytest.raises(RuntimeError, match="busy"):
            await gate.withdraw(fail, "asleep")
        assert not gate.reasons
        assert not gate.withdrawn
        assert discovery.calls == ["withdraw", "rejoin"]

    asyncio.run(main())


def test_a_second_reason_that_does_not_come_about_leaves_the_first_one() -> None:
    async def main() -> None:
        gate, discovery = gate_of()
        await gate.withdraw(nothing, "paused")
        with pytest.raises(RuntimeError, match="busy"):
            await gate.withdraw(fail, "cache")
        assert gate.reasons == {"paused"}
        assert discovery.calls == ["withdraw"]

    asyncio.run(main())


def test_an_engine_that_is_partly_back_or_does_not_come_back_stays_out() -> None:
    async def main() -> None:
        gate, discovery = gate_of()
        await gate.withdraw(nothing, "asleep")

        async def partly() -> bool:
            return False

        assert not await gate.rejoin(partly, "asleep")
        with pytest.raises(RuntimeError, match="busy"):
            await gate.rejoin(fail, "asleep")
        assert gate.reasons == {"asleep"}
        assert discovery.calls == ["withdraw"]

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_withdrawn_for_some_work(fails: bool) -> None:
    async def main() -> None:
        gate, discovery = gate_of()

        async def work() -> str:
            assert gate.withdrawn
            discovery.calls.append("work")
            if fails:
                raise RuntimeError("no")
            return "done"

        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            assert await gate.withdrawn_for(work) == "done"
        assert not gate.withdrawn
        await gate.withdraw(nothing, "asleep")
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            await gate.withdrawn_for(work)
        assert gate.withdrawn, "there is still a reason"
        assert discovery.calls == ["withdraw", "work", "rejoin", "withdraw", "work"]

    asyncio.run(main())


def test_one_after_the_other() -> None:
    async def main() -> None:
        gate, discovery = gate_of()
        go_on = asyncio.Event()
        out = asyncio.ensure_future(gate.withdraw(go_on.wait, "asleep"))
        await settle()
        back = asyncio.ensure_future(gate.rejoin(nothing, "asleep"))
        await settle()
        assert discovery.calls == ["withdraw"]
        go_on.set()
        assert await out
        assert await back
        assert discovery.calls == ["withdraw", "rejoin"]

    asyncio.run(main())


class Loader:
    async def load(self, adapter: LoraAdapter) -> None: ...

    async def unload(self, adapter: LoraAdapter) -> None: ...


def test_an_adapter_stays_loaded_while_a_request_uses_it() -> None:
    engine = EngineControl(fake_context(), {}, {}, LoraAdapters(Loader(), fake_context(), loaded={"poet": "/poet"}))
    with engine.lora_adapter({"model": "poet"}) as adapter:
        assert adapter is not None
        assert adapter.in_use == 1
    assert adapter.in_use == 0


@pytest.mark.parametrize("lora", [None, LoraAdapters(Loader(), fake_context())], ids=["without LoRA", "with LoRA"])
def test_all_operations_of_an_engine(lora: LoraAdapters | None) -> None:
    async def main() -> None:
        discovery = FakeDiscovery()
        engine = EngineControl(fake_context(discovery), {"echo": echo}, {"clear": echo}, lora)
        of_lora = {"load_lora", "unload_lora", "list_loras"} if lora else set()
        assert set(engine.routes()) == {"echo"} | of_lora
        assert {spec.name for spec in engine.endpoints()} == {"clear"} | of_lora
        assert await engine.routes()["echo"]({"a": 1}) == {"status": "success", "got": {"a": 1}}

        with engine.lora_adapter({"model": "m"}) as adapter:
            assert adapter is None
        assert not engine.paused()
        await engine.gate.withdraw(nothing, "asleep")
        assert engine.paused()
        assert discovery.calls == ["withdraw"]

    asyncio.run(main())


class Memory(MemoryControl):
    """An engine with two regions of memory that notes what is asked of it."""

    REGIONS: ClassVar = ("weights", "kv_cache")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        context: Any = SimpleNamespace(discovery=FakeDiscovery(), allowed_paths=None)
        super().__init__(context, routes={"other": echo}, endpoints={})

    async def release_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        self.calls.append(("release", tags, body.get("mode")))
        if body.get("mode") == "fail":
            raise RuntimeError("in use")

    async def resume_memory(self, tags: list[str], body: dict[str, Any]) -> None:
        self.calls.append(("resume", tags, body.get("mode")))


def test_memory_is_released_and_resumed_region_by_region() -> None:
    async def check() -> None:
        control = Memory()
        operate = control.routes()
        assert operate.keys() == {"release_memory_occupation", "resume_memory_occupation", "other"}
        release, resume = operate["release_memory_occupation"], operate["resume_memory_occupation"]
        assert (await resume({}))["message"] == "the memory is not released"
        assert (await release({"tags": ["weights"], "mode": "x"}))["message"] == "memory released"
        assert control.paused()
        assert (await release({}))["message"] == "memory released"
        assert (await release({}))["message"] == "the memory is already released"
        assert (await resume({"tags": ["kv_cache"]}))["message"] == "partly resumed; still released: ['weights']"
        assert control.paused()
        assert (await resume({}))["message"] == "memory resumed"
        assert not control.paused()
        assert control.calls == [
            ("release", ["weights"], "x"),
            ("release", ["kv_cache"], None),
            ("resume", ["kv_cache"], None),
            ("resume", ["weights"], None),
        ]

    asyncio.run(check())


def test_an_engine_that_keeps_its_memory_serves_on() -> None:
    async def check() -> None:
        control = Memory()
        release = control.routes()["release_memory_occupation"]
        assert await release({"mode": "fail"}) == {"status": "error", "message": "in use"}
        assert "tags: expected a list of weights, kv_cache" in (await release({"tags": ["all"]}))["message"]
        assert not control.paused()
        assert len(control.calls) == 1

    asyncio.run(check())


def test_where_operations_write() -> None:
    async def check() -> None:
        context: Any = SimpleNamespace(discovery=FakeDiscovery(), allowed_paths=SimpleNamespace(to_write=str.upper))
        control = EngineControl(context, routes={}, endpoints={})
        assert await control.output_directory("/x") == "/X"
        for wrong in (None, 1, ["/x"]):
            with pytest.raises(InvalidRequestError, match="output_dir: expected a directory, got"):
                await control.output_directory(wrong)

    asyncio.run(check())


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("holds", [True, False])
def test_around_work_the_reason_decides(leave: bool, fails: bool, holds: bool) -> None:
    async def main() -> None:
        gate, discovery = gate_of()

        async def work() -> str:
            assert gate.withdrawn is leave
            if fails:
                raise OSError("no")
            return "done"

        with pytest.raises(OSError, match="no") if fails else contextlib.nullcontext():
            assert await gate.around(work, leave=leave, reason="broken", holds=lambda: holds) == "done"
        assert gate.withdrawn is holds
        assert gate.reasons == ({"broken"} if holds else set())
        assert discovery.calls == (["withdraw"] if leave or holds else []) + (["rejoin"] if leave and not holds else [])
        await gate.around(nothing, leave=leave, reason="broken", holds=lambda: False)
        assert not gate.withdrawn

    asyncio.run(main())


def test_an_operation_stays_as_large_as_it_is() -> None:
    async def main() -> None:
        operation = engine_control.routes({"echo": LargeOperation(echo, 100_000)})["echo"]
        assert isinstance(operation, LargeOperation)
        assert operation.most_body_bytes == 100_000
        assert await operation({"a": 1}) == {"status": "success", "got": {"a": 1}}
        assert await operation({"fail": "no"}) == {"status": "error", "message": "no"}

    asyncio.run(main())
