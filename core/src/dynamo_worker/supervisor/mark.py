"""A mark that every process of the worker's tree inherits and keeps: a resource limit without effect.

The environment does not serve: ``setproctitle``, which vLLM and SGLang use, overwrites the memory in which the kernel
finds it, and some processes are started with a fresh one. Limits survive fork, exec, new sessions and pid namespaces,
and any process can read them. ``RLIMIT_RTTIME`` bounds the CPU time of a real-time process that never blocks; our
values start at 73 000 years.
"""

from __future__ import annotations

import contextlib
import os
import resource

_RLIMIT_RTTIME = 15  # not in the resource module
_LEAST = 2**61
_LINE = b"Max realtime timeout"


def draw() -> int:
    """Return a new random mark."""
    return _LEAST + int.from_bytes(os.urandom(7), "big")


def put_on_ourselves(mark: int) -> None:
    """Mark this process and everything it starts from now on; do nothing if the limit is already in use."""
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
