"""A local extension plugin for `-p preloading`: logs which environment variables change until the worker serves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dynamo_worker import hookimpl
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dynamo_worker import EngineInfo

log = get_logger(__name__)
before: dict[str, str] = {}


@hookimpl
def prepare(arguments: Sequence[str]) -> None:
    before.update(os.environ)


@hookimpl
def on_ready(info: EngineInfo) -> None:
    names = before.keys() | os.environ.keys()
    changed = sorted(name for name in names if before.get(name) != os.environ.get(name))
    log.info("preloading", changed=",".join(changed))
