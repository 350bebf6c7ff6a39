"""New weights in a running vLLM: a real engine on the CPU, and what its requests see."""

from __future__ import annotations

import argparse
import asyncio
import shutil
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import gloo_weights
import pytest
from dynamo.llm.exceptions import Disconnected, WorkerUnavailable
from safetensors.torch import load_file, save_file

import conftest
from dynamo_worker import Deadline, EngineContext, EngineDeadError
from dynamo_worker.allowed_paths import AllowedPaths
from dynamo_worker.engine import LocalContext, Undiscovered
from dynamo_worker.testing.cluster import free_port
from dynamo_worker.testing.tiny_model import make
from dynamo_worker_vllm import arguments
from dynamo_worker_vllm.engine import VllmEngine

_T = TypeVar("_T")


class Discovery(Undiscovered):
    """Notes whether the engine is there."""

    present = True

    async def withdraw(self) -> None:
        self.present = False

    async def rejoin(self) -> None:
        self.present = True


class Running:
    """A started engine, and the event loop that it runs on."""

    def __init__(self, model: Path, directory: Path, *flags: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.discovery = Discovery()
        parser = argparse.ArgumentParser()
        arguments.add(parser)
        args = parser.parse_args(["--model", str(model), *conftest.FLAGS, *conftest.GPU_FLAGS, *flags])
        private = directory / "private"
        private.mkdir()
        paths = AllowedPaths(load=[str(directory / "models")])
        self.engine = VllmEngine(args, EngineContext("t.b", private, False, paths, discovery=self.discovery))
        self.run(self.engine.start(0))
        self._number = 0

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.engine.shutdown(Deadline.after(10)))
        self.loop.close()

    async def ask(self, tokens: int = 8) -> tuple[list[int], str | None]:
        """Return the greedy answer to a prompt of several blocks, and why it ends."""
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
        steps = self.engine.progress()
        task = asyncio.ensure_future(self.ask(tokens))
        while self.engine.progress() < steps + 2:
            await asyncio.sleep(0.01)
        return task

    async def operate(self, name: str, **body: Any) -> dict[str, Any]:
        return await self.engine.control_routes()[name](body)

    async def succeed(self, name: str, **body: Any) -> dict[str, Any]:
        answer = await self.operate(name, **body)
        assert answer["status"] == "ok", answer
        return answer

    async def refused(self, name: str, **body: Any) -> str:
        """Return why an operation was refused, which has left the engine as it was."""
        answer = await self.operate(name, **body)
        assert answer["status"] == "error", answer
        await self.operate("get_weight_version")
        assert self.discovery.present
        return str(answer["message"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with models: two good ones, and one with a tensor of the wrong shape."""
    directory = tmp_path_factory.mktemp("weights")
    first, _ = make(directory / "models" / "first"), make(directory / "models" / "second", seed=7)
    shutil.copytree(first, directory / "models" / "broken")
    file = directory / "models" / "broken" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :7].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def running(directory: Path) -> Iterator[Running]:
    running = Running(directory / "models" / "first", directory, "--enable-rl", *EXTENSION)
    try:
        yield running
    finally:
        running.close()


EXTENSION = ("--worker-extension-cls", "gloo_weights.GlooWeights")
pytestmark = pytest.mark.timeout(600)


def test_weights_from_disk_and_back(running: Running, directory: Path) -> None:
    """What is cached of the prompt under the old weights is not used under the new ones."""

    async def main() -> None:
        first, second = directory / "models" / "first", directory / "models" / "second"
        before = await running.ask()
        assert "call pause_generation first" in await running.refused("update_weights_from_disk", model_path=str(first))
        assert await running.ask() == before
        await running.succeed("pause_generation")
        assert running.engine.paused()
        assert running.discovery.present, "requests wait"
        answer = await running.succeed("update_weights_from_disk", model_path=str(second), weight_version=2)
        assert answer == {"status": "ok", "version": 2, "version_declared": True}
        await running.succeed("resume_generation")
        assert not running.engine.paused()
        after = await running.ask()
        assert after[0] != before[0]
        assert await running.succeed("get_weight_version") == {"status": "ok", "version": 2, "version_declared": True}
        await running.succeed("pause_generation", mode="wait")
        answer = await running.succeed("update_weights_from_disk", model_path=str(first))
        assert answer == {"status": "ok", "version": "unknown", "version_declared": False}
        await running.succeed("resume_generation")
        assert await running.ask() == before

    running.run(main())


def test_requests_that_are_kept_go_on_and_later_ones_get_the_new_weights(running: Running, directory: Path) -> None:
    async def main() -> None:
        before = await running.ask()
        kept = await running.begin(400)
        await running.succeed("pause_generation", mode="keep")
        later = asyncio.ensure_future(running.ask())
        await running.succeed("update_weights_from_disk", model_path=str(directory / "models" / "second"))
        await asyncio.sleep(0.3)
        assert not kept.done()
        assert not later.done()
        await running.succeed("resume_generation")
        tokens, reason = await kept
        assert (len(tokens), reason) == (400, "length")
        assert (await later)[0] not in (before[0], tokens[:8])
        await running.succeed("pause_generation")
        await running.succeed("update_weights_from_disk", model_path=str(directory / "models" / "first"))
        await running.succeed("resume_generation")
        assert await running.ask() == before

    running.run(main())


def test_requests_that_are_aborted_keep_their_tokens(running: Running) -> None:
    """A trainer goes on with them; an answer that migrated would mix tokens of different weights."""

    async def main() -> None:
        whole = (await running.ask(1500))[0]
        request = await running.begin(1500)
        await running.succeed("pause_generation", mode="abort", clear_cache=True)
        tokens, reason = await request
        assert reason == "cancelled"
        assert 0 < len(tokens) < 1500
        assert tokens == whole[: len(tokens)]
        await running.succeed("resume_generation")
        request = await running.begin(1500)
        await running.succeed("abort_request", request_id=f"request-{running._number}")
        assert (await request)[1] == "cancelled"
        assert "one of keep, wait, abort" in await running.refused("pause_generation", mode="in_place")
        assert "request_id" in await running.refused("abort_request")

    running.run(main())


def test_weights_over_a_group(running: Running, directory: Path) -> None:
    """The trainer is a thread; the worker's side is vLLM's own process."""
    first, second = (load_file(directory / "models" / name / "model.safetensors") for name in ("first", "second"))
    names = {"names": list(first), "shapes": [list(tensor.shape) for tensor in first.values()]}
    trainer = ThreadPoolExecutor(1)
    port = free_port()

    def send(group: gloo_weights.ProcessGroupGloo, tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            group.broadcast(tensor, 0).wait()

    async def main() -> None:
        before = await running.ask()
        joined = trainer.submit(gloo_weights.join, port, 0)
        await running.succeed("init_weights_update_group", port=port)
        group = joined.result(10)

        sent = trainer.submit(send, group, second)
        assert "call pause_generation" in await running.refused("update_weights_from_distributed", **names)
        message = await running.refused("update_weights_from_distributed", allow_unpaused=True, **names)
        assert "send reset_prefix_cache false" in message
        await running.succeed(
            "update_weights_from_distributed",
            allow_unpaused=True,
            reset_prefix_cache=False,
            weight_version="s",
            **names,
        )
        sent.result(10)
        await running.succeed("flush_cache")
        assert (await running.ask())[0] != before[0]
        assert (await running.succeed("get_weight_version"))["version"] == "s"

        sent = trainer.submit(send, group, first)
        await running.succeed("pause_generation")
        await running.succeed("update_weights_from_distributed", **names)
        sent.result(10)
        await running.succeed("resume_generation")
        assert await running.ask() == before
        await running.succeed("destroy_weights_update_group")

    running.run(main())


def test_what_the_workers_cannot_do_is_refused(running: Running) -> None:
    async def main() -> None:
        assert "no method 'start_training'" in await running.refused(
            "init_weights_update_group", engine_rpc="start_training"
        )
        assert "--worker-extension-cls" in await running.refused("update_weights_from_tensor", tensors=[])
        assert "weight_version" in await running.refused("set_weight_version")
        await running.succeed("set_weight_version", weight_version=[1])
        assert (await running.succeed("get_weight_version"))["version"] == [1]
        assert (await running.succeed("liveness_probe"))["alive"]
        assert running.engine.started.config.model_config.logprobs_mode == "processed_logprobs"
        assert "does not exist" in await running.refused(
            "update_weights_from_disk", model_path=str(running.engine.context.allowed_paths.load[0]) + "/nowhere"
        )
        assert "not below a directory" in await running.refused("update_weights_from_disk", model_path="/etc")

    running.run(main())


def test_an_engine_without_a_word_from_its_owner_takes_no_code(running: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(running.engine.started.control.weights, "_enabled", False)

    async def main() -> None:
        for name in ("update_weights_from_distributed", "init_weights_update_group", "destroy_weights_update_group"):
            assert f"{name} is off" in await running.refused(name, engine_rpc="anything")
        path = str(running.engine.context.allowed_paths.load[0]) + "/first"
        message = await running.refused("update_weights_from_disk", model_path=path, engine_rpc="anything")
        assert "engine_rpc is off, because its callers can execute code; --enable-rl allows it" in message

    running.run(main())


def test_an_engine_that_sleeps_while_it_is_paused_stays_paused(running: Running) -> None:
    async def main() -> None:
        before = await running.ask()
        await running.succeed("pause_generation")
        assert (await running.operate("sleep", level=0))["status"] == "success"
        assert "asleep" in (await running.operate("resume_generation"))["message"]
        assert (await running.operate("wake_up"))["status"] == "success"
        request = asyncio.ensure_future(running.ask())
        await asyncio.sleep(0.5)
        assert not request.done()
        await running.succeed("resume_generation")
        assert await request == before

    running.run(main())


def test_after_a_failed_update_nothing_is_served_until_all_is_loaded(running: Running, directory: Path) -> None:
    empty = directory / "models" / "empty"
    empty.mkdir()

    async def main() -> None:
        before = await running.ask()
        kept = await running.begin(1500)
        await running.succeed("pause_generation")
        answer = await running.operate("update_weights_from_disk", model_path=str(empty), weight_version=9)
        assert answer["status"] == "error"
        assert not running.discovery.present
        with pytest.raises(Disconnected, match="the weights are incomplete"):
            await kept
        with pytest.raises(WorkerUnavailable, match="the weights are incomplete"):
            await running.ask()
        assert "update_weights_from_disk, or restart" in (await running.operate("resume_generation"))["message"]
        assert (await running.operate("get_weight_version"))["version"] != 9
        await running.engine.check_health()
        await running.succeed("update_weights_from_disk", model_path=str(directory / "models" / "first"))
        assert running.discovery.present
        await running.succeed("resume_generation")
        assert await running.ask() == before

    running.run(main())


def test_what_cannot_be_repaired_is_the_end(running: Running, directory: Path) -> None:
    """vLLM keeps the tensor that does not fit, and fails with it again. No later test can ask for an answer."""

    async def main() -> None:
        await running.succeed("pause_generation")
        for name in ("broken", "first"):
            await running.engine.check_health()
            path = str(directory / "models" / name)
            assert (
                "exceeds dimension" in (await running.operate("update_weights_from_disk", model_path=path))["message"]
            )
        with pytest.raises(EngineDeadError, match="the weights cannot be repaired"):
            await running.engine.check_health()

    running.run(main())


def test_a_transfer_that_hangs_is_the_end(running: Running, monkeypatch: Any) -> None:
    """The last test: the engine does nothing else any more."""
    weights = running.engine.started.control.weights
    monkeypatch.setattr(weights, "_end", None)
    monkeypatch.setattr(weights, "_group_seconds", 1.0)

    async def main() -> None:
        await running.engine.check_health()
        message = (await running.operate("init_weights_update_group", engine_rpc="hang"))["message"]
        assert "did not end in time (1 s)" in message
        with pytest.raises(EngineDeadError, match="did not end in time"):
            await running.engine.check_health()

    running.run(main())
