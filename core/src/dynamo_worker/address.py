"""Where a server listens: a host and a port, as people write them."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final, NamedTuple

from dynamo_worker.errors import UsageError

#: Every Linux machine has it, those without IPv4 to the outside included.
LOOPBACK: Final = "127.0.0.1"
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

    def resolved(self, what: str) -> Address:
        """Return the address with an IP address for the host: the Dynamo runtime takes nothing else.

        IPv4 comes first where a name has both: ``localhost`` is 127.0.0.1 for most clients.

        :param what: the setting that it comes from, as the user gave it.
        :raises UsageError: the name does not resolve.
        """
        return Address(resolve(self.host, f"{what} {self}"), self.port)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it. A name that does not resolve counts as one of the network."""
        try:
            return is_loopback(resolve(self.host, ""))
        except UsageError:
            return False


def is_loopback(host: str) -> bool:
    """Return whether an IP address is of this machine only; anything else is no such address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def resolve(host: str, what: str) -> str:
    """Return an IP address of a host that is to be listened on.

    :param what: the setting that it comes from, with its value.
    :raises UsageError: the name does not resolve.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UsageError(
            f"{what}: the host {host!r} cannot be resolved: {reason or error}",
            hint="give an IP address, such as 127.0.0.1 or 0.0.0.0",
        ) from error
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)  # stable: else the system's order
    return str(addresses[0][4][0])
