"""New weights for a serving engine: who may send them, and where the engine stands while they change and after."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import pytest
from aio import settle, until
from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from fakes import FakeDiscovery

from dynamo_worker import EngineDeadError, InvalidRequestError, StartError
from dynamo_worker.engine import LargeOperation
from dynamo_worker.kit import weights
from dynamo_worker.kit.engine_control import DiscoveryGate
from dynamo_worker.kit.weights import FAILED, WeightUpdates, add_enable_rl, describing_tensors


class Engine:
    """An engine whose weights can be changed, and what its discovery and its requests see of that."""

    def __init__(self, *, enabled: bool = False) -> None:
        self.discovery = FakeDiscovery()
        self.gate = DiscoveryGate(self.discovery)
        self.ended: list[BaseException] = []
        self.weights = WeightUpdates(self.gate, self.end_requests, enabled=enabled)

    async def end_requests(self, error: BaseException) -> None:
        self.ended.append(error)

    async def load(self) -> str:
        assert self.weights.changing
        self.discovery.calls.append("load")
        return "loaded"

    async def fail(self) -> str:
        raise RuntimeError("size mismatch")


def test_the_engine_is_out_of_discovery_while_its_weights_change() -> None:
    async def main() -> None:
        engine = Engine()
        assert await engine.weights.update(engine.load, {}) == "loaded"
        assert engine.discovery.calls == ["withdraw", "load", "rejoin"]
        assert not engine.weights.changing
        engine.weights.check_usable()

    asyncio.run(main())


def test_a_paused_engine_may_stay() -> None:
    async def main() -> None:
        engine = Engine()
        await engine.weights.update(engine.load, {}, leave=False)
        assert engine.discovery.calls == ["load"]

    asyncio.run(main())


@pytest.mark.parametrize("leave", [True, False])
def test_an_engine_whose_update_failed_serves_nothing_until_all_weights_are_loaded(leave: bool) -> None:
    async def main() -> None:
        engine = Engine()
        with pytest.raises(RuntimeError, match="size mismatch"):
            await engine.weights.update(engine.fail, {"weight_version": 5}, leave=leave)
        assert engine.discovery.calls == ["withdraw"]
        assert engine.gate.reasons == {FAILED}
        assert isinstance(engine.ended[0], Disconnected), "other workers go on with what was in flight"
        with pytest.raises(WorkerUnavailable, match="size mismatch"):
            engine.weights.check_usable()
        with pytest.raises(InvalidRequestError, match="update_weights_from_disk, or restart"):
            engine.weights.check_complete()
        with pytest.raises(InvalidRequestError, match="the last update failed"):
            await engine.weights.update(engine.load, {}, leave=leave)
        assert not (await engine.weights.get_weight_version({}))["version_declared"]

        assert await engine.weights.update(engine.load, {"weight_version": 6}, complete=True, leave=leave)
        assert engine.discovery.calls == ["withdraw", "load", "rejoin"]
        engine.weights.check_usable()
        engine.weights.check_complete()
        assert (await engine.weights.get_weight_version({}))["version"] == 6

    asyncio.run(main())


def test_an_engine_whose_weights_cannot_be_repaired_is_dead() -> None:
    async def main() -> None:
        engine = Engine()
        for _ in range(2):
            engine.weights.check_alive()
            with pytest.raises(RuntimeError, match="size mismatch"):
                await engine.weights.update(engine.fail, {}, complete=True)
        with pytest.raises(EngineDeadError, match="cannot be repaired: size mismatch"):
            engine.weights.check_alive()
        assert engine.discovery.calls == ["withdraw"]

    asyncio.run(main())


def test_an_engine_that_is_out_for_another_reason_stays_out() -> None:
    async def main() -> None:
        engine = Engine()

        async def nothing() -> bool:
            return True

        await engine.gate.withdraw(nothing, "asleep")
        with pytest.raises(RuntimeError):
            await engine.weights.update(engine.fail, {})
        await engine.weights.update(engine.load, {}, complete=True)
        assert engine.discovery.calls == ["withdraw", "load"]
        assert await engine.gate.rejoin(nothing, "asleep")
        assert engine.discovery.calls == ["withdraw", "load", "rejoin"]

    asyncio.run(main())


def test_an_update_that_is_refused_changes_nothing() -> None:
    async def main() -> None:
        engine = Engine()

        async def refuse() -> None:
            raise InvalidRequestError("no such group")

        with pytest.raises(InvalidRequestError):
            await engine.weights.update(refuse, {"weight_version": 5})
        assert engine.discovery.calls == ["withdraw", "rejoin"]
        assert not engine.ended
        engine.weights.check_usable()
        assert (await engine.weights.get_weight_version({}))["version"] is None

    asyncio.run(main())


def test_requests_that_cannot_be_ended_hide_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = Engine()

        async def dead(_: BaseException) -> None:
            raise OSError("no such process")

        engine.weights = WeightUpdates(engine.gate, dead, enabled=False)
        with pytest.raises(RuntimeError, match="size mismatch"):
            await engine.weights.update(engine.fail, {})
        assert "Requests in flight cannot be ended" in caplog.text

    asyncio.run(main())


def test_changes_wait_for_each_other() -> None:
    async def main() -> None:
        engine, steps, go_on = Engine(), [], asyncio.Event()

        async def slow() -> None:
            steps.append("begin")
            await go_on.wait()
            steps.append("end")

        async def step() -> None:
            steps.append("other")

        tasks = [asyncio.ensure_future(engine.weights.update(slow, {}))]
        await until(lambda: steps)
        tasks += [asyncio.ensure_future(call(step)) for call in (engine.weights.exclusively, engine.weights.meet)]
        await settle()
        go_on.set()
        await asyncio.gather(*tasks)
        assert steps == ["begin", "end", "other", "other"]

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["update", "meet"])
def test_a_transfer_that_never_ends_is_the_end_of_the_engine(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHANGE_SECONDS", 0.05)
    monkeypatch.setenv("DYN_RL_INIT_WEIGHTS_TIMEOUT_S", "0.05")

    async def main() -> None:
        engine = Engine()
        cancelled: list[str] = []

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append("hang")

        engine.weights.check_alive()
        with pytest.raises(EngineDeadError, match="did not end in time"):
            await (engine.weights.update(hang, {}) if kind == "update" else engine.weights.meet(hang))
        with pytest.raises(EngineDeadError, match="did not end in time"):
            engine.weights.check_alive()
        await settle()
        assert cancelled

    asyncio.run(main())


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1e9", "soon"])
def test_the_time_for_a_group_is_checked_at_the_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_RL_INIT_WEIGHTS_TIMEOUT_S", text)
    with pytest.raises(StartError, match="expected seconds, above 0"):
        Engine()


@pytest.mark.parametrize("version", [7, "step-7", None, {"step": 7}])
def test_a_version_is_what_was_declared(version: Any) -> None:
    async def main() -> None:
        engine = Engine()
        assert await engine.weights.get_weight_version({}) == {
            "status": "ok",
            "version": None,
            "version_declared": False,
        }
        assert await engine.weights.set_weight_version({"weight_version": version}) == {
            "status": "ok",
            "version": version,
        }
        assert await engine.weights.get_weight_version({}) == {
            "status": "ok",
            "version": version,
            "version_declared": True,
        }
        with pytest.raises(InvalidRequestError, match="weight_version"):
            await engine.weights.set_weight_version({})

    asyncio.run(main())


def test_only_those_who_may_send_tensors_may_send_large_bodies() -> None:
    async def operation(_: dict[str, Any]) -> dict[str, Any]:
        return {}

    large = describing_tensors(operation, enabled=True)
    assert isinstance(large, LargeOperation)
    assert large.most_body_bytes == 8 * 1024 * 1024
    assert describing_tensors(operation, enabled=False) is operation


def test_code_is_for_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(enabled=True).weights.allow("update_weights_from_tensor")
    with pytest.raises(InvalidRequestError) as refused:
        Engine().weights.allow("update_weights_from_tensor")
    assert str(refused.value) == (
        "update_weights_from_tensor is off, because its callers can execute code; --enable-rl allows it"
    )

    def enabled(*arguments: str) -> bool:
        parser = argparse.ArgumentParser()
        add_enable_rl(parser.add_argument_group(), "DYN_ENABLE_RL")
        assert "execute code" in " ".join(parser.format_help().split())
        return bool(parser.parse_args(arguments).enable_rl)

    monkeypatch.delenv("DYN_ENABLE_RL", raising=False)
    assert (enabled(), enabled("--enable-rl")) == (False, True)
    for text, expected in (("true", True), ("1", True), ("On", True), ("0", False), ("", False)):
        monkeypatch.setenv("DYN_ENABLE_RL", text)
        assert enabled() is expected
        assert not enabled("--no-enable-rl")
