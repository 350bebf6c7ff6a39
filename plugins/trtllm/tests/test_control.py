"""Operations on TensorRT-LLM: the control routes of Dynamo's own worker, and how long a release waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_worker import EngineContext
from dynamo_worker.host.status.peer_routes import PEER_ROUTES
from dynamo_worker_trtllm.control import Control


class World:
    """An engine with requests in flight, and what reached it."""

    def __init__(self, *, busy: bool = False) -> None:
        self.calls: list[str] = []
        self.busy = busy
        llm = SimpleNamespace(
            args=SimpleNamespace(enable_lora=False, sleep_config={}),
            _collective_rpc=lambda name, *_: self.calls.append(name),
        )
        self.control = Control(
            llm, EngineContext("test.backend", Path("/nowhere"), supervised=False), ("tiny",), self._idle
        )

    async def _idle(self) -> None:
        await asyncio.sleep(60 if self.busy else 0)

    def operate(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        return asyncio.run(self.control.routes()[name](body))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [route.path for route in PEER_ROUTES if "TensorRT-LLM" in route.workers])
def test_the_routes_of_dynamos_own_worker_are_there(path: str) -> None:
    assert path.removeprefix("control/") in World().control.routes()


def test_a_release_waits_as_long_as_it_is_told() -> None:
    world = World(busy=True)
    answer = world.operate("release_memory_occupation", {"timeout_s": 0.05})
    assert answer["message"] == "requests are still in flight after 0.05 s; nothing was released"
    assert world.calls == []
    assert not world.control.paused()


def test_a_release_of_an_idle_engine() -> None:
    world = World()
    assert world.operate("release_memory_occupation", {"timeout_s": 5})["status"] == "success"
    assert world.calls == ["sleep"]


@pytest.mark.parametrize("seconds", [-1, 1e9, "5", True, None, float("nan")])
def test_no_number_of_seconds(seconds: Any) -> None:
    world = World()
    assert "timeout_s" in world.operate("release_memory_occupation", {"timeout_s": seconds})["message"]
    assert world.calls == []
