"""A mark that every process of the worker's tree inherits and none loses: a resource limit that limits nothing.

The environment is not such a mark: ``setproctitle`` overwrites the memory that the kernel shows of it (vLLM and SGLang
name their processes so), and some processes are started with a fresh one. Limits pass through fork, exec, new sessions
and pid namespaces, and everybody may read them. ``RLIMIT_RTTIME`` bounds the CPU time of a real-time process that never
blocks; our values begin at 73 000 years.
"""

from __future__ import annotations

import contextlib
import os
import resource

_RLIMIT_RTTIME = 15  # the resource module does not name it
_LEAST = 2**61
_LINE = b"Max realtime timeout"


def draw() -> int:
    """Return a mark that nobody else has."""
    return _LEAST + int.from_bytes(os.urandom(7), "big")


def put_on_ourselves(mark: int) -> None:
    """Mark this process, and everything it starts from now on; do nothing where somebody uses that limit already."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(_RLIMIT_RTTIME)
        if hard == resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft >= _LEAST):
            resource.setrlimit(_RLIMIT_RTTIME, (mark, hard))


def of(pid: int) -> int | None:
    """Return the mark of a process, or None if it has none."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/limits", "rb", buffering=0) as file:
        for line in file.read(8192).splitlines():
            if line.startswith(_LINE):
                soft = line[len(_LINE) :].split()[0]
                return int(soft) if soft != b"unlimited" and int(soft) >= _LEAST else None
    return None
