"""Thousands of requests in flight on one worker when it is asked to stop, and what each of them costs then."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field

from common.load import Load, LoadSpecification, echo_text
from common.processes import TreeWatch
from common.report import progress
from common.subjects import OURS
from common.workbench import Workbench, WorkbenchError

#: Few tokens at a slow rate, so that thousands of streams are in flight without a load that hides what is measured.
MAX_TOKENS = 8
#: Streams started per second, and how long each lasts beyond the time that it takes to start them all.
_RAMP = 1000.0
_SECONDS = 15.0
_GRACE_PERIOD = 0.5


@dataclass
class InFlight:
    """What was seen of one stop with many requests in flight.

    :param mode: drain mode.
    :param requests: requests sent.
    :param in_flight: those that were in flight when the worker was asked to stop.
    :param completed: requests whose client got the whole answer.
    :param leave: seconds from the signal until the worker was out of discovery.
    :param gone: seconds from the signal until all of its processes were gone.
    :param work: seconds that the worker itself took: from leaving discovery (and the grace period) to its end;
        for `complete`, from the last answer to its end.
    :param code: exit code.
    :param losses: reasons of the requests that did not complete.
    """

    mode: str
    requests: int
    in_flight: int
    completed: int
    leave: float | None
    gone: float | None
    work: float | None
    code: int | None
    losses: dict[str, int] = field(default_factory=dict)

    @property
    def per_request(self) -> float | None:
        """Seconds of the worker's own work per request."""
        return None if self.work is None or not self.in_flight else self.work / self.in_flight


def measure(bench: Workbench, mode: str, requests: int) -> InFlight:
    """Stop a dynamo-worker with many requests in flight; for `handoff` and `complete` a second one is there.

    :param bench: with as many frontends as the open files of one process allow.
    :param mode: drain mode.
    :param requests: number of requests in flight.
    """
    model = "many"
    rate = (MAX_TOKENS - 1) / (_SECONDS + 2.0 * requests / _RAMP)
    flags = ["--tokens-per-second", f"{rate:.3f}", "--drain", mode, "--termination-grace-period", "120"]
    flags += ["--grace-period", f"{_GRACE_PERIOD if mode == 'complete' else 0:g}"]
    workers = [bench.start(OURS, model, flags)]
    load: Load | None = None
    try:
        progress(f"{mode}: sending {requests} requests")
        load = Load(
            LoadSpecification(
                bench.ports,
                model,
                requests,
                requests,
                MAX_TOKENS,
                expected=echo_text(MAX_TOKENS),
                ramp=_RAMP,
                timeout=150.0,
                time_limit=180.0,
            )
        )
        load.wait_streaming(90.0)
        if mode != "abort":
            workers.append(bench.start(OURS, model, flags))
            time.sleep(0.5)
        victim = workers[0]
        watch = TreeWatch(victim.program.tree())
        at = victim.program.signal(signal.SIGTERM)
        left = watch.wait(130.0)
        watch.close()
        left_at = bench.discovery.wait_vanished(victim.instance, 1.0)
        victim.program.wait(0.0 if left else 2.0)
        result = load.result(200.0)
        work = None
        if watch.gone_at is not None and left_at is not None:
            began = left_at
            if mode == "complete":
                # A client may see the last answer a little after the worker has sent it and is gone.
                began = min(watch.gone_at, max(record.ended for record in result.records))
            work = watch.gone_at - began
        return InFlight(
            mode,
            requests,
            sum(record.started <= at < record.ended for record in result.records),
            result.completed,
            None if left_at is None else left_at - at,
            None if watch.gone_at is None else watch.gone_at - at,
            work,
            victim.program.code,
            result.losses(),
        )
    finally:
        if load is not None:
            load.close()
        bench.end(workers)


def frontends_for(requests: int, file_limit: int) -> int:
    """Return how many frontends are needed: each holds two sockets per request.

    :raises WorkbenchError: the worker alone would need more open files than allowed.
    """
    if requests + 1000 > file_limit:
        raise WorkbenchError(
            f"{requests} requests in flight need more open files than the {file_limit} allowed: raise `ulimit -Hn`"
        )
    return -(-(2 * requests + 1000) // file_limit)
