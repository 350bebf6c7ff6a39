"""An extension plugin: leaves a note about every fatal error in the directory that ``CRASH_NOTE_DIR`` names.

It works with every engine. A plugin may be a module, as here, or an object, as in ``plugin.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from dynamo_worker import hookimpl

dynamo_worker_api = "1"

#: Names the directory; no notes are written without it.
VARIABLE = "CRASH_NOTE_DIR"


@hookimpl
async def on_fatal_error(engine: Any, error: BaseException) -> None:
    """Write the note. In a thread, because the directory may be on a network file system that hangs."""
    directory = os.environ.get(VARIABLE)
    if directory:
        note = {
            "time": time.time(),
            "pid": os.getpid(),
            "engine": type(engine).__name__,
            "error": type(error).__name__,
            "message": str(error),
        }
        await asyncio.to_thread(write_note, Path(directory), note)


def write_note(directory: Path, note: dict[str, Any]) -> None:
    """Write one note atomically: a reader never sees half of it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"crash-{note['pid']}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
