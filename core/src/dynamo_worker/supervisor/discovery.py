"""Withdraws the registration of a dead worker, so no router sends it another request."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from dynamo_worker.supervisor import kubernetes
from dynamo_worker.supervisor.etcd import EtcdError, Gateway, entries_lease, etcd_endpoints, secured

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds for one etcd endpoint to answer.
_ETCD_TIMEOUT = 1.5

#: 64 random bits in hexadecimal digits. Shorter ones could be part of other names.
_INSTANCE = re.compile(r"[0-9a-f]{8,16}")

#: Most event publishers of one worker.
_MOST_PUBLISHERS = 256


def prepare() -> None:
    """Load what a withdrawal over TLS needs: that takes longer than the withdrawal itself.

    No certificate is read yet: by the time of the withdrawal, others may be valid.
    """
    if os.environ.get("DYN_DISCOVERY_BACKEND") == "kubernetes" or any(map(secured, etcd_endpoints())):
        import ssl

        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def withdraw(registration: dict[str, Any], deadline: float, root: str | None = None) -> str:
    """Withdraw one recorded registration and describe what was done. Blocks; never raises.

    :param registration: an entry of the ledger.
    :param deadline: when to give up (monotonic).
    :param root: the only directory of the ``file`` backend in which files may be removed; None: any, for records that
        only our own worker can have written.
    """
    backend = registration.get("backend")
    try:
        if backend == "file":
            recorded = str(registration["root"])
            if root is not None and os.path.realpath(recorded) != os.path.realpath(root):
                return f"file: left to expire: {recorded} is not the discovery directory of this worker"
            return _withdraw_file(recorded, [_instance(registration), *_publishers(registration)])
        if backend == "etcd":
            return _withdraw_etcd(int(_instance(registration), 16), deadline)
        if backend == "kubernetes":
            # A later worker of this pod has the same resource: only the guardian of the one that is dead may empty it.
            return "kubernetes: left to this pod's own worker" if root is not None else kubernetes.withdraw(deadline)
    except Exception as error:  # the other registrations and the rest of the cleanup continue
        return f"{backend}: failed: {type(error).__name__}: {error}"
    return f"{backend}: nothing to withdraw from outside"


def _instance(registration: dict[str, Any]) -> str:
    """Return the recorded instance id.

    :raises ValueError: the runtime gives no such id.
    """
    instance = str(registration["instance"])
    if not _INSTANCE.fullmatch(instance):
        raise ValueError(f"{instance[:40]!r} is not an instance id")
    return instance


def _publishers(registration: dict[str, Any]) -> list[str]:
    """Return the recorded ids of event publishers, as far as they are ids."""
    recorded = registration.get("publishers")
    found = [str(each) for each in recorded[:_MOST_PUBLISHERS]] if isinstance(recorded, list) else []
    return [each for each in found if _INSTANCE.fullmatch(each)]


def _withdraw_file(root: str, ids: Sequence[str]) -> str:
    """Unlink every file below ``root`` with one of the ids in its name; routers notice within milliseconds."""
    # As a whole word: in names it follows an escaped slash, `%2F`.
    named = re.compile(rf"(?:^|%[0-9A-Fa-f]{{2}}|[^0-9A-Fa-f])(?:{'|'.join(ids)})(?![0-9a-f])")
    removed = 0
    with contextlib.suppress(FileNotFoundError):  # nothing was registered there
        for _, _, names, directory in os.fwalk(os.path.realpath(root)):
            for name in filter(named.search, names):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
                    removed += 1
    return f"file: {removed} files removed"


def _withdraw_etcd(instance: int, deadline: float) -> str:
    """Revoke the worker's leases, which removes all of its keys at once; that of its entries first."""
    gateway = Gateway(etcd_endpoints(), _ETCD_TIMEOUT, deadline)
    revoked = [_revoke(gateway, lease) for lease in (entries_lease(instance), instance)]
    return "etcd: lease revoked" if any(revoked) else "etcd: lease already gone"


def _revoke(gateway: Gateway, lease: int) -> bool:
    """Revoke a lease; return whether it existed."""
    try:
        gateway.call("/v3/lease/revoke", {"ID": str(lease)})
    except EtcdError as error:
        if "lease not found" in str(error):
            return False
        raise OSError(f"lease not revoked: {error}") from error
    return True
