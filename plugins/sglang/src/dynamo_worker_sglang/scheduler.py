"""The entry point of SGLang's scheduler processes, which import nothing else of the plugin."""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.utils import device_timer

from dynamo_worker.kit import rendezvous


def run(server_args: Any, *args: Any, **options: Any) -> None:
    """Run a scheduler whose rendezvous listens on loopback if SGLang puts it there."""
    rendezvous.listen_on_loopback()
    if server_args.device == "cpu":
        device_timer._TimingInterval = HostInterval  # noqa: SLF001 - SGLang has no setting for it
    run_scheduler_process(server_args, *args, **options)


class HostInterval:
    """The duration of a forward pass on a CPU, which SGLang's timer can only measure with CUDA's events (0.5.21)."""

    def __init__(self) -> None:
        self.end_event = self
        self.metadata: Any = None
        self._started_at = self._ended_at = time.perf_counter()

    @classmethod
    def create(cls) -> HostInterval:
        """Start to measure."""
        return cls()

    def end(self, metadata: Any) -> None:
        """Stop."""
        self._ended_at = time.perf_counter()
        self.metadata = metadata

    def query(self) -> bool:
        """Return whether the pass is complete: a CPU runs nothing in the background."""
        return True

    def elapsed_time(self) -> float:
        """Return the duration in milliseconds."""
        return (self._ended_at - self._started_at) * 1000
