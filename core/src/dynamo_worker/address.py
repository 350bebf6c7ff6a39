"""Where a server listens: a host and a port, as people write them."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

#: A host name, an IPv4 address, an IPv6 address in brackets, or nothing.
_HOST: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])?")


class Address(NamedTuple):
    """A host name or IP address, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, default: str) -> Address:
        """Read ``HOST:PORT``, ``HOST`` or ``PORT``; what is missing comes from ``default``.

        :raises ValueError: it is none of these.
        """
        default_host, _, default_port = default.rpartition(":")
        if text.isdecimal():
            text = f"{default_host}:{text}"
        elif ":" not in text or text.endswith("]"):
            text = f"{text}:{default_port}"
        host, _, port = text.rpartition(":")
        if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("is not HOST:PORT (an IPv6 address needs brackets: [::1]:8000)")
        return cls(host.strip("[]") or default_host, int(port))
