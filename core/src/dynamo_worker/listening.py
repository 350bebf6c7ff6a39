"""The TCP sockets this process listens on: the runtime opens some and has no call for any of them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def listening_sockets() -> Iterator[tuple[int, socket.socket]]:
    """Yield each with its descriptor, as an object of our own that is closed when the next one is asked for."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            own = os.dup(int(name))
        except OSError:  # closed meanwhile, as the descriptor of the listing itself
            continue
        with socket.socket(fileno=own) as candidate:
            tcp = candidate.type == socket.SOCK_STREAM and candidate.family in (socket.AF_INET, socket.AF_INET6)
            if tcp and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield int(name), candidate
