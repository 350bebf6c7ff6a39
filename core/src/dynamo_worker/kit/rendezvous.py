"""The rendezvous of an engine's ranks: PyTorch's store, which listens on all interfaces whatever address it is given.

Anyone who can connect to the store can read and change the ranks' messages. On one machine, loopback is enough. The
engine's own processes import this module, but no other part of the worker.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from typing import Any, Final

from dynamo_worker.address import LOOPBACK, is_loopback

log = logging.getLogger(__name__)

#: Gloo's interface, which it would otherwise derive from the machine's name or routes.
_VARIABLES: Final = {"GLOO_SOCKET_IFNAME": "lo"}
#: Backlog of the listening socket: all ranks of a machine connect at once.
_BACKLOG: Final = 4096


def stay_on_loopback(*addresses: str) -> str:
    """Make an engine's processes talk to each other over loopback, unless the environment says otherwise.

    :param addresses: further variables that hold an address of this machine.
    :returns: the loopback address.
    """
    for name, value in {**_VARIABLES, **dict.fromkeys(addresses, LOOPBACK)}.items():
        if not os.environ.get(name):
            os.environ[name] = value
    return LOOPBACK


def listen_on_loopback() -> None:
    """Make the stores of this process listen on the address they are given, if that is loopback."""
    from torch.distributed import TCPStore

    # A function of the package has the same name and hides the module.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    original = getattr(rendezvous, "_create_c10d_store", None)
    if original is None:
        log.warning("PyTorch's store listens on all interfaces: this version of PyTorch is not supported")
        return

    def create(hostname: str, port: int, rank: int, world_size: int, timeout: Any, use_libuv: bool = True) -> Any:
        listener = None
        hostname = LOOPBACK if hostname == "localhost" else hostname
        if rank == 0 and is_loopback(hostname) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
            with contextlib.suppress(OSError):  # the port is taken, possibly by a store of this process
                listener = socket.create_server((hostname, port), family=family, backlog=_BACKLOG)
        if listener is None:
            return original(hostname, port, rank, world_size, timeout, use_libuv)
        return TCPStore(
            host_name=hostname,
            port=listener.getsockname()[1],
            world_size=world_size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            use_libuv=use_libuv,
            master_listen_fd=listener.detach(),
        )

    setattr(rendezvous, "_create_c10d_store", create)  # noqa: B010 - private: PyTorch has no setting for it
