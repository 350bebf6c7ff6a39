"""Which addresses media may be fetched from: public ones, and those of networks that the operator allows.

What counts is the address that a connection goes to. A URL may reach it through a name that resolves differently each
time, through an IPv6 address that stands for one of IPv4, or through a redirect.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    _Address = ipaddress.IPv4Address | ipaddress.IPv6Address
    _Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Networks that are not public (IANA's registries of special addresses), and what they are. The first that matches
#: counts. Python's own ``is_global`` differs between its releases.
_SPECIAL: Final = tuple(
    (ipaddress.ip_network(network), word)
    for word, networks in {
        "loopback": "127.0.0.0/8 ::1/128",
        "unspecified": "0.0.0.0/8 ::/128",
        "link-local": "169.254.0.0/16 fe80::/10",
        "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7 fec0::/10",
        "multicast": "224.0.0.0/4 ff00::/8",
        "reserved": "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 "
        "2001::/23 2001:db8::/32 3fff::/20",
        "a tunnel": "2002::/16 64:ff9b:1::/48",
    }.items()
    for network in networks.split()
)
#: All public addresses of IPv6, and special ones among them.
_PUBLIC_IPV6: Final = ipaddress.ip_network("2000::/3")
#: Where clouds hand out credentials and settings to whoever asks from a machine of theirs. Some are public addresses.
_METADATA: Final = frozenset(
    ipaddress.ip_address(address)
    for address in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.0.23", "fd00:ec2::254", "fd00:ec2::23"),
        *("fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)
#: IPv6 addresses behind which a translator reaches the IPv4 address in their last four bytes.
_TRANSLATED: Final = ipaddress.ip_network("64:ff9b::/96")


class AddressPolicy:
    """Decides which addresses media may be fetched from."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        """Take what the operator allows.

        :param networks: networks that are allowed although they are not public. One of them includes the address of a
            metadata service only if it has no other.
        """
        self._allowed = tuple(ipaddress.ip_network(network) for network in networks)

    def refusal(self, address: str) -> str | None:
        """Return why an address is refused, such as ``loopback``; None if it is allowed.

        :param address: as ``getaddrinfo`` and ``getpeername`` write it.
        """
        try:
            target = _target(address)
        except ValueError:
            return "no address"
        if target in _METADATA:
            alone = any(target in network and network.num_addresses == 1 for network in self._allowed)
            return None if alone else "a metadata service"
        if any(target in network for network in self._allowed):
            return None
        for network, word in _SPECIAL:
            if target in network:
                return word
        return None if target.version == 4 or target in _PUBLIC_IPV6 else "reserved"


def _target(address: str) -> _Address:
    """Return the address that a packet arrives at."""
    target = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(target, ipaddress.IPv6Address):
        if target.ipv4_mapped is not None:
            return target.ipv4_mapped
        if target in _TRANSLATED:
            return ipaddress.IPv4Address(int(target) & 0xFFFF_FFFF)
    return target
