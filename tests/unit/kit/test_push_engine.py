"""What surrounds an engine's start, requests, drain and end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fakes import fake_context
from prometheus_client import Counter, generate_latest

from dynamo_worker import EngineDeadError, EngineInfo, InvalidRequestError, StartError
from dynamo_worker.deadline import Deadline
from dynamo_worker.engine import HasControlRoutes, HasMetrics, LocalContext, MayPause, PublishesEvents, PushesChunks
from dynamo_worker.kit import push_engine
from dynamo_worker.kit.chunks import usage
from dynamo_worker.kit.disaggregation import Role
from dynamo_worker.kit.engine_control import EngineControl
from dynamo_worker.kit.kv_events import KvEventSource
from dynamo_worker.kit.lora import LoraAdapter, LoraAdapters
from dynamo_worker.kit.publishing import KvEvents
from dynamo_worker.kit.push_engine import Job, PushEngine, Started
from dynamo_worker.kit.translation import ModelTable, RequestTable


class Table(ModelTable[dict[str, Any]]):
    def convert(self, values: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
        return {**values, "prompt": request["token_ids"]}


class Halving(Role):
    """Leaves half of the tokens to the other worker."""

    def prepare(self, request: Mapping[str, Any], translated: dict[str, Any]) -> None:
        translated["max_tokens"] //= 2


class Loader:
    async def load(self, adapter: LoraAdapter) -> None:
        pass

    async def unload(self, adapter: LoraAdapter) -> None:
        pass


async def echo(body: dict[str, Any]) -> dict[str, Any]:
    return body


class Engine(PushEngine[Started]):
    """Answers with its prompt's first tokens, and names the adapter."""

    NAME: ClassVar = "Toy"
    METRICS: ClassVar = ("toy_",)

    def __init__(self, role: Role, *, events: bool = False, lora: bool = False, context: Any = None) -> None:
        super().__init__(argparse.Namespace(publish_kv_events=events), context or fake_context())
        self._role = role
        self._lora = lora
        self.steps: list[str] = []
        self.pending = 0

    async def launch(self) -> Started:
        self.steps.append("launch")
        lora = LoraAdapters(Loader(), self.context, ("toy",), {"poet": "/poet"}) if self._lora else None
        control = EngineControl(self.context, {"echo": echo}, {"clear": echo}, lora)
        return Started(Table(RequestTable.of_engine(), {}, 100), self._role, control)

    async def warm_up(self) -> None:
        self.steps.append(f"warm-up of {self.started.role.mode}")

    def describe(self, started: Started) -> EngineInfo:
        return EngineInfo("toy", None, data_parallel_start_rank=2, data_parallel_size=2)

    async def answer(self, started: Started, job: Job) -> None:
        tokens = job.params["prompt"][: job.params["max_tokens"]]
        job.send({"token_ids": tokens, "adapter": job.lora and job.lora.name, "id": job.context.id()})

    def kv_events(self, started: Started) -> KvEvents | None:
        return KvEvents({2: "tcp://*:1"}, "kv", 16) if self.args.publish_kv_events else None

    def pending_transfers(self, started: Started) -> int:
        self.pending -= 1
        return max(0, self.pending)

    async def abort(self, request_id: str) -> None:
        pass

    def processes(self) -> tuple[int, ...]:
        return ()


def run(work: Callable[[Engine], Awaitable[Any]], engine: Engine | None = None) -> Any:
    """Return what is made of a started engine."""

    async def main() -> Any:
        toy = engine or Engine(Role("aggregated"))
        await toy.start(1)
        return await work(toy)

    return asyncio.run(main())


async def answer(engine: Engine, **request: Any) -> list[Any]:
    request = {"token_ids": [1, 2, 3, 4], **request}
    return [chunk async for chunk in engine.generate(request, LocalContext("a"))]


def test_a_request_is_translated_fitted_to_the_role_and_answered() -> None:
    (chunk,) = run(lambda engine: answer(engine, stop_conditions={"max_tokens": 3}))
    assert chunk == {"token_ids": [1, 2, 3], "adapter": None, "id": "a"}
    (half,) = run(lambda engine: answer(engine, stop_conditions={"max_tokens": 4}), Engine(Halving("decode")))
    assert half["token_ids"] == [1, 2]


def test_a_decode_worker_reports_what_the_prefill_worker_found_in_its_cache() -> None:
    class Counting(Engine):
        async def answer(self, started: Started, job: Job) -> None:
            job.send({"token_ids": [1], "completion_usage": usage(4, 1, 4)})

    result = {"disaggregated_params": {"room": 1}, "prompt_tokens_details": {"cached_tokens": 2}}
    (chunk,) = run(lambda engine: answer(engine, prefill_result=result), Counting(Role("decode")))
    assert chunk["completion_usage"] == usage(4, 1, 2)


