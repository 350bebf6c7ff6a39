"""Both ends of pipes for the tests of what writes to them."""

from __future__ import annotations

import contextlib
import os
import select

from dynamo_worker.supervisor.output import write_now


def lost(lines: int) -> bytes:
    return b"lost %d\n" % lines


def read(descriptor: int, size: int = 1 << 20) -> bytes:
    data = b""
    while select.select([descriptor], [], [], 0)[0]:
        piece = os.read(descriptor, size)
        if not piece:
            break
        data += piece
    return data


def fill(descriptor: int) -> int:
    """Fill a pipe from this side without changing its flags, and return how much that took."""
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += write_now(descriptor, b"x" * 4096)
    return filled
