"""What SGLang's scheduler processes run. They import this, and nothing else of the plugin."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler import run_scheduler_process

from dynamo_worker.kit import rendezvous


def run(*args: Any, **options: Any) -> None:
    """Run a scheduler whose ranks meet on loopback, if SGLang has them meet there."""
    rendezvous.listen_on_loopback()
    run_scheduler_process(*args, **options)
