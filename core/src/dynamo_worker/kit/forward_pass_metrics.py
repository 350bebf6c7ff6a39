"""Forward-pass metrics: what an engine's scheduler did in each iteration, for Dynamo's planner.

They are off unless the operator asks for them. An engine whose scheduler runs in another process publishes each rank's
messages on a socket file, in the format of ``dynamo.common.forward_pass_metrics``; the runtime forwards them to the
planner without passing through this process's event loop.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Final

from dynamo_worker.kit.engine_arguments import switched_on
from dynamo_worker.logs import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from dynamo.llm import FpmEventRelay
    from dynamo.runtime import Endpoint

log = get_logger(__name__)

#: Asks for the metrics. Dynamo's own worker for vLLM publishes on this port; here its number has no meaning.
_PORT: Final = "DYN_FORWARDPASS_METRIC_PORT"
#: Asks for the metrics and for a trace of them, which the runtime writes.
_TRACE: Final = "DYN_FPM_TRACE"
_OFF: Final = ("", "0", "false", "off", "no")
#: Name of the socket files; each rank appends a dot and its number.
_SOCKET: Final = "forward-passes"


def add_flag(group: argparse._ArgumentGroup) -> None:
    """Add ``--fpm-trace``."""
    group.add_argument(
        "--fpm-trace",
        action=argparse.BooleanOptionalAction,
        help="publish forward-pass metrics for the planner and write them into rotating files at DYN_FPM_OUTPUT_PATH; "
        "DYN_FORWARDPASS_METRIC_PORT publishes them without files (env: DYN_FPM_TRACE)",
    )


def wanted(args: argparse.Namespace) -> bool:
    """Return whether the operator asks for the metrics; tell the runtime whether to write a trace.

    Must be called before anything is published: the runtime reads the environment then.
    """
    trace = args.fpm_trace
    if trace is None:
        trace = switched_on(_TRACE)
        given = os.environ.get(_TRACE, "").strip().lower()
        if not trace and given not in _OFF:
            log.warning("Forward-pass metrics are not traced", variable=_TRACE, value=given, expected="1 or 0")
    if trace or _TRACE in os.environ:
        os.environ[_TRACE] = "1" if trace else "0"
    return trace or bool(os.environ.get(_PORT))


def address(private_dir: Path) -> str:
    """Return the ZMQ address of an engine's ranks, to which each appends a dot and its number."""
    return f"ipc://{private_dir}/{_SOCKET}"


def relay(endpoint: Endpoint, private_dir: Path) -> list[FpmEventRelay]:
    """Forward what the ranks on this machine publish at :func:`address`, with one relay for each.

    :returns: the relays, which work until their ``shutdown`` is called; none if no rank publishes.
    """
    from dynamo.llm import FpmEventRelay

    sockets = sorted(private_dir.glob(f"{_SOCKET}.*"))
    for path in sockets:
        log.info("Forward-pass metrics are published", rank=path.suffix[1:])
    return [FpmEventRelay(endpoint, f"ipc://{path}") for path in sockets]
