"""`dynamo-worker resume HOST:PORT`: return a drained worker to service."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from dynamo_worker.cli.control_client import CommandParser
from dynamo_worker.host.drain_phase import RESUME

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION: Final = """\
Returns a drained worker to service: it accepts requests and enters discovery again. A drain in progress is stopped;
requests that it has not ended go on. Nothing happens to a worker that serves."""

EPILOG: Final = """\
examples:
  dynamo-worker resume localhost:9090
  kubectl exec POD -- dynamo-worker resume 9090         in a pod, where the control token is known

exit codes:
  0      the worker serves
  1      it cannot be reached, is starting or shutting down, or discovery does not take it back: it stays drained
  2      an argument is invalid, or the worker requires another control token"""


def main(argv: Sequence[str]) -> int:
    """Return one worker to service.

    :raises UsageError: an argument is invalid, or the worker does not let us.
    :raises WorkerError: the worker cannot be reached, or does not return to service.
    """
    parser = CommandParser("dynamo-worker resume", DESCRIPTION, EPILOG)
    parser.add_common()
    arguments = parser.parse_args(argv)
    client = parser.client(arguments)
    report, answer = client.call(RESUME)
    paused = "; the engine is paused and stays out of discovery until it is resumed" if report.engine_paused else ""
    print(json.dumps(answer) if arguments.json else f"{client.address}: in service, {report.requests}{paused}")
    return 0
