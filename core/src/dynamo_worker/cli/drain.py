"""`dynamo-worker drain HOST:PORT`: take a running worker out of service without ending it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from dynamo_worker import logs
from dynamo_worker.cli.control_client import CommandParser, ControlClient, Report
from dynamo_worker.deadline import Deadline
from dynamo_worker.errors import WorkerError
from dynamo_worker.exit_codes import ExitCode
from dynamo_worker.host.config.drain_mode import DrainMode
from dynamo_worker.host.config.options import SECONDS
from dynamo_worker.host.drain_phase import DRAIN, DRAIN_STATUS, DrainPhase
from dynamo_worker.host.drain_progress import DrainProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION: Final = """\
Takes a running worker out of service without ending it. The worker leaves discovery, keeps serving routers that have
not noticed yet for a grace period, and then refuses new requests, which go to other workers. Requests in flight finish
or move, as the mode says. The engine stays loaded and warm: `dynamo-worker resume` returns the worker to service.

A drain in progress is made faster by another one (a stricter mode, a shorter budget), never slower. SIGTERM ends the
worker as usual."""

EPILOG: Final = """\
examples:
  dynamo-worker drain localhost:9090 --wait             let requests finish, as a shutdown does; return once drained
  dynamo-worker drain localhost:9090 --budget 600       give them ten minutes; return at once
  dynamo-worker drain localhost:9090 --mode handoff     move them to other workers now
  kubectl exec POD -- dynamo-worker drain 9090 --wait   in a pod, where the control token is known

exit codes:
  0      the drain has begun; with --wait: nothing is in flight any more
  1      the worker cannot be reached, is starting or shutting down, or left the drain while this command waited
  2      an argument is invalid, or the worker requires another control token
  6      with --wait: the budget is over, and requests have not ended although the worker has told them to
  130    Ctrl-C while waiting; the drain goes on"""

_HINT: Final = "Ctrl-C to stop watching; the drain goes on."
#: Seconds between two questions about the progress.
_POLL: Final = 0.2
#: Seconds after the budget for requests to end once they are told to.
_OVERTIME: Final = 5.0


class _StillBusyError(WorkerError):
    exit_code = ExitCode.DEADLINE


def parser() -> CommandParser:
    """Return the parser of the command."""
    result = CommandParser("dynamo-worker drain", DESCRIPTION, EPILOG)
    result.add_argument(
        "--mode",
        choices=[mode.value for mode in DrainMode],
        help="; ".join(f"{mode}: {mode.summary}" for mode in DrainMode) + " [default: the worker's --drain]",
    )
    result.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="time from now until requests that are left are handed off or aborted [default: as much as a shutdown "
        "of the worker has]",
    )
    result.add_argument(
        "--grace-period",
        type=_seconds,
        metavar="SECONDS",
        help="time to accept requests after leaving discovery; 0 for none [default: the worker's --grace-period, "
        "otherwise 5 with complete, 0 with the other modes]",
    )
    result.add_argument("--wait", action="store_true", help="show the progress, and return once nothing is in flight")
    result.add_common()
    return result


def main(argv: Sequence[str]) -> int:
    """Drain one worker.

    :raises UsageError: an argument is invalid, or the worker does not let us.
    :raises WorkerError: the worker cannot be reached, or cannot be drained.
    """
    commands = parser()
    arguments = commands.parse_args(argv)
    client = commands.client(arguments)
    body = {name: getattr(arguments, name) for name in ("mode", "budget", "grace_period")}
    report, answer = client.call(DRAIN, {name: value for name, value in body.items() if value is not None})
    if arguments.wait and report.phase is not DrainPhase.DRAINED:
        logs.setup("info", "text")
        report, answer = asyncio.run(_wait(client, report, answer))
    if report.phase is DrainPhase.DRAINED and report.in_discovery:
        print(
            f"dynamo-worker: warning: {client.address}: discovery has not let the worker go yet; it tries again. Until "
            "then its requests are refused and go to other workers",
            file=sys.stderr,
        )
    print(json.dumps(answer) if arguments.json else f"{client.address}: {_outcome(client, report)}")
    return 0


def _outcome(client: ControlClient, report: Report) -> str:
    if report.phase is DrainPhase.DRAINED:
        return f"drained, the engine is warm. `dynamo-worker resume {client.address}` returns it to service"
    fate = "" if report.mode is None else f"; {report.left_s:.0f} s until the rest is {report.mode.remainder}"
    return f"draining: {report.requests}{fate}. `dynamo-worker drain {client.address} --wait` shows the progress"


class _Requests:
    """The number of requests in flight, as last reported."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


async def _wait(client: ControlClient, report: Report, answer: dict[str, Any]) -> tuple[Report, dict[str, Any]]:
    """Show the progress until the worker is drained; return its last report.

    :raises WorkerError: it does not become drained.
    """
    left = _Requests(report.in_flight)
    over = time.monotonic() + report.left_s + _OVERTIME
    mode = report.mode or DrainMode.COMPLETE
    with DrainProgress(left, Deadline.after(report.left_s), mode, _HINT) as progress:
        while report.phase is not DrainPhase.DRAINED:
            await asyncio.sleep(_POLL)
            report, answer = await asyncio.to_thread(lambda: client.call(DRAIN_STATUS))
            if report.phase in (DrainPhase.SERVING, DrainPhase.RESUMING) or report.mode is None:
                raise WorkerError(f"{client.address}: the worker was resumed before it was drained")
            left.count, progress.deadline, progress.mode = report.in_flight, Deadline.after(report.left_s), report.mode
            over = min(over, time.monotonic() + report.left_s + _OVERTIME)
            if time.monotonic() > over:
                raise _StillBusyError(
                    f"{client.address}: the budget is over, and {report.requests} have not ended",
                    hint="wait longer with the same command, or stop the worker with SIGTERM",
                )
    return report, answer


def _seconds(text: str) -> float:
    try:
        return SECONDS.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None
