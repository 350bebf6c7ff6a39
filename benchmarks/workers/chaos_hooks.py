"""A plugin for `benchmarks/chaos.py`: hooks that go wrong on demand, beside any engine (`-p chaos_hooks`).

The file named by CHAOS_HOOKS holds what goes wrong, `HOOK=FAULT` a line. It is read whenever a hook is called.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from pathlib import Path
from typing import Final

from dynamo_worker import EngineDeadError, hookimpl

#: Longer than every time limit of the chaos' workers, and short enough to end by itself.
_FOREVER: Final = 100.0


def _asked(hook: str) -> list[tuple[str, float]]:
    """Return the faults that are asked for, with their seconds."""
    try:
        lines = Path(os.environ["CHAOS_HOOKS"]).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []
    found = [line.partition("=")[2] for line in lines if line.startswith(f"{hook}=")]
    return [(fault.partition(":")[0], float(fault.partition(":")[2] or _FOREVER)) for fault in found]


def _hold_interpreter(seconds: float) -> None:
    """Sleep in native code without releasing the interpreter, as a driver call that hangs does."""
    library = ctypes.PyDLL(None)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        library.usleep(ctypes.c_uint(int(left * 1e6)))


def _block(seconds: float) -> None:
    """Block the event loop; for a moment only once: the next check must not block again."""
    if seconds < _FOREVER:
        Path(os.environ["CHAOS_HOOKS"]).unlink(missing_ok=True)
    time.sleep(seconds)


async def _go_wrong(hook: str) -> None:
    for fault, seconds in _asked(hook):
        if fault == "dead":
            raise EngineDeadError("chaos: an illegal memory access was encountered")
        if fault == "raise":
            raise RuntimeError(f"chaos: {hook} is broken")
        if fault == "hang":
            await asyncio.sleep(seconds)
        elif fault == "block":
            _block(seconds)
        elif fault == "lock":
            _hold_interpreter(seconds)


@hookimpl
async def check_health() -> None:
    """Go wrong while the worker serves."""
    await _go_wrong("check_health")


@hookimpl
async def drain() -> None:
    """Go wrong in a drain."""
    await _go_wrong("drain")


@hookimpl
async def cleanup() -> None:
    """Go wrong in a cleanup."""
    await _go_wrong("cleanup")
