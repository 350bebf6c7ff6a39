"""The echo engine, which reads requests and offers operations as engines with models do, only without a model.

The echo engine itself refuses unknown fields without reading them. Found like `dynamo_worker_faulty`.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from dynamo_worker import Chunk, EngineContext, EngineInfo, EnginePlugin, Request, RequestContext, hookimpl
from dynamo_worker.engine import Operation
from dynamo_worker.engines import echo
from dynamo_worker.kit import fields, guided_decoding, request_metadata
from dynamo_worker.kit.chunks import no_tokens
from dynamo_worker.kit.engine_control import EngineControl
from dynamo_worker.kit.lora import LoraAdapter, LoraAdapters
from dynamo_worker.kit.translation import ModelTable, RequestTable

TABLE = RequestTable.of_engine(
    sampling={"guided_decoding": ("guide", lambda _, value: guided_decoding.read(value))},
    extra={
        "allowed_token_ids": ("allowed_token_ids", fields.allowed_token_ids),
        "logprob_token_ids": ("logprob_token_ids", fields.token_ids),
        "logit_bias": ("logit_bias", fields.logit_bias),
        "custom_params": ("custom_params", fields.mapping),
    },
    handled=("kv_hint",),
)

#: Why the engine is out of discovery.
ASLEEP = "asleep"


class Loader:
    """Loads nothing."""

    async def load(self, adapter: LoraAdapter) -> None:
        pass

    async def unload(self, adapter: LoraAdapter) -> None:
        pass


class Control(EngineControl):
    """Operations of all kinds: one that leaves discovery, one that writes, one that takes a name, one that fails."""

    def __init__(self, context: EngineContext) -> None:
        routes = {
            "sleep": self.sleep,
            "wake_up": self.wake_up,
            "save": self.save,
            "start_profile": self.start_profile,
            "fail": self.fail,
        }
        super().__init__(context, routes, {}, LoraAdapters(Loader(), context))

    async def sleep(self, body: dict[str, Any]) -> dict[str, Any]:
        async def nothing() -> None:
            pass

        await self.gate.withdraw(nothing, ASLEEP)
        return {"level": body.get("level", 1)}

    async def wake_up(self, body: dict[str, Any]) -> dict[str, Any]:
        async def resume() -> bool:
            return True

        await self.gate.rejoin(resume, ASLEEP)
        return {}

    async def save(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"path": self.allowed_paths.to_write(fields.string("path", body.get("path")))}

    async def start_profile(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"prefix": self.allowed_paths.name(body.get("profile_prefix"))}

    async def fail(self, body: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError(f"the engine is not up to {body}")


class StrictEngine(echo.EchoEngine):
    """Checks everything that a request asks for, and echoes its prompt."""

    def __init__(self, args: argparse.Namespace, context: EngineContext) -> None:
        super().__init__(args)
        self._table: ModelTable[Any] = ModelTable(TABLE, {}, echo.CONTEXT_LENGTH)
        self._control = Control(context)

    async def start(self, worker_id: int) -> EngineInfo:
        return replace(await super().start(worker_id), endpoints=self._control.endpoints())

    def paused(self) -> bool:
        return self._control.paused()

    def control_routes(self) -> Mapping[str, Operation]:
        return self._control.routes()

    async def generate(self, request: Request, context: RequestContext) -> AsyncIterator[Chunk]:
        values = self._table.read(request)
        request_metadata.cache_salt(request)
        request_metadata.session_id(request)
        request_metadata.priority(request)
        request_metadata.kv_hint(request)
        if values is None:
            yield no_tokens()
            return
        plain = {"token_ids": request["token_ids"], "stop_conditions": {"max_tokens": values["max_tokens"]}}
        with self._control.lora_adapter(request):
            async for chunk in super().generate(plain, context):
                yield chunk


class StrictPlugin(EnginePlugin):
    engine = "dynamo_worker_strict:StrictEngine"

    @hookimpl
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("strict engine")
        group.add_argument("--model-name", default="echo")
        group.add_argument("--tokens-per-second", type=float, default=0.0)
        group.add_argument("--start-seconds", type=float, default=0.0)
        group.add_argument("--prefill-seconds", type=float, default=0.0)


plugin = StrictPlugin()
