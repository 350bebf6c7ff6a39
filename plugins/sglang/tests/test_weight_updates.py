"""New weights in a running SGLang: a real engine on the CPU, and what its requests see."""

from __future__ import annotations

import argparse
import asyncio
import base64
import pickle
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from safetensors.torch import load_file
from sglang.srt.utils.common import init_custom_process_group

import conftest
from dynamo_worker import Deadline, EngineContext, EngineDeadError
from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.engine import LocalContext, Undiscovered
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.tiny_model import make
from dynamo_worker_sglang import arguments
from dynamo_worker_sglang.engine import SglangEngine

_T = TypeVar("_T")

pytestmark = pytest.mark.timeout(600)


def send(port: int, tensors: dict[str, torch.Tensor]) -> None:
    """Be the trainer: join the group, and send the tensors."""
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name="trainer"
    )
    for tensor in tensors.values():
        torch.distributed.broadcast(tensor, src=0, group=group)


class Discovery(Undiscovered):
    """Notes whether the engine is there."""

    present = True

    async def withdraw(self) -> None:
        self.present = False

    async def rejoin(self) -> None:
        self.present = True


class Running:
    """A started engine, and the event loop that it runs on."""

    def __init__(self, directory: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.discovery = Discovery()
        self.models = directory / "models"
        parser = argparse.ArgumentParser()
        arguments.add(parser)
        args = parser.parse_args(["--model-path", str(self.models / "first"), *conftest.FLAGS, "--enable-rl"])
        private = directory / "private"
        private.mkdir()
        paths = AllowedPaths(load=[str(self.models)])
        self.engine = SglangEngine(args, EngineContext("t.b", private, False, paths, discovery=self.discovery))
        self._number = 0
        self.run(self.engine.start(0))

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.engine.shutdown(Deadline.after(10)))
        self.loop.close()

    async def ask(self, tokens: int = 8) -> tuple[list[int], str | None]:
        """Return the greedy answer to a prompt, and why it ends."""
        self._number += 1
        request: Any = {
            "token_ids": list(range(10, 170)),
            "stop_conditions": {"max_tokens": tokens, "ignore_eos": True},
            "sampling_options": {"temperature": 0.0},
        }
        answer, reason = [], None
        async for chunk in self.engine.generate(request, LocalContext(f"request-{self._number}")):
            answer += chunk["token_ids"]
            reason = chunk.get("finish_reason", reason)
        return answer, reason

    async def begin(self, tokens: int) -> asyncio.Task[tuple[list[int], str | None]]:
        """Return a request that has produced its first token."""
        batches = self.engine.started.manager.batches
        task = asyncio.ensure_future(self.ask(tokens))
        while self.engine.started.manager.batches < batches + 2:
            await asyncio.sleep(0.01)
        return task

    async def operate(self, name: str, **body: Any) -> dict[str, Any]:
        return await self.engine.control_routes()[name](body)

    async def succeed(self, name: str, **body: Any) -> dict[str, Any]:
        answer = await self.operate(name, **body)
        assert answer["status"] != "error", answer
        return answer

    async def load(self, model: str, **body: Any) -> dict[str, Any]:
        """Load a model from disk."""
        return await self.succeed("update_weights_from_disk", model_path=str(self.models / model), **body)

    async def refused(self, name: str, **body: Any) -> str:
        """Return why an operation was refused, which has left the engine as it was."""
        answer = await self.operate(name, **body)
        assert answer["status"] == "error", answer
        assert answer.get("success") in (None, False)
        self.engine.started.control.weights.check_usable()
        return str(answer["message"])

    def tensors(self, model: str) -> dict[str, torch.Tensor]:
        """Return the weights of a model."""
        tensors: dict[str, torch.Tensor] = load_file(self.models / model / "model.safetensors")
        return tensors


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Return an engine with the first of two models; a third directory has no weights."""
    directory = tmp_path_factory.mktemp("weights")
    make(directory / "models" / "first")
    make(directory / "models" / "second", seed=7)
    (directory / "models" / "empty").mkdir()
    running = Running(directory)
    try:
        yield running
    finally:
        running.close()


def test_weights_from_disk_and_back(running: Running) -> None:
    """What is cached of the prompt under the old weights is not used under the new ones."""

    async def main() -> None:
        before = await running.ask()
        answer = await running.load("second", weight_version="2")
        assert (answer["success"], answer["status"], answer["num_paused_requests"]) == (True, "success", 0)
        assert running.discovery.present
        assert (await running.ask())[0] != before[0]
        version = await running.succeed("get_weight_version")
        assert (version["version"], version["version_declared"]) == ("2", True)
        await running.load("first")
        assert await running.ask() == before
        answer = await running.succeed("update_weight_version", new_version="3", abort_all_requests=False)
        assert (answer["success"], answer["new_version"]) == (True, "3")
        assert (await running.succeed("get_weight_version"))["version"] == "3"

    running.run(main())


def test_requests_in_flight_end_before_an_update_and_those_that_arrive_meanwhile_begin_after_it(
    running: Running,
) -> None:
    async def main() -> None:
        before = await running.ask(150)
        request = await running.begin(150)
        update = asyncio.ensure_future(running.load("second"))
        while running.discovery.present:
            await asyncio.sleep(0.001)
        assert running.engine.paused()
        later = asyncio.ensure_future(running.ask())
        await update
        assert request.done()
        assert await request == before
        assert (await later)[0] != before[0][:8]
        # Aborted on request, and what there is of the answer stays.
        request = await running.begin(1500)
        await running.load("first", abort_all_requests=True)
        tokens, reason = await request
        assert (reason, len(tokens) < 1500) == ("cancelled", True)
        assert await running.ask(150) == before

    running.run(main())


def test_requests_that_are_paused_go_on_with_the_new_weights(running: Running) -> None:
    async def main() -> None:
        before = await running.ask()
        for mode in ("in_place", "retract"):
            kept = await running.begin(300)
            await running.succeed("pause_generation", mode=mode)
            if mode == "in_place":
                # Otherwise SGLang's scheduler ends: "Cache flush failed after updating weights".
                path = str(running.models / "second")
                assert "send flush_cache false" in await running.refused("update_weights_from_disk", model_path=path)
            await running.load("second", flush_cache=mode == "retract")
            assert not running.discovery.present, "it is still paused"
            await running.succeed("continue_generation", torch_empty_cache=False)
            tokens, reason = await kept
            assert (len(tokens), reason) == (300, "length")
            await running.load("first")
            assert await running.ask() == before

    running.run(main())


def test_weights_from_tensors(running: Running) -> None:
    async def main() -> None:
        before = await running.ask()
        for model in ("second", "first"):
            payload = base64.b64encode(pickle.dumps(list(running.tensors(model).items()))).decode()
            answer = await running.succeed("update_weights_from_tensor", serialized_named_tensors=[payload])
            assert answer["success"]
            assert (await running.ask() == before) is (model == "first")
        # A trainer's own session, with several updates.
        await running.succeed("begin_weight_update")
        assert not running.discovery.present
        assert "has begun already" in await running.refused("begin_weight_update")
        tensors = list(running.tensors("second").items())
        for part in (tensors[:5], tensors[5:]):
            payload = base64.b64encode(pickle.dumps(part)).decode()
            await running.succeed("update_weights_from_tensor", serialized_named_tensors=[payload])
        assert not running.discovery.present
        await running.succeed("end_weight_update")
        assert running.discovery.present
        assert "no session" in await running.refused("end_weight_update")
        assert (await running.ask())[0] != before[0]
        await running.load("first")

    running.run(main())


def test_weights_over_a_group(running: Running) -> None:
    tensors, port = running.tensors("second"), free_port()
    update = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": "trainer",
    }

    async def main() -> None:
        before = await running.ask()
        assert "a group of init_weights_update_group" in await running.refused(
            "update_weights_from_distributed", **update
        )
        trainer = asyncio.ensure_future(asyncio.to_thread(send, port, tensors))
        group = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        await running.succeed("init_weights_update_group", **group, group_name="trainer", backend="gloo")
        await running.succeed("update_weights_from_distributed", **update, weight_version="group")
        await trainer
        assert (await running.ask())[0] != before[0]
        assert (await running.succeed("get_weight_version"))["version"] == "group"
        await running.succeed("destroy_weights_update_group", group_name="trainer")
        assert "does not exist" in await running.refused("destroy_weights_update_group", group_name="trainer")
        await running.load("first")
        assert await running.ask() == before

    running.run(main())


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("update_weights_from_disk", {}, "model_path"),
        ("update_weights_from_disk", {"model_path": 3}, "Expected `str`"),
        ("update_weights_from_disk", {"model_path": "/etc"}, "not below a directory"),
        ("update_weights_from_disk", {"model_path": "MODELS/nowhere"}, "does not exist"),
        ("update_weights_from_disk", {"model_path": "MODELS/first", "rid": "x"}, "unknown fields: rid"),
        ("update_weights_from_tensor", {"serialized_named_tensors": ["%"]}, "base64"),
        ("update_weights_from_distributed", {"names": "a", "dtypes": [], "shapes": []}, "Expected `array`"),
        ("update_weights_from_ipc", {"zmq_handles": [1]}, "Expected `object`"),
        ("init_weights_update_group", {"master_address": "127.0.0.1"}, "master_port"),
        ("update_weight_version", {"new_version": 3}, "Expected `str`"),
    ],
)
def test_what_is_wrong_does_not_reach_the_scheduler(
    running: Running, name: str, body: dict[str, Any], message: str
) -> None:
    given = {
        key: value.replace("MODELS", str(running.models)) if isinstance(value, str) else value
        for key, value in body.items()
    }
    assert message in running.run(running.refused(name, **given))


def test_an_engine_without_a_word_from_its_owner_takes_no_code(running: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(running.engine.started.control.weights, "_enabled", False)

    async def main() -> None:
        for name in (
            "update_weights_from_tensor",
            "update_weights_from_distributed",
            "update_weights_from_ipc",
            "init_weights_update_group",
            "destroy_weights_update_group",
            "begin_weight_update",
            "end_weight_update",
        ):
            message = await running.refused(name)
            assert message == f"{name} is off, because its callers can execute code; --enable-rl allows it"

    running.run(main())


def test_sockets_of_checkpoint_engine_reach_sglang(running: Running) -> None:
    """Nobody listens there: without a GPU only SGLang's refusal can be shown, and what it leaves."""

    async def main() -> None:
        answer = await running.operate("update_weights_from_ipc", zmq_handles={"no-such-device": "ipc:///nowhere"})
        assert (answer["status"], answer["success"]) == ("error", False)
        assert not running.discovery.present
        await running.load("first")
        assert running.discovery.present

    running.run(main())


