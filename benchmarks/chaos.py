#!/usr/bin/env python3
"""Chaos: a fleet of workers under load, and faults at random from the whole table, for minutes or hours.

Workers of several engines serve behind real frontends with a real etcd, and NATS where it is installed. Clients send
short and long requests, read slowly, go away, and send huge prompts; every answer is compared in full. Faults are drawn
from a seed: processes die, hang and are stopped at any moment, hooks fail, disks fill up, etcd is away, versions roll.

Every request, exit code, reason, time to the exit and leftover is accounted for. The exit code is 1 if there was any
failure: a request lost that another worker could finish, a wrong answer, something left behind, an exit that no fault
explains or that came too late, a worker that does not come back.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
from typing import TYPE_CHECKING

from chaos_run.engines import ENGINES
from chaos_run.fleet import abilities, frontend_names, places
from chaos_run.plan import Plan
from chaos_run.run import Run, Settings
from chaos_run.summary import print_summary, results, verdict
from common.report import add_output_arguments, progress, write_json

if TYPE_CHECKING:
    from types import FrameType


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/chaos.py --minutes 10 --seed 7; then --seed 7 --only-fault 31",
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, metavar="M", help="duration of the faults (default: 10)")
    add("--seed", type=int, metavar="N", help="of all draws (default: drawn, and printed)")
    add("--workers", type=int, default=2, metavar="N", help="workers of each engine (default: 2)")
    add(
        "--engines", default="in-process,process,text", metavar="LIST",
        help=f"engines, separated by commas: {', '.join(ENGINES)} (default: in-process,process,text)",
    )  # fmt: skip
    add("--frontends", type=int, default=2, metavar="N", help="frontends (default: 2)")
    add("--rate", type=float, default=3.0, metavar="R", help="requests per second, bursts not counted (default: 3)")
    add("--faults-per-minute", type=float, default=12.0, metavar="F", help="as planned; some wait (default: 12)")
    add("--from-fault", type=int, default=0, metavar="N", help="number of the first fault (default: 0)")
    add("--only-fault", type=int, metavar="N", help="commit only this fault")
    add("--list", type=int, metavar="N", help="print the first N faults of the plan, and exit")
    add("--slack", type=float, default=4.0, metavar="S", help="seconds added to each bound (default: 4)")
    add("--progress", type=float, default=15.0, metavar="S", help="seconds between two summaries (default: 15)")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    unknown = set(arguments.engines.split(",")) - ENGINES.keys()
    if unknown:
        parser.error(f"--engines: {', '.join(sorted(unknown))} unknown; there are {', '.join(ENGINES)}")
    for flag in ("minutes", "workers", "frontends", "rate", "faults_per_minute"):
        if getattr(arguments, flag) <= 0:
            parser.error(f"--{flag.replace('_', '-')} must be more than 0")
    if shutil.which("etcd") is None:
        parser.error("no etcd server is installed (Debian: etcd-server)")
    return arguments


def main() -> int:
    """Run the chaos; return the exit code."""
    arguments = _arguments()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    engines = [ENGINES[name]() for name in arguments.engines.split(",")]
    plan = Plan(
        seed,
        places(engines, arguments.workers),
        frontend_names(arguments.frontends),
        abilities(),
        arguments.faults_per_minute,
    )
    if arguments.list:
        for number in range(arguments.list):
            print(plan.fault(arguments.from_fault + number))
        return 0
    settings = Settings(
        seed,
        arguments.minutes,
        arguments.workers,
        arguments.frontends,
        arguments.rate,
        arguments.slack,
        arguments.from_fault,
        arguments.only_fault,
        arguments.progress,
    )
    run = Run(settings, plan, engines, arguments.keep_logs)
    progress(f"--seed {seed}")
    interrupted = []

    def interrupt(number: int, _: FrameType | None) -> None:
        if interrupted:
            raise KeyboardInterrupt  # the fleet is killed
        interrupted.append(number)
        progress("interrupted: finishing; once more kills the fleet")
        run.stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        run.play()
    except AssertionError as error:
        print(f"chaos: the fleet does not start, or the run cannot go on: {error}", file=sys.stderr)
        return 1
    print_summary(run.accounts, plan.rows)
    counts = (run.seconds or 1.0, run.cpu_seconds, run.clients.retried, run.clients.not_sent)
    print(f"\nseed {seed}: {verdict(run.accounts, *counts)}")
    write_json(arguments.json, "chaos", vars(arguments) | {"seed": seed}, results(run.accounts, *counts))
    if run.accounts.failed:
        return 1
    return 128 + interrupted[0] if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
