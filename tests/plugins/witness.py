"""A local extension plugin for `-p witness`: says in the log which hooks were called, so that tests can tell."""

from __future__ import annotations

from dynamo_worker import hookimpl
from dynamo_worker.logs import get_logger

log = get_logger(__name__)


@hookimpl
async def drain() -> None:
    log.info("witness: drain")


@hookimpl
async def on_fatal_error(error: BaseException) -> None:
    log.info("witness: on_fatal_error", error=type(error).__name__)


@hookimpl
async def cleanup() -> None:
    log.info("witness: cleanup")
