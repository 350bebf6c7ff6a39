"""The TCP sockets on which processes listen, and who can reach them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: ``NETLINK_SOCK_DIAG``, as used by ``ss``. ``/proc/net/tcp`` does not list interfaces, so a socket on 0.0.0.0 that is
#: restricted to the loopback interface looks reachable from outside.
_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_REQUEST_ALL: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_LISTEN: Final = 1 << 10
_HEADER: Final = struct.Struct("=IHHII")


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket.

    :param host: the address to which it is bound.
    :param port: its port.
    :param interface: number of the interface from which it accepts connections; 0 for all interfaces.
    :param process: PID and command line of a process that has it open.
    """

    host: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    interface: int
    process: str

    @property
    def on_loopback(self) -> bool:
        """Whether it is bound to a loopback address."""
        mapped = getattr(self.host, "ipv4_mapped", None)
        return bool((mapped or self.host).is_loopback)

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.on_loopback or self.interface == socket.if_nametoindex("lo")


def listening(pids: Iterable[int]) -> list[Listener]:
    """Return all sockets on which these processes listen."""
    owners = {inode: pid for pid in pids for inode in _sockets(pid)}
    return [
        Listener(host, port, interface, _command(owners[inode]))
        for host, port, interface, inode in _listeners()
        if inode in owners
    ]


def _listeners() -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, int, str]]:
    """Yield address, port, interface and inode of every listening socket on this machine."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        for family, length in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
            question = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, _LISTEN)
            kernel.send(_HEADER.pack(_HEADER.size + len(question), _SOCK_DIAG_BY_FAMILY, _REQUEST_ALL, 1, 0) + question)
            for answer in _answers(kernel):
                (port,) = struct.unpack_from("!H", answer, 4)
                (interface,) = struct.unpack_from("=I", answer, 40)
                (inode,) = struct.unpack_from("=I", answer, 68)
                yield ipaddress.ip_address(answer[8 : 8 + length]), port, interface, str(inode)


def _answers(kernel: socket.socket) -> Iterator[bytes]:
    while True:
        data = kernel.recv(1 << 16)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind == _DONE:
                return
            if kind == _ERROR:
                (code,) = struct.unpack_from("=i", data, _HEADER.size)
                raise OSError(-code, f"the kernel refused to list sockets: {os.strerror(-code)}")
            yield data[_HEADER.size : length]
            data = data[(length + 3) & ~3 :]


def _sockets(pid: int) -> Iterator[str]:
    """Yield the inodes of a process's sockets."""
    with contextlib.suppress(OSError):  # the process has exited
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
                if found:
                    yield found[1]


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return f"{pid} {file.read(200).replace(bytes(1), b' ').decode(errors='replace').strip()}"
    except OSError:
        return str(pid)
