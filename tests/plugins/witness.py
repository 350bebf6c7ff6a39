"""A local extension plugin for `-p witness`: logs which hooks are called."""

from __future__ import annotations

from dynamo_worker import EngineInfo, hookimpl
from dynamo_worker.logs import get_logger

log = get_logger(__name__)


@hookimpl
async def on_ready(info: EngineInfo) -> None:
    log.info("witness: on_ready", model=info.model_name)


@hookimpl
async def drain() -> None:
    log.info("witness: drain")


@hookimpl
async def on_fatal_error(error: BaseException) -> None:
    log.info("witness: on_fatal_error", error=type(error).__name__)


@hookimpl
async def cleanup() -> None:
    log.info("witness: cleanup")
