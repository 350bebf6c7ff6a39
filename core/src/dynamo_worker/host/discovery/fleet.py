"""The workers that discovery knows, with the addresses of their status servers.

All backends name an entry ``namespace/component/endpoint/instance`` and hold the same two kinds of entries (measured on
1.6.1): an instance for each endpoint, and a card for each model. A worker that is drained has no instances, and keeps
its cards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from dynamo_worker.address import Address, is_ip, is_unspecified

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The item of a model card's ``runtime_data`` that holds the address of the worker's status server, HOST:PORT or
#: :PORT. Frontends do not compare it (``card_check.py``) and ignore names that they do not know.
STATUS_ADDRESS: Final = "dynamo_worker_status"
#: Longest name of anything in discovery, in characters.
_MOST_NAME: Final = 256
#: Most models and endpoints of one worker that are kept.
_MOST_NAMES: Final = 64
#: Digits of an instance id.
_INSTANCE_DIGITS: Final = 16


class Entry(NamedTuple):
    """One entry of discovery.

    :ivar is_card: whether it is a model card, otherwise the instance of an endpoint.
    :ivar name: ``namespace/component/endpoint/instance``, of an adapter's card with the adapter's name behind it.
    :ivar content: what it holds; anything, if it is not the runtime's.
    """

    is_card: bool
    name: str
    content: Any


@dataclass
class FoundWorker:
    """A worker in discovery.

    :ivar instance: its id, in hexadecimal digits.
    :ivar models: the names of the models that it serves, adapters included.
    :ivar endpoints: the names of its endpoints that take requests; none of a drained worker.
    :ivar status: where its status server is; None if discovery does not say it.
    """

    namespace: str
    component: str
    instance: str
    models: list[str] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)
    status: Address | None = None


def workers(entries: Iterable[Entry]) -> dict[str, FoundWorker]:
    """Return the workers that have entries, by their ids; entries that cannot be read are left out."""
    found: dict[str, FoundWorker] = {}
    published: dict[str, str] = {}
    hosts: dict[str, str] = {}
    metadata: dict[str, Address] = {}
    for entry in entries:
        names = entry.name.split("/")
        if len(names) < 4 or not _is_instance(names[3]) or not all(0 < len(name) <= _MOST_NAME for name in names[:3]):
            continue
        namespace, component, endpoint, instance = names[:4]
        worker = found.setdefault(instance, FoundWorker(namespace, component, instance))
        if entry.is_card:
            card = _part(entry.content, "card_json")
            _add(worker.models, card.get("display_name"))
            status = _part(_part(card, "runtime_config"), "runtime_data").get(STATUS_ADDRESS)
            if isinstance(status, str):
                published[instance] = status
            if (server := next(_file_servers(card), None)) is not None:
                metadata[instance] = server
        else:
            _add(worker.endpoints, endpoint)
            if (host := _requests_host(entry.content)) is not None:
                hosts[instance] = host
    for instance, worker in found.items():
        server = metadata.get(instance)
        host = hosts.get(instance) or (server.host if server is not None else "")
        # A worker that does not say where its own one is may say where the runtime's is, which has the metrics too.
        worker.status = _address(published.get(instance, ""), host) or server
    return found


def _is_instance(text: str) -> bool:
    try:
        return 0 < len(text) <= _INSTANCE_DIGITS and int(text, 16) >= 0
    except ValueError:
        return False


def _part(value: object, name: str) -> dict[str, Any]:
    part = value.get(name) if isinstance(value, dict) else None
    return part if isinstance(part, dict) else {}


def _add(names: list[str], name: object) -> None:
    if isinstance(name, str) and name and name not in names and len(names) < _MOST_NAMES:
        names.append(name[:_MOST_NAME])


def _address(text: str, host: str) -> Address | None:
    """Return a published address, completed by the host on which the worker takes requests."""
    try:
        address = Address.parse(text, f"{host}:0")
    except ValueError:
        return None
    if is_unspecified(address.host):
        address = Address(host, address.port)
    # Workers publish IP addresses only; a name server that hangs would delay everything.
    return address if is_ip(address.host) else None


def _requests_host(content: object) -> str | None:
    """Return the host on which an instance takes requests, if it takes them over TCP."""
    target = _part(content, "transport").get("tcp")
    return _host_of(f"tcp://{target}") if isinstance(target, str) else None


def _file_servers(card: dict[str, Any]) -> Iterator[Address]:
    """Yield the servers from which frontends read a model's files: the runtimes' own status servers."""
    for item in card.values():
        for file in item.values() if isinstance(item, dict) else ():
            path = file.get("path") if isinstance(file, dict) else None
            if isinstance(path, str) and path.startswith("http://"):
                try:
                    host, port = _host_of(path), urlsplit(path).port
                except ValueError:
                    continue
                if host is not None and port:
                    yield Address(host, port)


def _host_of(url: str) -> str | None:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return None
    return host if host is not None and is_ip(host) and not is_unspecified(host) else None
