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


def listening_ports() -> set[int]:
    """Return their ports."""
    return {int(listener.getsockname()[1]) for _, listener in listening_sockets()}


def keep_on_loopback(before: set[int]) -> set[int]:
    """Have those that listen on all interfaces take connections of this machine only; return their ports.

    The address that a socket is bound to cannot be changed any more, but its interface can.

    :param before: ports that are left as they are.
    :raises OSError: the kernel does not allow it: Linux before 5.7 wants CAP_NET_RAW.
    """
    changed = set()
    for _, listener in listening_sockets():
        host, port = listener.getsockname()[:2]
        if port not in before and host in ("0.0.0.0", "::"):  # noqa: S104 - what is to be closed
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            changed.add(port)
    return changed
