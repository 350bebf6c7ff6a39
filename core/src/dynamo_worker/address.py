"""Network addresses: parsing HOST:PORT and resolving host names."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final, NamedTuple

from dynamo_worker.errors import UsageError

#: Available on every Linux machine, even without external IPv4.
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
        """Parse ``HOST:PORT``, ``HOST`` or ``PORT``; missing parts come from ``default``.

        :raises ValueError: the text has another form.
        """
        default_host, _, default_port = default.rpartition(":")
        if text.isdecimal():
            text = f"{default_host}:{text}"
        elif ":" not in text or text.endswith("]"):
            text = f"{text}:{default_port}"
        host, _, port = text.rpartition(":")
        if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("expected HOST:PORT (IPv6 addresses need brackets: [::1]:8000)")
        return cls(host.strip("[]") or default_host, int(port))

    def resolved(self, what: str) -> Address:
        """Return the address with its host resolved: the Dynamo runtime accepts IP addresses only.

        IPv4 is preferred where a name has both: most clients take ``localhost`` for 127.0.0.1.

        :param what: the setting it comes from, as the user wrote it.
        :raises UsageError: the host name cannot be resolved.
        """
        return Address(resolve(self.host, f"{what} {self}"), self.port)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it. An unresolvable name counts as remote."""
        try:
            return is_loopback(resolve(self.host, ""))
        except UsageError:
            return False


def is_loopback(host: str) -> bool:
    """Return whether the text is a loopback IP address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_ip(host: str) -> bool:
    """Return whether the text is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_unspecified(host: str) -> bool:
    """Return whether the text stands for all addresses of a machine."""
    return not host or (is_ip(host) and ipaddress.ip_address(host).is_unspecified)


def resolve(host: str, what: str) -> str:
    """Return an IP address for a host to listen on.

    :param what: the setting it comes from, with its value.
    :raises UsageError: the host name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UsageError(
            f"{what}: cannot resolve host {host!r}: {reason or error}",
            hint="use an IP address, such as 127.0.0.1 or 0.0.0.0",
        ) from error
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)  # stable: else the system's order
    return str(addresses[0][4][0])
