"""The entry point of SGLang's scheduler processes, which import nothing else of the plugin."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.scheduler import run_scheduler_process

from dynamo_worker.kit import rendezvous


def run(*args: Any, **options: Any) -> None:
    """Run a scheduler whose rendezvous listens on loopback if SGLang puts it there."""
    rendezvous.listen_on_loopback()
    run_scheduler_process(*args, **options)
