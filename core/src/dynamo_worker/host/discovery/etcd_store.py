"""The entries of a worker in etcd, on a lease of the worker's own."""

from __future__ import annotations

import base64
import contextlib
import time
from typing import TYPE_CHECKING, Final

from dynamo_worker.host.discovery.card_check import CARDS, MOST_CARDS, from_base64
from dynamo_worker.host.discovery.runtime_lease import RuntimeLease, grant
from dynamo_worker.host.discovery.store import INSTANCES, DiscoveryAwayError
from dynamo_worker.supervisor.etcd import EtcdError, entries_lease

if TYPE_CHECKING:
    from collections.abc import Collection

    from dynamo_worker.supervisor.etcd import Gateway

#: Seconds between checks while etcd answers, and while it refuses connections.
_INTERVAL: Final = 5.0
_AWAY_INTERVAL: Final = 1.0
#: Seconds after which an etcd that has accepted a request is deaf: the next one is sent at once.
_DEAF: Final = 1.0
#: Keys that are written with one request; etcd takes 128.
_WRITTEN_AT_ONCE: Final = 32
#: The part of a lease's life after which it is renewed.
_RENEWAL: Final = 1 / 3


class _UnreadableError(OSError):
    """A key has vanished before it could be read."""


class EtcdStore:
    """All keys of one worker in etcd, through its HTTP gateway.

    The runtime registers on its own lease, and shuts down when etcd has been away for longer than that lease lives. So
    this lease lives long, and the keys are moved to a second, shorter one that is kept alive here: it says when etcd
    may take the worker for dead, and its end costs the worker nothing but a new registration.
    """

    def __init__(self, etcd: Gateway, instance: int, *, ttl: int, runtime_ttl: int) -> None:
        """Keep the keys of a worker.

        :param instance: its id, which is also that of the runtime's lease.
        :param ttl: life in seconds of the lease on which the keys hang.
        :param runtime_ttl: that of the runtime's lease.
        """
        self._etcd = etcd
        self._runtime_lease = RuntimeLease(etcd, instance, runtime_ttl)
        self._lease = str(entries_lease(instance))
        self._ttl = ttl
        self._values: dict[str, str] = {}
        self._renewed = -float("inf")
        self._away = False
        self._deaf = False
        self._closed = False

    @property
    def interval(self) -> float:
        """Seconds until the next check.

        A deaf etcd that goes on removes the keys of leases that have ended within milliseconds. Then a request is
        there already, whose answer begins the registration: every pause would be a time without workers.
        """
        if self._away:
            return 0.0 if self._deaf else _AWAY_INTERVAL
        return min(_INTERVAL, self._ttl * _RENEWAL)

    @property
    def count(self) -> int:
        """The number of expected keys."""
        return len(self._values)

    def adopt(self, lost: Collection[str]) -> None:
        """Expect the keys that exist now, and those that were ``lost``.

        :raises DiscoveryAwayError: etcd does not answer.
        """
        try:
            self._move()
            there = self._keys() or set()
            read = {key: self._value(key) for key in there}
        except OSError as error:
            raise DiscoveryAwayError(str(error)) from error
        self._values = {**{key: self._values[key] for key in lost if key not in there}, **read}

    def missing(self) -> list[str]:
        """Return the expected keys that do not exist; keep both leases alive.

        :raises DiscoveryAwayError: etcd does not answer.
        """
        started = time.monotonic()
        try:
            if self._away or started - self._renewed > self._ttl * _RENEWAL:
                self._move()
                self._renew()
            there = self._keys() or set()
            for key in there.difference(self._values):
                with contextlib.suppress(_UnreadableError):
                    self._values[key] = self._value(key)
        except OSError as error:
            self._away, self._deaf = True, time.monotonic() - started >= _DEAF
            raise DiscoveryAwayError(str(error)) from error
        self._away = False
        return [key for key in self._values if key not in there]

    def restore(self, names: Collection[str]) -> None:
        """Write keys again as they were, the instance (``v1/instances``) before the models (``v1/mdc``)."""
        self._grant()
        ordered = sorted(names, key=base64.b64decode)
        for start in range(0, len(ordered), _WRITTEN_AT_ONCE):
            puts = [
                {"request_put": {"key": key, "value": self._values[key], "lease": self._lease}}
                for key in ordered[start : start + _WRITTEN_AT_ONCE]
            ]
            if not self._closed:
                self._etcd.call("/v3/kv/txn", {"success": puts})

    def endpoint(self, name: str) -> str | None:
        """Return the endpoint ``namespace/component/name`` that an entry stands for; None for other entries."""
        key = base64.b64decode(name).decode(errors="replace")
        return key.removeprefix(INSTANCES).rpartition("/")[0] if key.startswith(INSTANCES) else None

    def cards(self) -> tuple[list[bytes], list[bytes]]:
        """Return this worker's entries with model cards, and those of some other workers of the same endpoints."""
        keys = {key: from_base64(key) for key in self._values}
        own = {key: self._values[key] for key, name in keys.items() if name.startswith(CARDS.encode())}
        others: list[bytes] = []
        # The prefix ends with a slash, and the range with the character after it.
        for prefix in {b"/".join(keys[key].split(b"/")[:5]) for key in own}:
            ends = {name: base64.b64encode(prefix + end).decode() for name, end in (("key", b"/"), ("range_end", b"0"))}
            found = self._etcd.call("/v3/kv/range", {**ends, "limit": MOST_CARDS}).get("kvs", ())
            others += [from_base64(str(item.get("value", ""))) for item in found if item.get("key") not in own]
        return [from_base64(value) for value in own.values()], others

    def close(self) -> None:
        """Restore nothing from now on, not even when a hanging call continues."""
        self._closed = True

    def release(self) -> None:
        """Remove all keys, with their lease."""
        try:
            self._etcd.call("/v3/lease/revoke", {"ID": self._lease})
        except EtcdError as error:
            if "lease not found" not in str(error):
                raise

    def _move(self) -> None:
        """Move the keys on the runtime's lease to ours, and make sure that the runtime has its lease."""
        if self._closed:
            return
        keys = self._runtime_lease.ensure()
        if keys:
            self._grant()
        for key in keys:
            found = self._etcd.call("/v3/kv/range", {"key": key}).get("kvs", ())
            if found and not self._closed:
                # Only if it is still what was read: the runtime may have removed it meanwhile.
                unchanged = {"key": key, "target": "MOD", "mod_revision": found[0]["mod_revision"]}
                put = {"key": key, "value": found[0].get("value", ""), "lease": self._lease}
                self._etcd.call("/v3/kv/txn", {"compare": [unchanged], "success": [{"request_put": put}]})

    def _grant(self) -> None:
        if not self._closed:
            grant(self._etcd, self._lease, self._ttl)
            self._renewed = time.monotonic()

    def _renew(self) -> None:
        started = time.monotonic()
        answer = self._etcd.call("/v3/lease/keepalive", {"ID": self._lease})
        if int(answer.get("result", {}).get("TTL", 0)) > 0:
            self._renewed = started

    def _keys(self) -> set[str] | None:
        """Return the keys of our lease; None if it has ended."""
        answer = self._etcd.call("/v3/lease/timetolive", {"ID": self._lease, "keys": True})
        return set(answer.get("keys", ())) if int(answer.get("TTL", -1)) > 0 else None

    def _value(self, key: str) -> str:
        found = self._etcd.call("/v3/kv/range", {"key": key}).get("kvs", ())
        if not found:  # removed meanwhile; never restore what was not read
            raise _UnreadableError(f"etcd: the key {base64.b64decode(key).decode(errors='replace')} cannot be read")
        return str(found[0].get("value", ""))
