"""The announcements of this worker's event publishers in the ``file`` discovery backend.

The runtime gives every publisher a random id that nothing connects with the worker's (1.6.1), and offers no way to ask
for it. What an announcement says of its publisher is the address on which it listens.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from dynamo_worker.host.listening import listening_ports
from dynamo_worker.supervisor.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Where the announcements are, below the directory of the backend.
CHANNELS: Final = "v1/event_channels"
#: Longest announcement in bytes; they have some hundred.
_MOST_BYTES: Final = 1 << 16
#: Most publishers of one worker: each data-parallel rank may have several.
_MOST_PUBLISHERS: Final = 256


class OwnPublishers:
    """Finds out which of the announcements are this process's own.

    :param record: called with the ids of all publishers found so far, in hexadecimal digits, when there are new ones.
    """

    def __init__(self, record: Callable[[list[str]], None]) -> None:
        self._record = record
        self._ids: set[str] = set()
        self._seen: set[str] = set()

    def look(self, directory: str, names: Iterable[str]) -> None:
        """Look at the announcements that are new in their directory.

        :raises OSError: the ports of this process cannot be listed, or the ids not recorded.
        """
        names = {name for name in names if not name.startswith(".")}
        new = names - self._seen
        found = {}
        for name in new:
            with contextlib.suppress(OSError):  # removed meanwhile, or not the runtime's
                address = _address(os.path.join(directory, name))
                if address is not None:
                    found[unquote(name).rpartition("/")[2]] = address
        if found:
            ports = listening_ports()
            # A port alone would also be that of a worker in another container that shares the directory.
            own = {each for each, (host, port) in found.items() if port in ports and _is_here(host)} - self._ids
            if own and len(self._ids) + len(own) <= _MOST_PUBLISHERS:
                self._record(sorted(self._ids | own))
                self._ids |= own
        self._seen = names


def _address(path: str) -> tuple[str, int] | None:
    """Return the host and port on which the publisher of an announcement listens; None if it names none.

    :raises OSError: the file cannot be read, or belongs to another user.
    """
    with open(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to another user")
        text = file.read(_MOST_BYTES)
    try:
        announcement: Any = json.loads(text)
        parts = urlsplit(announcement["transport"]["config"]["endpoint"])
        return (parts.hostname, parts.port) if parts.hostname and parts.port else None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _is_here(host: str) -> bool:
    """Return whether an IP address is one of this machine's, or container's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
