"""The engine in the worker: starts the process with the model, hands requests over, and sends what it answers."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dynamo_worker import EngineDeadError, EngineInfo
from dynamo_worker.kit import engine_arguments, push_engine
from dynamo_worker.kit.canary import canary_request
from dynamo_worker.kit.child_process import ChildProcess
from dynamo_worker.kit.disaggregation import Role
from dynamo_worker.kit.engine_control import EngineControl
from dynamo_worker.kit.lora import LoraAdapters
from dynamo_worker.kit.push_engine import Job, PushEngine
from dynamo_worker.logs import get_logger
from dynamo_worker_transformers import arguments
from dynamo_worker_transformers.metrics import EngineMetrics
from dynamo_worker_transformers.sampling import SamplingTable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping

    from prometheus_client import CollectorRegistry

    from dynamo_worker import Deadline, EngineContext, Request
    from dynamo_worker.kit.lora import LoraAdapter

log = get_logger(__name__)

#: Seconds between two looks at the load.
_LOAD_SECONDS: Final = 0.25


@dataclass
class Started(push_engine.Started):
    """The parts of a started engine.

    :ivar model: what the process has told about the model (``core.py``).
    """

    model: Mapping[str, Any]


class _Loader:
    """Loads LoRA adapters in the process."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child

    async def load(self, adapter: LoraAdapter) -> None:
        """Load an adapter between two steps."""
        await self._child.ask("load_lora", {"number": adapter.number, "path": adapter.path})

    async def unload(self, adapter: LoraAdapter) -> None:
        """Remove an adapter."""
        await self._child.ask("unload_lora", {"number": adapter.number})


class TransformersEngine(PushEngine[Started]):
    """transformers' continuous batching as dynamo-worker drives it."""

    NAME: ClassVar = "transformers"

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args, context)
        self._child = ChildProcess(
            self.NAME,
            "dynamo_worker_transformers.core:Core",
            arguments.settings(args),
            # Otherwise processes of the tokenizer's library warn about forks.
            environment={"TOKENIZERS_PARALLELISM": "false"},
        )
        self._metrics = EngineMetrics()

    async def launch(self) -> Started:
        """Start the process and wait until the model is loaded."""
        log.info("Starting transformers", model=self.args.model)
        model = await self._child.start()
        lora = None
        if self.args.enable_lora:
            lora = LoraAdapters(_Loader(self._child), self.context, {self.args.model, *self._served_names()})
        self.run_beside(self._watch_load())
        return Started(SamplingTable(model), Role("aggregated"), EngineControl(self.context, {}, {}, lora), model)

    def _served_names(self) -> list[str]:
        """Return the names that clients use for the model, the main one first."""
        return engine_arguments.served_names(self.args.served_model_name) or [self.args.model]

    def describe(self, started: Started) -> EngineInfo:
        """Return the model's properties and the sizes that transformers has chosen."""
        model = started.model
        name, *aliases = self._served_names()
        return EngineInfo(
            model_name=name,
            model_aliases=aliases,
            model_path=self.args.model,
            context_length=model["context_length"],
            vocab_size=model["vocab_size"],
            kv_block_size=model["page_size"],
            total_kv_blocks=model["blocks"],
            max_num_seqs=model["sequences"],
            max_num_batched_tokens=model["batch_tokens"],
            # There is no limit; routers want a number.
            max_loras=model["sequences"] if self.args.enable_lora else None,
        )

    async def _watch_load(self) -> None:
        """Publish how full the KV cache is."""
        with contextlib.suppress(EngineDeadError):  # others notice that as well
            while True:
                load = await self._child.ask("load")
                self._metrics.running = load["requests"]
                self.load.publish(0, load["blocks"])
                await asyncio.sleep(_LOAD_SECONDS)

    # ------------------------------------------------------------------------------------------------------ requests

    async def answer(self, started: Started, job: Job) -> None:  # noqa: ARG002 - as in other engines
        """Hand a request over, and send the chunks as they come."""
        params = job.params
        payload = {
            "token_ids": job.request["token_ids"],
            "n": params.n,
            "max_tokens": params.max_tokens,
            "ends": params.ends,
            "stop_token_ids": params.stop_token_ids,
            "sampling": params.sampling,
            "adapter": None if job.lora is None else job.lora.number,
        }
        async with contextlib.aclosing(self._child.generate(job.context.id(), payload)) as chunks:
            async for chunk in chunks:
                self._metrics.tokens += len(chunk["token_ids"])
                job.send(chunk)
        self._metrics.requests += 1

    async def abort(self, request_id: str) -> None:
        """Stop the work for one request before the next step."""
        await self._child.abort(request_id)

    # -------------------------------------------------------------------------------------------------------- health

    def processes(self) -> Iterable[int]:
        """Return the pid of the process with the model."""
        return self._child.processes()

    def canary_request(self) -> Request:
        """Return a request for one token."""
        return canary_request(None, SimpleNamespace(bos_token_id=self.started.model["first_id"]))

    def progress(self) -> int:
        """Return the number of steps that the process has reported."""
        return self._child.progress()

    async def check_health(self) -> None:
        """Check that the process serves.

        :raises EngineDeadError: it has ended.
        """
        if self._started is not None:
            self._child.check()

    def metrics_registry(self) -> CollectorRegistry:
        """Return the engine's metrics, and Dynamo's gauges about its model and its KV cache."""
        registry = super().metrics_registry()
        registry.register(self._metrics)
        return registry

    # ------------------------------------------------------------------------------------------------------- the end

    async def shutdown(self, deadline: Deadline) -> None:
        """End the process."""
        self.stop()
        await self._child.shutdown(deadline)
