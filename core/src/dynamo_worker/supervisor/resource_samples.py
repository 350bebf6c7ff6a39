"""Samples of the memory that a worker uses, at intervals, for its flight record."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Final

from dynamo_worker.supervisor import gpu, linux
from dynamo_worker.supervisor.helper import Helper
from dynamo_worker.supervisor.loop import readable
from dynamo_worker.supervisor.worker_status import ENDING

if TYPE_CHECKING:
    from dynamo_worker.supervisor.loop import Loop
    from dynamo_worker.supervisor.recorder import Recorder
    from dynamo_worker.supervisor.worker_process import WorkerProcess
    from dynamo_worker.supervisor.worker_status import WorkerStatus

#: Seconds between two samples, and while the worker ends.
_INTERVAL: Final = 10.0
_ENDING_INTERVAL: Final = 1.0

#: Seconds between two looks at the GPUs, and for one of them: the driver may hang.
_GPU_INTERVAL: Final = 60.0
_GPU_LIMIT: Final = 5.0


class ResourceSamples:
    """Takes samples while the worker lives.

    The driver is asked by a forked process: it may hang, and its library is large.
    """

    def __init__(self, recorder: Recorder, worker: WorkerProcess, status: WorkerStatus, loop: Loop) -> None:
        self._recorder = recorder
        self._worker = worker
        self._status = status
        self._loop = loop
        self._due = time.monotonic() + _ENDING_INTERVAL
        self._gpu_due = self._due if gpu.present() else float("inf")
        self._helper: Helper | None = None
        self._gpu_memory: int | None = None

    def next_timer(self) -> float | None:
        """Return when to call ``act_on_time`` (monotonic), or None."""
        return self._due if self._recorder.active and not self._worker.ended else None

    def act_on_time(self) -> None:
        """Take a sample if it is due."""
        now = time.monotonic()
        if not self._recorder.active or self._worker.ended:
            return
        if self._status.state in ENDING:
            self._due = min(self._due, now + _ENDING_INTERVAL)
        if now < self._due:
            return
        self._due = now + (_ENDING_INTERVAL if self._status.state in ENDING else _INTERVAL)
        self.take()
        if now >= self._gpu_due and self._helper is None:
            self._gpu_due = now + _GPU_INTERVAL
            self._ask_driver()

    def take(self) -> None:
        """Record a sample now."""
        used, most = linux.memory_in_use()
        pid = self._worker.pid
        measured = {
            "resident": linux.resident_memory(pid) if pid is not None else None,
            "memory": used,
            "memory_limit": most,
            "gpu_memory": self._gpu_memory,
        }
        self._recorder.sample(**{name: value for name, value in measured.items() if value is not None})

    def _ask_driver(self) -> None:
        try:
            self._helper = Helper(_used_memory, _GPU_LIMIT)
        except OSError:  # out of processes or descriptors: the next time, perhaps
            return
        self._loop.add(self._helper.descriptor, self._on_answer)

    def _on_answer(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        self._loop.remove(helper.descriptor)
        until = time.monotonic() + 0.1
        answer = helper.result(_wait_for_input, lambda: until)
        self._gpu_memory = int(answer) if answer is not None and answer.isdigit() else None

    def close(self) -> None:
        """End the process that asks the driver."""
        if self._helper is not None:
            self._loop.remove(self._helper.descriptor)
            linux.send_signal(self._helper.process, signal.SIGKILL)
            self._helper = None


def _wait_for_input(seconds: float, descriptor: int | None) -> None:
    if descriptor is not None:
        readable(descriptor, seconds)


def _used_memory() -> str:
    try:
        return str(gpu.Nvml().used_memory())
    except (OSError, AttributeError):  # no driver, or one that lacks a function
        return ""
