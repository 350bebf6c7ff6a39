"""The TCP sockets that this process listens on: the runtime opens some and offers no access to them."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def listening_sockets() -> Iterator[tuple[int, socket.socket]]:
    """Yield the descriptor and a duplicate of each; the duplicate is closed before the next one is yielded."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            own = os.dup(int(name))
        except OSError:  # closed meanwhile, like the descriptor of the listing itself
            continue
        with socket.socket(fileno=own) as candidate:
            tcp = candidate.type == socket.SOCK_STREAM and candidate.family in (socket.AF_INET, socket.AF_INET6)
            if tcp and candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield int(name), candidate


def listening_ports() -> set[int]:
    """Return the ports that this process listens on."""
    return {int(listener.getsockname()[1]) for _, listener in listening_sockets()}


def keep_on_loopback(earlier_ports: set[int]) -> set[int]:
    """Restrict sockets that listen on all interfaces to connections from this machine; return their ports.

    The address of a bound socket cannot be changed, but its interface can.

    :param earlier_ports: ports to leave alone.
    :raises OSError: the kernel does not allow it: Linux before 5.7 requires CAP_NET_RAW.
    """
    changed = set()
    for _, listener in listening_sockets():
        host, port = listener.getsockname()[:2]
        if port not in earlier_ports and host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            changed.add(port)
    return changed