def test_a_request_for_no_tokens_does_not_reach_the_engine() -> None:
    (chunk,) = run(lambda engine: answer(engine, stop_conditions={"max_tokens": 0}))
    assert chunk == {"token_ids": [], "index": 0, "finish_reason": "length"}


def test_a_wrong_request_does_not_either() -> None:
    with pytest.raises(InvalidRequestError, match="top_k: expected an integer, got 'x'"):
        run(lambda engine: answer(engine, sampling_options={"top_k": "x"}))


def test_a_lora_adapter_is_in_use_while_its_request_runs() -> None:
    async def check(engine: Engine) -> None:
        lora = engine.started.control.lora
        assert lora is not None
        poet = lora._loaded["poet"]
        used: list[int] = []
        await engine.push({"token_ids": [1], "model": "poet"}, LocalContext("a"), lambda _: used.append(poet.in_use))
        assert (used, poet.in_use) == ([1], 0)
        assert (await answer(engine, model="poet"))[0]["adapter"] == "poet"
        with pytest.raises(InvalidRequestError, match="painter"):
            await answer(engine, model="painter")

    run(check, Engine(Role("aggregated"), lora=True))


def test_nothing_is_served_before_the_start_and_after_the_end() -> None:
    async def refused(engine: Engine) -> None:
        with pytest.raises(EngineDeadError, match="Toy is not started"):
            await answer(engine)
        assert engine.control_routes() == {}
        assert not engine.paused()
        await engine.drain(Deadline.after(1))

    asyncio.run(refused(Engine(Role("prefill"))))

    async def stopped(engine: Engine) -> None:
        assert engine.stop() is not None
        assert engine.stop() is None
        await refused(engine)

    run(stopped)


def test_the_start() -> None:
    engine = Engine(Role("prefill"), events=True, lora=True)
    info = asyncio.run(engine.start(1))
    assert engine.steps == ["launch", "warm-up of prefill"]
    assert (info.worker_type, info.endpoint_types, info.needs) == ("prefill", ("prefill",), (("decode",),))
    assert info.lora_adapters == ("poet",)
    assert info.runtime_config == {"enable_local_indexer": True, "kv_event_publishing_enabled": True}
    assert [spec.name for spec in info.endpoints] == ["clear", "load_lora", "unload_lora", "list_loras"]
    plain = asyncio.run(Engine(Role("aggregated")).start(1))
    assert plain.lora_adapters == ()
    assert plain.runtime_config == {"enable_local_indexer": True, "kv_event_publishing_enabled": False}
    decode = asyncio.run(Engine(Role("decode")).start(1))
    assert decode.runtime_config["enable_local_indexer"] is False


def test_operations() -> None:
    async def check(engine: Engine) -> None:
        for capability in (PushesChunks, HasControlRoutes, MayPause, HasMetrics, PublishesEvents):
            assert isinstance(engine, capability)
        assert set(engine.control_routes()) == {"echo"}
        assert not engine.paused()
        await engine.started.control.gate.withdraw(lambda: asyncio.sleep(0), "asleep")
        assert engine.paused()

    run(check)


def test_the_gauges_of_every_engine_follow_what_it_reports() -> None:
    class Sized(Engine):
        def describe(self, started: Started) -> EngineInfo:
            return replace(super().describe(started), total_kv_blocks=40)

    async def work(engine: Engine) -> tuple[list[str], list[str]]:
        def gauges() -> list[str]:
            lines = generate_latest(engine.metrics_registry()).decode().splitlines()
            return [line for line in lines if line.startswith("dynamo_component_gpu_cache_usage_percent{")]

        before = gauges()
        engine.load.publish(3, 10)
        return before, gauges()

    idle, busy = run(work, Sized(Role("aggregated")))
    assert idle == [f'dynamo_component_gpu_cache_usage_percent{{dp_rank="{rank}"}} 0.0' for rank in (2, 3)]
    assert busy[1].endswith('{dp_rank="3"} 0.25')


def test_an_engine_that_reports_no_load_shows_none() -> None:
    class Silent(Engine):
        def reports_load(self) -> bool:
            return False

    async def work(engine: Engine) -> str:
        return generate_latest(engine.metrics_registry()).decode()

    text = run(work, Silent(Role("aggregated")))
    assert "\ndynamo_component_model_load_time_seconds " in text
    assert "dynamo_component_gpu_cache_usage_percent{" not in text


