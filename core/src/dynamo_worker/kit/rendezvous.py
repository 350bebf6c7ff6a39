"""Where the ranks of an engine meet: PyTorch's store, which listens on all interfaces whatever address it is given.

Whoever connects to it reads and writes what the ranks tell each other. An engine on one machine needs no more than
loopback for that. This is for the processes of an engine: they import nothing else of the worker.
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

#: What libraries of an engine would otherwise take from the name of the machine, or from its routes: Gloo's interface.
_VARIABLES: Final = {"GLOO_SOCKET_IFNAME": "lo"}
#: Connections that may wait: all ranks of a machine come at once.
_BACKLOG: Final = 4096


def stay_on_loopback(*addresses: str) -> None:
    """Have an engine's processes use loopback among each other, where nobody has said otherwise.

    :param addresses: further variables, which hold an address of this machine.
    """
    for name, value in {**_VARIABLES, **dict.fromkeys(addresses, LOOPBACK)}.items():
        if not os.environ.get(name):
            os.environ[name] = value


def listen_on_loopback() -> None:
    """Have the stores of this process listen where they are told, if that is loopback."""
    from torch.distributed import TCPStore

    # The package has a function of this name, which hides the module.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    original = getattr(rendezvous, "_create_c10d_store", None)
    if original is None:
        log.warning("PyTorch's store listens on all interfaces: this version is not known")
        return

    def create(hostname: str, port: int, rank: int, world_size: int, timeout: Any, use_libuv: bool = True) -> Any:
        listener = None
        hostname = LOOPBACK if hostname == "localhost" else hostname
        if rank == 0 and is_loopback(hostname) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
            with contextlib.suppress(OSError):  # the port is taken, maybe by a store of this process, which is shared
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

    setattr(rendezvous, "_create_c10d_store", create)  # noqa: B010 - private: there is no setting for it
