"""The address at which processes of an engine on other machines reach this one."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from typing import TYPE_CHECKING, Final

from dynamo_worker.address import LOOPBACK, is_loopback
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

log = get_logger(__name__)

#: Where frontends reach this worker: the operator's choice of an address, and loopback if everything runs here.
_REQUESTS_HOST: Final = "DYN_TCP_RPC_HOST"
#: Addresses behind the default route, reserved for documentation. Nothing is sent to them.
_ELSEWHERE: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_PORT: Final = 9


def advertise(variable: str) -> str:
    """Set a variable to this machine's address for an engine that tells it to others, unless the operator has.

    The address is that of the worker's own endpoint if the operator has set it (``DYN_TCP_RPC_HOST``), or else the one
    that the machine's name stands for or from which the default route starts, IPv4 first. May wait for a name server.

    :returns: the value of the variable.
    """
    given = os.environ.get(variable)
    if given:
        return given
    address = next(_candidates(), None)
    if address is None:
        address = LOOPBACK
        log.warning(
            "Only loopback is known of this machine: engines on others cannot reach this one",
            address=address,
            next=f"set {variable}",
        )
    os.environ[variable] = address
    return address


def _candidates() -> Iterator[str]:
    own = os.environ.get(_REQUESTS_HOST, "")
    if is_loopback(own) or _is_routable(own):
        yield own
    yield from filter(_is_routable, _of_name())
    yield from filter(_is_routable, _of_routes())


def _is_routable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast)


def _of_name() -> Iterator[str]:
    """Yield the addresses of the machine's name that it has itself."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for family, _, _, _, place in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        address = str(place[0])
        # Binding fails with the address of a machine that had the name before.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            yield address


def _of_routes() -> Iterator[str]:
    """Yield the addresses that this machine would use towards others."""
    for family, elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, _PORT))  # of a datagram socket: only looks the route up
            yield str(probe.getsockname()[0])