def test_only_its_own_metrics_are_the_engines() -> None:
    Counter("toy_steps", "steps").inc(3)
    Counter("other_steps", "steps").inc(3)
    registry = Engine(Role("aggregated")).metrics_registry()
    assert [family.name for family in registry.collect()] == ["toy_steps"]


class Published:
    """What reached the publishers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.load: list[Any] = []
        self.events: list[Any] = []

        async def attach(endpoint: Any, ranks: Any) -> None:
            self.load.append((endpoint, list(ranks)))

        monkeypatch.setattr(engine.load, "attach", attach)
        monkeypatch.setattr(push_engine, "publish_kv_events", lambda *what: self.events.append(what))


@pytest.mark.parametrize(("wanted", "events"), [(True, True), (True, False), (False, True)])
def test_load_and_events_are_published_if_a_router_may_read_them(
    monkeypatch: pytest.MonkeyPatch, *, wanted: bool, events: bool
) -> None:
    context = replace(fake_context(), events_wanted=wanted)
    engine = Engine(Role("aggregated"), events=events, context=context)
    published = Published(monkeypatch, engine)
    endpoint: Any = object()

    async def check(engine: Engine) -> None:
        await engine.attach(endpoint, engine.describe(engine.started))

    run(check, engine)
    assert published.load == ([(endpoint, [2, 3])] if wanted else [])
    assert published.events == ([(endpoint, KvEvents({2: "tcp://*:1"}, "kv", 16))] if wanted and events else [])


def test_a_prefill_worker_drains_until_its_blocks_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_engine, "_DRAIN_POLL_SECONDS", 0.001)

    async def looks(engine: Engine) -> int:
        engine.pending = 4
        await engine.drain(Deadline.after(10))
        return 4 - engine.pending

    assert run(looks, Engine(Role("prefill"))) == 4
    assert run(looks, Engine(Role("decode"))) == 0


def test_a_drain_ends_at_its_deadline() -> None:
    async def check(engine: Engine) -> float:
        engine.pending = 10**9
        since = time.monotonic()
        await engine.drain(Deadline.after(0.15))
        return time.monotonic() - since

    assert 0.1 < run(check, Engine(Role("prefill"))) < 5


def test_what_runs_beside_the_requests_ends_with_them() -> None:
    async def check(engine: Engine) -> None:
        ended = asyncio.Event()

        async def forever() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
            ended.set()

        engine.run_beside(forever())
        engine.run_beside(asyncio.sleep(0))
        await asyncio.sleep(0.01)
        assert len(engine._tasks) == 1, "what has ended is forgotten"
        engine.stop()
        await asyncio.wait_for(ended.wait(), 1)

    run(check)


def test_an_engine_without_an_answer() -> None:
    with pytest.raises(TypeError, match="answer"):
        PushEngine(argparse.Namespace(), fake_context())  # type: ignore[abstract]


def test_an_engine_is_built_in_a_thread_and_says_why_it_cannot() -> None:
    def fail() -> None:
        raise RuntimeError("no room") from ValueError("0 blocks")

    async def work(engine: Engine) -> None:
        assert await engine.construct(threading.get_ident) != threading.get_ident()
        with pytest.raises(StartError, match="Toy failed to start: no room: 0 blocks"):
            await engine.construct(fail)
        engine.stop()
        with pytest.raises(StartError, match="stopped during the start"):
            await engine.construct(fail)

    run(work)


def test_a_failed_request_is_a_reason_to_look_at_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_engine, "_LOOK_SECONDS", 0.001)

    async def work(engine: Engine) -> None:
        await engine.stays_well()
        looks = iter((None, EngineDeadError("lost")))

        async def check_health() -> None:
            if (error := next(looks)) is not None:
                raise error

        monkeypatch.setattr(engine, "check_health", check_health)
        with pytest.raises(EngineDeadError, match="lost"):
            await engine.stays_well()

    run(work)


def test_events_that_an_engine_hands_out_are_forwarded_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Role("aggregated"), context=replace(fake_context(), events_wanted=True))
    published = Published(monkeypatch, engine)
    calls: list[Any] = []
    source = KvEventSource(list, lambda event: event, range(1), 16, advice="", name="toy-events")
    stoppable = SimpleNamespace(stop=lambda: calls.append("stop"))
    monkeypatch.setattr(KvEventSource, "forward", lambda _, endpoint: calls.append(endpoint) or stoppable)
    monkeypatch.setattr(engine, "kv_events", lambda _: source)

    async def check(engine: Engine) -> None:
        endpoint: Any = "endpoint"
        await engine.attach(endpoint, engine.describe(engine.started))
        assert calls == ["endpoint"]
        engine.stop()

    run(check, engine)
    assert calls[:2] == ["endpoint", "stop"]
    assert published.events == []
