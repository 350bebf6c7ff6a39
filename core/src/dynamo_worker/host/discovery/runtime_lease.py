"""The lease of the Dynamo runtime in etcd: how long it lives, and what keeps it from being lost.

A runtime whose lease is lost shuts down and cannot be used again. It keeps the lease alive, and looks for it again when
etcd returns, until half to all of the lease's life has passed without an answer (measured on 1.6.1). It never asks for
a new one; a lease that somebody else grants under the same id is as good to it.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from dynamo_worker.errors import ServerUnreachableError, UsageError
from dynamo_worker.logs import get_logger
from dynamo_worker.supervisor.etcd import PEM_VARIABLES, EtcdError, Gateway, etcd_endpoints, pem

if TYPE_CHECKING:
    from collections.abc import Callable

log = get_logger(__name__)

#: Dynamo's variable for the life of a runtime's lease in seconds; whole numbers only.
_TTL_VARIABLE: Final = "ETCD_LEASE_TTL"
#: Seconds for one endpoint of etcd to answer.
_TIMEOUT: Final = 2.0
#: What etcd answers to a call of its gateway if that is disabled.
_NOT_FOUND: Final = 404
#: Seconds between checks of a lease.
_INTERVAL: Final = 5.0
_AWAY_INTERVAL: Final = 1.0
#: Seconds by which the runtime's lease outlives an outage that is too long: we end first, with a reason.
_MARGIN: Final = 30.0


def gateway() -> Gateway:
    """Return the gateway of the etcd that the environment names."""
    return Gateway(etcd_endpoints(), _TIMEOUT)


def prepare(outage: float) -> int:
    """Have the next runtime of this process survive an etcd that is away for ``outage`` seconds.

    It renews its lease after half of its life, so an outage may begin when the other half is left. It also reads
    certificates from variables only, and gets those that the variables name as files.

    :returns: the life of its lease in seconds.
    :raises UsageError: a certificate or key cannot be read.
    """
    ttl = math.ceil(2 * (outage + _MARGIN))
    os.environ[_TTL_VARIABLE] = str(ttl)
    for variable in PEM_VARIABLES:
        try:
            text = pem(variable)
        except OSError as error:
            # Not its value, which may be a key that lacks its first line.
            raise UsageError(
                f"{variable}: expected the path of a PEM file, or its content: {error.strerror or error}",
                hint="check the path, and that this user may read it",
            ) from error
        if text is not None:
            os.environ[variable] = text.decode("ascii", "replace")
    return ttl


async def without_gateway(ttl: float) -> bool:
    """Return whether etcd has no HTTP gateway; have the next runtime register on a lease of ``ttl`` seconds then.

    Nobody can keep the worker's entries on another lease, or grant the runtime's again, so that one decides.
    """
    try:
        call = asyncio.get_running_loop().run_in_executor(None, gateway().call, "/v3/kv/range", {"key": "djEv"})
        await call
    except EtcdError as error:
        if error.status == _NOT_FOUND:
            os.environ[_TTL_VARIABLE] = str(math.ceil(ttl))
            log.warning("Etcd has no HTTP gateway: an outage ends the worker with its lease", lease_s=math.ceil(ttl))
            return True
    except OSError as error:  # it has just gone away
        log.debug("Cannot ask for etcd's gateway", error=error)
    return False


class RuntimeLease:
    """The lease of a Dynamo runtime, which shuts down soon after it has lost it (measured on 1.6.1).

    The runtime keeps the lease alive but never asks for it again. A lease with the same id satisfies it.
    """

    def __init__(self, etcd: Gateway, lease: int, ttl: int) -> None:
        """Watch a lease.

        :param ttl: its life in seconds.
        """
        self._etcd = etcd
        self._lease = str(lease)
        self._ttl = ttl

    def ensure(self) -> list[str]:
        """Grant the lease again if etcd does not know it any more; return the keys that hang on it. Blocks.

        :raises OSError: etcd does not answer, or refuses.
        """
        answer = self._etcd.call("/v3/lease/timetolive", {"ID": self._lease, "keys": True})
        if int(answer.get("TTL", -1)) > 0:
            return list(answer.get("keys", ()))
        grant(self._etcd, self._lease, self._ttl)
        log.warning("Lease granted again: etcd had lost it", lease=f"{int(self._lease):x}")
        return []


def grant(etcd: Gateway, lease: str, ttl: int) -> None:
    """Grant a lease with a given id unless it exists. Blocks.

    :raises OSError: etcd does not answer, or refuses.
    """
    try:
        etcd.call("/v3/lease/grant", {"ID": lease, "TTL": str(ttl)})
    except EtcdError as error:
        if "lease already exists" not in str(error):
            raise


class LeaseKeeper:
    """Keeps the lease of a runtime that has no entries to look after: a frontend's."""

    def __init__(
        self, lease: RuntimeLease, on_fatal: Callable[[ServerUnreachableError], None], *, outage: float
    ) -> None:
        """Watch ``lease`` once :meth:`run` is called.

        :param on_fatal: called when etcd has not answered for ``outage`` seconds.
        """
        self._lease = lease
        self._on_fatal = on_fatal
        self._outage = outage

    async def run(self) -> None:
        """Check until cancelled, or until etcd has been away for too long."""
        executor = ThreadPoolExecutor(1, "lease")
        away_since: float | None = None
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(executor, self._lease.ensure)
            except OSError as error:
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    log.warning(
                        "Discovery does not answer; the frontend keeps serving", reason=error, outage_s=self._outage
                    )
                elif now - away_since >= self._outage:
                    self._on_fatal(
                        ServerUnreachableError(f"discovery has not answered for {self._outage:g} s: {error}")
                    )
                    return
            else:
                if away_since is not None:
                    log.warning("Discovery answers again", away_s=time.monotonic() - away_since)
                away_since = None
            await asyncio.sleep(_INTERVAL if away_since is None else _AWAY_INTERVAL)
