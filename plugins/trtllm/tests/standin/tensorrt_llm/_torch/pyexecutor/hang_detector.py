"""Kill the world when the loop of a rank stands still or has crashed: the other ranks wait for it in a collective."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

RANK_CRASH_KILL_GRACE_ENV = "TLLM_RANK_CRASH_HARD_KILL_GRACE"
DEFAULT_GRACE_S = 10.0
DEFAULT_TIMEOUT_S = 300.0
EXIT_CODE = 137


def _seconds(name: str, default: float) -> float:
    try:
        value = float(os.environ[name])
    except (KeyError, ValueError):
        return default
    return value if math.isfinite(value) else default


def propagate_hard_kill() -> None:
    """End every rank at once: MPI_Abort if any thread may call it, else kill this rank and let MPI end the others."""
    if os.environ.get("TLLM_DISABLE_MPI") != "1":
        from mpi4py import MPI

        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            MPI.COMM_WORLD.Abort(EXIT_CODE)
    os.kill(os.getpid(), signal.SIGKILL)


def hard_kill_on_rank_crash(world_size: int, deadline: float | None = None) -> bool:
    """Wait for the rest of the grace, then end every rank; without other ranks or grace (negative) do nothing."""
    grace = _seconds(RANK_CRASH_KILL_GRACE_ENV, DEFAULT_GRACE_S)
    if world_size <= 1 or grace < 0:
        return False
    remaining = grace if deadline is None else deadline - time.monotonic()
    if remaining > 0:
        time.sleep(remaining)
    propagate_hard_kill()
    return True


class HangDetector:
    """A thread that calls `on_detected` once no checkpoint was passed for `timeout` seconds."""

    def __init__(self, timeout: float | None = None, on_detected: Callable[[], None] | None = None) -> None:
        self.timeout = _seconds("TLLM_HANG_DETECTION_TIMEOUT_S", DEFAULT_TIMEOUT_S) if timeout is None else timeout
        self._on_detected = on_detected or propagate_hard_kill
        self._deadline: float | None = None
        self._detected = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang_detector_loop", daemon=True)

    def __enter__(self) -> HangDetector:  # noqa: PYI034 - Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def checkpoint(self) -> None:
        """Start the clock anew."""
        self._deadline = time.monotonic() + self.timeout

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock."""
        self._deadline = None
        try:
            yield
        finally:
            self.checkpoint()

    def detected(self) -> bool:
        """Tell whether the loop stood still."""
        return self._detected

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            deadline = self._deadline
            if deadline is None or time.monotonic() < deadline:
                continue
            self._detected = True
            print(f"Hang detected: no checkpoint for {self.timeout} s", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
            self._stop.wait(_seconds("TLLM_HANG_DETECTOR_PRE_KILL_DELAY_S", 0.0))
            self._on_detected()
            return