def test_after_a_failed_update_nothing_is_served_until_all_is_loaded(running: Running) -> None:
    async def main() -> None:
        before = await running.ask()
        kept = await running.begin(1500)
        await running.succeed("pause_generation", mode="in_place")
        later = asyncio.ensure_future(running.ask())
        await asyncio.sleep(0.2)
        empty = str(running.models / "empty")
        answer = await running.operate("update_weights_from_disk", model_path=empty, flush_cache=False)
        assert (answer["status"], answer["success"]) == ("error", False)
        assert not running.discovery.present
        for request in (kept, later):
            with pytest.raises(Disconnected, match="the weights are incomplete"):
                await request
        with pytest.raises(WorkerUnavailable, match="the weights are incomplete"):
            await running.ask()
        assert "update_weights_from_disk, or restart" in (await running.operate("continue_generation"))["message"]
        await running.engine.check_health()
        await running.load("first", flush_cache=False)
        await running.succeed("continue_generation", torch_empty_cache=False)
        assert running.discovery.present
        # The scheduler only now ends what was aborted during the pause.
        await running.succeed("flush_cache", timeout_s=30)
        assert await running.ask() == before

    running.run(main())


def test_what_cannot_be_loaded_is_the_end(running: Running) -> None:
    """SGLang's scheduler ends. No later test can use the engine."""

    async def main() -> None:
        payload = base64.b64encode(pickle.dumps([("model.norm.weight", "not a tensor")])).decode()
        update = asyncio.ensure_future(
            running.operate("update_weights_from_tensor", serialized_named_tensors=[payload])
        )
        while running.engine.started.manager.failure is None:
            await asyncio.sleep(0.05)
        with pytest.raises(EngineDeadError, match="has failed"):
            await running.engine.check_health()
        assert not running.discovery.present
        update.cancel()

    running.run(main())
