"""TCP ports for tests, which no other test of this machine gets: neither of this session nor of one beside it."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import Final

#: The ports: below those that the kernel gives to outgoing connections (32768 and up).
_PORTS: Final = range(10_000, 30_000)
#: Ports in a block.
_BLOCK: Final = 100


class PortBlocks:
    """Hands out ports from blocks that this process claims, each port once.

    A claim is a Unix socket with an abstract name, so it holds in this network namespace and ends with this process,
    however it ends. A port that is merely looked up as free may be taken before its owner listens on it.
    """

    def __init__(self) -> None:
        #: Descriptors of the claims, which stay open as long as this process runs.
        self.claims: list[int] = []
        self._ports: list[int] = []
        self._starts = list(_PORTS[::_BLOCK])
        random.SystemRandom().shuffle(self._starts)

    def next(self) -> int:
        """Return a port that is free on the loopback interface.

        :raises RuntimeError: every block is claimed.
        """
        while self._ports or self._claim():
            port = self._ports.pop()
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
        raise RuntimeError(f"tests on this machine have claimed all ports from {_PORTS.start} to {_PORTS.stop - 1}")

    def _claim(self) -> bool:
        """Claim another block; return whether there is one."""
        while self._starts:
            start = self._starts.pop()
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0dynamo-worker-test-ports-{start}")
            except OSError:
                claim.close()
                continue
            self.claims.append(claim.detach())
            self._ports = list(range(start, start + _BLOCK))
            return True
        return False
